{% from "shared/gpu_kv.wgsl" import kv_element %}
{% set g = geometry %}
{% set k_row_scales = k_side.row_scales %}
{% set v_row_scales = v_side.row_scales %}
{% set k_channel_scales = k_side.channel_scales %}
{% set value_vec4s = value_dim // 4 %}
// Prefill attention for GPUs: tiles of query rows over a paged KV cache.
//
// A workgroup serves one work item: TILE_Q rows (row = token * GROUP_SIZE + head in the group) of one
// KV head over a range of keys, TILE_KV keys at a time. It multiplies like a blocked matrix product:
// an invocation has ROWS = 4 neighbouring rows and, in lane x of LANES, the keys x, x + LANES, ... of
// the tile (scores), then the vec4s x, x + LANES, ... of a value. Running maximum and sums
// of its rows stay in its registers.
//   - scores: Q and K pass through workgroup memory SLICE vec4s of the head at a time;
//   - softmax: the maximum of a row over its lanes, then weights to workgroup memory;
//   - values: V passes through workgroup memory V_KEYS keys at a time.
{% if g.screens %}
// A key may be hidden from some rows of the tile only, and have NaN or infinity in V, of which its weight 0 would make NaN.
// In tiles with hidden keys such elements count as 0, and are added afterwards where they are seen.
{% endif %}
{% if subgroups %}
// Lanes of a row are neighbours by local_invocation_index, and so in their subgroup.
{% endif %}
{% if k_row_scales or v_row_scales %}
// Rows with scales are put together (minimum + scale * code) on their way to workgroup memory.
{% endif %}
{% if k_channel_scales %}
// Keys are minimum + scale * code, per channel. Queries take the scales on their way to workgroup memory, and their
// products with the minima are what a score starts from.
{% endif %}
// While one slice is multiplied the next is on its way to the other of two buffers: one barrier a slice.
//
// Loop iterations per invocation: (ceil((kv_end - kv_begin) / TILE_KV){{ " + 1" if window }}) * (1 + NUM_SLICES + NUM_V_SLICES{{ " + TILE_KV" if g.screens }}){{ ", and 4 to begin" if k_channel_scales }}

{{ kv_element(k_side, g.k_type, g.k_dims) }}
{{ kv_element(v_side, g.v_type, g.v_dims) }}
{% include "shared/gpu_interface.wgsl" %}

const TILE_Q: u32 = {{ tile_q }}u;
const TILE_KV: u32 = {{ tile_kv }}u;
const LANES: u32 = {{ g.lanes }}u;
const ROWS: u32 = 4u;
const ROW_SETS: u32 = {{ g.row_sets }}u;
// vec4s of the head that are multiplied at a time. Rows in workgroup memory have one more: an odd
// number keeps lanes that read different rows on different banks.
const SLICE: u32 = {{ g.slice }}u;
const SLICE_ROW: u32 = {{ g.slice_row }}u;
const NUM_SLICES: u32 = {{ g.num_slices }}u;
// Keys whose values are multiplied at a time.
const V_KEYS: u32 = {{ g.v_keys }}u;
const NUM_V_SLICES: u32 = {{ g.num_v_slices }}u;
const WEIGHTS_ROW: u32 = {{ g.weights_row }}u;
{% if g.butterfly > 1 %}
// Neighbouring lanes that combine by shuffles.
const BUTTERFLY: u32 = {{ g.butterfly }}u;
{% endif %}

// During scores [2, TILE_Q + TILE_KV, SLICE_ROW]: rows of queries, then of keys, in two buffers.
// Then [TILE_KV, WEIGHTS_ROW] weights of 4 rows, [2, V_KEYS, VALUE_VEC4S] values in two buffers, and
// in place of the second [LANES / BUTTERFLY, ROW_SETS] what the lanes of 4 rows combine.
const SCORE_LEN: u32 = {{ g.score_len }}u;
const K_TILE: u32 = {{ g.k_tile }}u;
const V_TILE: u32 = {{ g.weights_len }}u;
const VALUE_LEN: u32 = {{ g.value_len }}u;
{% if g.parts > 1 %}
const LANE_PARTS: u32 = {{ g.lane_parts }}u;
{% endif %}
var<workgroup> tile: array<vec4<f32>, {{ g.tile_len }}>;
// [2, TILE_KV] cache rows of this tile and the next
var<workgroup> rows: array<u32, {{ g.rows_len }}>;
{% if k_channel_scales %}
// [ROW_SETS] products of 4 queries with the minima of the channels: in registers they would cost a wave.
var<workgroup> minimum_products: array<vec4<f32>, {{ g.minimum_products_len }}>;
{% endif %}

{% if g.screens %}
// End of the last tile of keys that had an element of V which is no number, among those with hidden keys.
var<workgroup> screened_end: atomic<u32>;

const EXPONENT: vec4<u32> = vec4<u32>(0x7f800000u);

// Which elements are no numbers: infinities and NaN. (Told by their bits: compilers take it that there are none.)
fn is_no_number(v: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(v) & EXPONENT) == EXPONENT;
}

fn screened(v: vec4<f32>, tile_end: u32) -> vec4<f32> {
    let is_bad = is_no_number(v);
    if (any(is_bad)) {
        atomicMax(&screened_end, tile_end);
    }
    return select(v, vec4<f32>(0.0), is_bad);
}

{% endif %}
// Row of q, and of out, that a row of the sequence is.
fn q_row_of(item: WorkItem, first_head: u32, row: u32) -> u32 {
    let last_row = item.query_len * GROUP_SIZE - 1u;
    let r = min(row, last_row);
    return token_of(item, r) * NUM_Q_HEADS + first_head + r % GROUP_SIZE;
}

{% if k_row_scales or v_row_scales %}
// A row's elements from their codes and the word of its scale and minimum.
fn scaled(codes: vec4<f32>, word: u32) -> vec4<f32> {
    return fma(codes, vec4<f32>(bitcast<f32>(word << 16u)), vec4<f32>(bitcast<f32>(word & 0xffff0000u)));
}

{% endif %}
{# Combines `value` (a vec4 variable, of 4 rows) over their lanes. #}
{% macro combine_lanes(value, op) %}
{% for distance in [1, 2, 4, 8, 16, 32] if distance < g.butterfly %}
{% if op == "max" %}
        {{ value }} = max({{ value }}, subgroupShuffleXor({{ value }}, {{ distance }}u));
{% else %}
        {{ value }} += subgroupShuffleXor({{ value }}, {{ distance }}u);
{% endif %}
{% endfor %}
{% if g.parts > 1 %}
{% if g.butterfly > 1 %}
        if (lane % BUTTERFLY == 0u) {
            tile[LANE_PARTS + lane / BUTTERFLY * ROW_SETS + row_set] = {{ value }};
        }
{% else %}
        tile[LANE_PARTS + lane * ROW_SETS + row_set] = {{ value }};
{% endif %}
        workgroupBarrier();
{% for part in range(g.parts) %}
{% set at = "tile[LANE_PARTS + %du + row_set]"|format(part * g.row_sets) %}
{% if loop.first %}
        {{ value }} = {{ at }};
{% elif op == "max" %}
        {{ value }} = max({{ value }}, {{ at }});
{% else %}
        {{ value }} += {{ at }};
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}
{# Reads a slice of Q and K, from vec4 `d` of the head on, to registers. #}
{% macro load_slice(d) %}
{% for n in range(g.q_loads) %}
{% if g.is_padded %}
            q_load_{{ n }} = select(vec4<f32>(0.0), load_q(q_at_{{ n }} + min({{ d }} + q_col, HEAD_VEC4S - 1u)), {{ d }} + q_col < HEAD_VEC4S);
{% else %}
            q_load_{{ n }} = load_q(q_at_{{ n }} + {{ d }} + q_col);
{% endif %}
{% endfor %}
{% if k_channel_scales %}
            q_scale = k_channels(0u, kv_head, 4u * {{ "min(%s + q_col, HEAD_VEC4S - 1u)"|format(d) if g.is_padded else "(%s + q_col)"|format(d) }});
{% endif %}
{% set k_first = "(%s) / 2u"|format(d) if g.k_dims == 8 else d %}
{% for n in range(g.k_loads) %}
{% if g.is_padded %}
            // Past the end of the head the query is zero: any element of the same key will do.
            k_load_{{ n }} = k_element(k_cache_row_{{ n }}, min({{ k_first }} + k_col, K_ROW - 1u));
{% else %}
            k_load_{{ n }} = k_element(k_cache_row_{{ n }}, {{ k_first }} + k_col);
{% endif %}
{% endfor %}
{% endmacro %}
{# Moves it on to the buffer at `buffer` of the tile. #}
{% macro store_slice(buffer) %}
{% for n in range(g.q_loads) %}
            {{ "if (local_idx + %du < TILE_Q * SLICE) "|format(n * workgroup_size) if (n + 1) * workgroup_size > g.q_count }}{
                tile[{{ buffer }} + q_slot + {{ n * workgroup_size // g.slice * g.slice_row }}u] = q_load_{{ n }}{{ " * q_scale" if k_channel_scales }};
            }
{% endfor %}
{% for n in range(g.k_loads) %}
            {{ "if (local_idx + %du < %du) "|format(n * workgroup_size, g.k_count) if (n + 1) * workgroup_size > g.k_count }}{
{% for d in range(0, g.k_dims, 4) %}
                tile[{{ buffer }} + k_slot + {{ n * workgroup_size // g.k_cols * g.slice_row + d // 4 }}u] = {% if k_row_scales %}scaled(k_dims_{{ d }}(k_load_{{ n }}), k_scale_{{ n }}){% else %}k_dims_{{ d }}(k_load_{{ n }}){% endif %};
{% endfor %}
            }
{% endfor %}
{% endmacro %}
{# The same for a slice of V, from key `first_key` of the tile on. #}
{% macro load_values(first_key) %}
{% for n in range(g.v_loads) %}
            v_load_{{ n }} = v_element(rows[tile_rows + {{ first_key }} + v_key_{{ n }}], v_col_{{ n }});
{% if v_row_scales %}
            v_scale_{{ n }} = v_scale_word(rows[tile_rows + {{ first_key }} + v_key_{{ n }}]);
{% endif %}
{% endfor %}
{% endmacro %}
{% macro store_values(buffer) %}
{% for n in range(g.v_loads) %}
            {{ "if (local_idx + %du < V_KEYS * V_ROW) "|format(n * workgroup_size) if (n + 1) * workgroup_size > g.v_count }}{
{% for d in range(0, g.v_dims, 4) %}
{% set value = "scaled(v_dims_%d(v_load_%d), v_scale_%d)"|format(d, n, n) if v_row_scales else "v_dims_%d(v_load_%d)"|format(d, n) %}
{% set at = buffer ~ " + local_idx * %du + %du"|format(g.v_dims // 4, n * workgroup_size * g.v_dims // 4 + d // 4) %}
{% if g.screens %}
                var value_{{ d }} = {{ value }};
                if (is_masked) {
                    value_{{ d }} = screened(value_{{ d }}, tile_begin + TILE_KV);
                }
                tile[{{ at }}] = value_{{ d }};
{% else %}
                tile[{{ at }}] = {{ value }};
{% endif %}
{% endfor %}
            }
{% endfor %}
{% endmacro %}
@compute @workgroup_size({{ workgroup_size }})
fn prefill(
    @builtin(workgroup_id) workgroup_id: vec3<u32>,
    @builtin(local_invocation_index) local_idx: u32,
) {
    let item_idx = workgroup_id.x + workgroup_id.z * params.grid_x;
    if (item_idx >= params.num_items) {
        return;
    }
    let item = read_item(item_idx, TILE_Q);
    let kv_head = workgroup_id.y;
    let first_head = kv_head * GROUP_SIZE;
    let num_rows = item.query_len * GROUP_SIZE;
    let lane = local_idx % LANES;
    let row_set = local_idx / LANES;

    // What this invocation moves to workgroup memory; rows past the end are read as the last row.
    let q_col = local_idx % SLICE;
    let q_slot = local_idx / SLICE * SLICE_ROW + q_col;
{% for n in range(g.q_loads) %}
    let q_at_{{ n }} = q_begin(q_row_of(item, first_head, item.row_start + local_idx / SLICE + {{ n * workgroup_size // g.slice }}u));
    var q_load_{{ n }}: vec4<f32>;
{% endfor %}
{% if k_channel_scales %}
    var q_scale: vec4<f32>;
{% endif %}
    let k_col = local_idx % {{ g.k_cols }}u;
    let k_slot = K_TILE + local_idx / {{ g.k_cols }}u * SLICE_ROW + k_col * {{ g.k_dims // 4 }}u;
{% for n in range(g.k_loads) %}
    let k_key_{{ n }} = {{ "min(" if (n + 1) * workgroup_size > g.k_count }}local_idx / {{ g.k_cols }}u + {{ n * workgroup_size // g.k_cols }}u{{ ", TILE_KV - 1u)" if (n + 1) * workgroup_size > g.k_count }};
    var k_load_{{ n }}: KElement;
{% endfor %}
{% for n in range(g.v_loads) %}
    let v_key_{{ n }} = {{ "min(" if (n + 1) * workgroup_size > g.v_count }}(local_idx + {{ n * workgroup_size }}u) / V_ROW{{ ", V_KEYS - 1u)" if (n + 1) * workgroup_size > g.v_count }};
    let v_col_{{ n }} = (local_idx + {{ n * workgroup_size }}u) % V_ROW;
    var v_load_{{ n }}: VElement;
{% if v_row_scales %}
    var v_scale_{{ n }}: u32;
{% endif %}
{% endfor %}

    // The rows of this invocation.
    let first_row = item.row_start + row_set * ROWS;
    var slope = vec4<f32>(0.0);
    if (ALIBI) {
        slope = vec4<f32>({% for r in range(4) %}head_slope(first_head + (first_row + {{ r }}u) % GROUP_SIZE){{ ", " if not loop.last }}{% endfor %});
    }
    var logit_max = vec4<f32>(LOGIT_FLOOR);
    // Of this invocation's keys only, until the end.
    var p_sum = vec4<f32>(0.0);
{% for c in range(g.cols) %}
{% for r in range(4) %}
    var sum_{{ r }}_{{ c }} = vec4<f32>(0.0);
{% endfor %}
{% endfor %}
{% if k_channel_scales %}
    // Products of the queries with the minima: vec4s of the head over lanes, then summed.
    var minimum_product = vec4<f32>(0.0);
    for (var d = lane; d < HEAD_VEC4S; d += LANES) {
        let minimum = k_channels(1u, kv_head, 4u * d);
{% for r in range(4) %}
        minimum_product.{{ "xyzw"[r] }} = fma_dot(load_q(q_begin(q_row_of(item, first_head, first_row + {{ r }}u)) + d), minimum, minimum_product.{{ "xyzw"[r] }});
{% endfor %}
    }
{{ combine_lanes("minimum_product", "sum")|trim("\n")|replace("        ", "    ") }}
    if (lane == 0u) {
        minimum_products[row_set] = minimum_product;
    }
{% endif %}
    // Positions of the first and last row: tiles of keys that all rows see need no mask.
    let first_query = item.context_len + item.row_start / GROUP_SIZE;
    let last_query = item.context_len + (min(item.row_start + TILE_Q, num_rows) - 1u) / GROUP_SIZE;

    // Keys past the range are read as its last key, and get no weight. The block table is read a
    // tile ahead of the cache rows, these a tile ahead of V.
    let last_key = item.kv_end - 1u;
    var tile_rows = 0u;
    var next_entry = 0u;
{% if g.screens %}
    if (local_idx == 0u) {
        atomicStore(&screened_end, 0u);
    }
{% endif %}
{% if window %}
    // On a grid of tiles: a row's keys are in the same tiles whatever rows are beside it, and tiles of which it sees no key change none of its bits.
{% endif %}
    let first_tile = item.kv_begin{{ " - item.kv_begin % TILE_KV" if window }};
    if (item.kv_begin < item.kv_end) {
        if (local_idx < TILE_KV) {
            let key = clamp(first_tile + local_idx, item.kv_begin, last_key);
            rows[local_idx] = cache_row(table_entry(item, key), kv_head, key);
            next_entry = table_entry(item, min(first_tile + local_idx + TILE_KV, last_key));
        }
        workgroupBarrier();
    }

    for (var tile_begin = first_tile; tile_begin < item.kv_end; tile_begin += TILE_KV) {
        // Scores.
{% for j in range(g.keys_per_lane) %}
        var score_{{ j }} = {{ "minimum_products[row_set]" if k_channel_scales else "vec4<f32>(0.0)" }};
{% endfor %}
{% for n in range(g.k_loads) %}
        let k_cache_row_{{ n }} = rows[tile_rows + k_key_{{ n }}];
{% if k_row_scales %}
        let k_scale_{{ n }} = k_scale_word(k_cache_row_{{ n }});
{% endif %}
{% endfor %}
        {
{{ load_slice("0u")|trim("\n") }}
{{ store_slice("0u")|trim("\n") }}
        }
        workgroupBarrier();
        var buffer = 0u;
        for (var d = 0u; d < NUM_SLICES * SLICE; d += SLICE) {
            let has_next = d + SLICE < NUM_SLICES * SLICE;
            if (has_next) {
{{ load_slice("d + SLICE")|trim("\n")|indent(4, true) }}
            }
{% for i in range(g.slice) %}
            {
{% for r in range(4) %}
                let q_{{ r }} = tile[buffer + (row_set * ROWS + {{ r }}u) * SLICE_ROW + {{ i }}u];
{% endfor %}
{% for j in range(g.keys_per_lane) %}
                let k_{{ j }} = tile[buffer + K_TILE + (lane + {{ j * g.lanes }}u) * SLICE_ROW + {{ i }}u];
{% for r in range(4) %}
                score_{{ j }}.{{ "xyzw"[r] }} = fma_dot(q_{{ r }}, k_{{ j }}, score_{{ j }}.{{ "xyzw"[r] }});
{% endfor %}
{% endfor %}
            }
{% endfor %}
            buffer = SCORE_LEN - buffer;
            if (has_next) {
{{ store_slice("buffer")|trim("\n")|indent(4, true) }}
            }
            workgroupBarrier();
        }

        // Softmax. The first values are on their way meanwhile.
        {
{{ load_values("0u")|trim("\n") }}
        }
        // Computed here rather than once: it would hold registers during the products.
        let query = item.context_len + vec4<u32>(first_row, first_row + 1u, first_row + 2u, first_row + 3u) / GROUP_SIZE;
{% for j in range(g.keys_per_lane) %}
        let key_{{ j }} = tile_begin + lane + {{ j * g.lanes }}u;
        var logits_{{ j }} = logits_of(score_{{ j }} * params.qk_scale, f32(key_{{ j }}) - vec4<f32>(query), slope);
{% endfor %}
        var is_masked = {{ "tile_begin + TILE_KV > (item.mask_begin & ~TREE_MASK) || " if mask }}tile_begin + TILE_KV > item.kv_end;
        if (CAUSAL) {
            is_masked = is_masked || tile_begin + TILE_KV > first_query + 1u;
        }
        if (WINDOW) {
            is_masked = is_masked || tile_begin < item.kv_begin || tile_begin + params.window <= last_query;
        }
        if (is_masked) {
{% for j in range(g.keys_per_lane) %}
            logits_{{ j }} = select(vec4<f32>(LOGIT_FLOOR), logits_{{ j }}, vec4<bool>(
                is_visible(item, key_{{ j }}, query.x), is_visible(item, key_{{ j }}, query.y),
                is_visible(item, key_{{ j }}, query.z), is_visible(item, key_{{ j }}, query.w),
            ));
{% endfor %}
        }
        var tile_max = logits_0;
{% for j in range(1, g.keys_per_lane) %}
        tile_max = max(tile_max, logits_{{ j }});
{% endfor %}
{{ combine_lanes("tile_max", "max")|trim("\n") }}
        let new_max = max(logit_max, tile_max);
        let factor = exp2(logit_max - new_max);
        logit_max = new_max;
        p_sum *= factor;
{% for j in range(g.keys_per_lane) %}
        let p_{{ j }} = weights_of(logits_{{ j }}, new_max);
        p_sum += p_{{ j }};
        tile[(lane + {{ j * g.lanes }}u) * WEIGHTS_ROW + row_set] = p_{{ j }};
{% endfor %}
{% for c in range(g.cols) %}
{% for r in range(4) %}
        sum_{{ r }}_{{ c }} *= factor.{{ "xyzw"[r] }};
{% endfor %}
{% endfor %}
        let next_rows = TILE_KV - tile_rows;
        if (local_idx < TILE_KV) {
            let key = min(tile_begin + TILE_KV + local_idx, last_key);
            rows[next_rows + local_idx] = cache_row(next_entry, kv_head, key);
            next_entry = table_entry(item, min(key + TILE_KV, last_key));
        }

        // Values.
        {
{{ store_values("V_TILE")|trim("\n") }}
        }
        workgroupBarrier();
        buffer = 0u;
        for (var first_key = 0u; first_key < TILE_KV; first_key += V_KEYS) {
            let has_next = first_key + V_KEYS < TILE_KV;
            if (has_next) {
{{ load_values("first_key + V_KEYS")|trim("\n")|indent(4, true) }}
            }
{% for e in range(g.v_keys) %}
            {
                let p = tile[(first_key + {{ e }}u) * WEIGHTS_ROW + row_set];
{% for c in range(g.cols) %}
{% if (c + 1) * g.lanes > value_vec4s %}
                // Lanes past the end of the head compute what nobody stores.
                let v_{{ c }} = tile[V_TILE + buffer + {{ e }}u * VALUE_VEC4S + min(lane + {{ c * g.lanes }}u, VALUE_VEC4S - 1u)];
{% else %}
                let v_{{ c }} = tile[V_TILE + buffer + {{ e }}u * VALUE_VEC4S + lane + {{ c * g.lanes }}u];
{% endif %}
{% for r in range(4) %}
                sum_{{ r }}_{{ c }} = fma(vec4<f32>(p.{{ "xyzw"[r] }}), v_{{ c }}, sum_{{ r }}_{{ c }});
{% endfor %}
{% endfor %}
            }
{% endfor %}
            buffer = VALUE_LEN - buffer;
            if (has_next) {
{{ store_values("V_TILE + buffer")|trim("\n")|indent(4, true) }}
            }
            workgroupBarrier();
        }
{% if g.screens %}
        // Elements that are no numbers, from the cache, for the rows that see them.
        if (atomicLoad(&screened_end) > tile_begin) {
            for (var i = 0u; i < TILE_KV; i++) {
                let key = tile_begin + i;
                let row = rows[tile_rows + i];
{% for c in range(g.cols) %}
                {
                    let d = {{ "min(lane + %du, VALUE_VEC4S - 1u)"|format(c * g.lanes) if (c + 1) * g.lanes > value_vec4s else "lane + %du"|format(c * g.lanes) }};
{% if g.v_dims == 4 %}
                    let element = v_element(row, d);
                    let dims = v_dims_0(element);
{% else %}
                    let element = v_element(row, d / 2u);
                    let dims = select(v_dims_0(element), v_dims_4(element), d % 2u == 1u);
{% endif %}
                    let v = {{ "scaled(dims, v_scale_word(row))" if v_row_scales else "dims" }};
                    let is_bad = is_no_number(v);
{% for r in range(4) %}
                    sum_{{ r }}_{{ c }} += select(vec4<f32>(0.0), v, is_bad & vec4<bool>(is_visible(item, key, query.{{ "xyzw"[r] }})));
{% endfor %}
                }
{% endfor %}
            }
        }
{% endif %}
        tile_rows = next_rows;
    }

{{ combine_lanes("p_sum", "sum")|trim("\n")|replace("        ", "    ") }}
{% for r in range(4) %}
    if (first_row + {{ r }}u < num_rows && row_set * ROWS + {{ r }}u < TILE_Q) {
        let row = first_row + {{ r }}u;
        let q_head = first_head + row % GROUP_SIZE;
        let out_row = token_of(item, row) * NUM_Q_HEADS + q_head;
        let partial_row = (item.part_row + kv_head * num_rows + row) * (VALUE_VEC4S + 1u);
        var row_max = logit_max.{{ "xyzw"[r] }};
        var row_sum = p_sum.{{ "xyzw"[r] }};
        if (item.part_row != NO_PARTIAL) {
{% for c in range(g.cols) %}
            {{ "if (lane + %su < VALUE_VEC4S) "|format(c * g.lanes) if (c + 1) * g.lanes > value_vec4s }}{
                partials[partial_row + lane + {{ c * g.lanes }}u] = sum_{{ r }}_{{ c }};
            }
{% endfor %}
            if (lane == 0u) {
                partials[partial_row + VALUE_VEC4S] = vec4<f32>(row_max, row_sum, 0.0, 0.0);
            }
        } else {
{% if sinks %}
            let joined = with_sink(row_max, row_sum, head_sink(q_head));
            row_max = joined.x;
            row_sum = joined.y;
            let factor = joined.z;
{% endif %}
            let inverse = inverse_sum(row_sum);
{% for c in range(g.cols) %}
            {{ "if (lane + %su < VALUE_VEC4S) "|format(c * g.lanes) if (c + 1) * g.lanes > value_vec4s }}{
                store_out(out_begin(out_row) + lane + {{ c * g.lanes }}u, sum_{{ r }}_{{ c }}{{ " * factor" if sinks }} * inverse);
            }
{% endfor %}
{% if lse %}
            if (lane == 0u) {
                lse[out_row] = natural_lse(row_max, row_sum);
            }
{% endif %}
        }
    }
{% endfor %}
}
