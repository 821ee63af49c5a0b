enable f16;
enable wgpu_cooperative_matrix;
{% from "shared/gpu_kv.wgsl" import kv_element %}
{% set g = geometry %}
{% set k_row_scales = k_side.row_scales %}
{% set v_row_scales = v_side.row_scales %}
{% set k_channel_scales = k_side.channel_scales %}
{% set head_vec4s = head_dim // 4 %}
// Prefill attention for GPUs with matrix units: tiles of query rows over a paged KV cache.
//
// A workgroup serves one work item: TILE_Q rows (row = token * GROUP_SIZE + head in the group) of one KV head over a range of keys,
// TILE_KV keys at a time. Products are of matrices of SIZE x SIZE halves, summed up in f32, which the subgroups of the workgroup share out.
// Nobody can look into a matrix: it comes from workgroup memory and goes there. What is done to single elements is done by LANES neighbouring
// invocations for each row, which hold its running maximum, sums and output in registers.
//   - scores: queries times keys, to `products`;
//   - softmax: from `products` to weights in `halves`;
//   - values: weights times values, SLICE dims at a time, to `products`; from there they are added to the output.
//
// Halves end at 65504 and lose bits below 2^-14, so everything is brought to where they are good:
//   - a row of queries is multiplied by a power of two that takes its largest element to 2^14 .. 2^15, and its scores by the inverse;
//   - weights are at most 2^14, not 1: what they are relative to is 14 below the largest logit;
{% if k_row_scales %}
//   - keys are minimum + scale * code: codes are multiplied, scale and minimum go to the score;
{% endif %}
{% if k_channel_scales %}
//   - keys are minimum + scale * code, per channel: queries take the scales, and a score starts from their product with the minima;
{% endif %}
{% if v_row_scales %}
//   - values are minimum + scale * code: codes are multiplied. Weights take the scale, as 2^exponent * mantissa: the exponent counts as part
//     of the logit, with a maximum of its own. The minima have a sum of their own, the same for all dims.
{% else %}
//   - values are halves already. Those that are no numbers count as 0 and are added afterwards where they are seen: a weight of 0 would make
//     NaN of them.
{% endif %}
//
// Loop iterations per invocation: (ceil((kv_end - kv_begin) / TILE_KV){{ " + 1" if window }}) * (1 + at most {{ tile_q * tile_kv // (g.size * g.size) // g.score_block + tile_q * g.dims // (g.size * g.size) // g.value_block }} for one subgroup{{ " + TILE_KV" if g.screens }})

{{ kv_element(k_side, g.k_type, g.k_dims) }}
{{ kv_element(v_side, g.v_type, g.v_dims) }}
{% include "shared/gpu_interface.wgsl" %}

const TILE_Q: u32 = {{ tile_q }}u;
const TILE_KV: u32 = {{ tile_kv }}u;
const LANES: u32 = {{ g.lanes }}u;
const SIZE: u32 = {{ g.size }}u;
alias MatrixA = coop_mat{{ g.size }}x{{ g.size }}<f16, A>;
alias MatrixB = coop_mat{{ g.size }}x{{ g.size }}<f16, B>;
alias MatrixC = coop_mat{{ g.size }}x{{ g.size }}<f32, C>;

// [TILE_Q, HALF_ROW] queries; [TILE_KV, HALF_ROW] keys, then values; [TILE_Q, P_ROW] weights
var<workgroup> halves: array<f16, {{ g.halves_len }}>;
const HALF_ROW: u32 = {{ g.half_row }}u;
const KV_TILE: u32 = {{ g.kv_at }}u;
const P_TILE: u32 = {{ g.p_at }}u;
const P_ROW: u32 = {{ g.p_row }}u;
// [TILE_Q, PRODUCT_ROW] scores, then values
var<workgroup> products: array<f32, {{ g.products_len }}>;
const PRODUCT_ROW: u32 = {{ g.product_row }}u;
// [2, TILE_KV] cache rows of this tile and the next
var<workgroup> rows: array<u32, {{ g.rows_len }}>;
{% if g.scales_len > 0 %}
// [planes, TILE_KV]:{{ " scales and minima of K" if k_row_scales }}{{ ";" if k_row_scales and v_row_scales }}{{ " mantissas, minima and exponents of V's scales" if v_row_scales }}
var<workgroup> scales: array<f32, {{ g.scales_len }}>;
const V_PLANES: u32 = {{ g.k_planes * tile_kv }}u;
{% endif %}
{% if g.screens %}
// [0]: end of the last tile of keys that had an element of V which is no number. (Four, so that no array is off 16 bytes.)
var<workgroup> screened_end: array<atomic<u32>, 4>;
{% endif %}

// What weights are relative to is as far below the largest logit.
const WEIGHT_SHIFT: f32 = 14.0;
{% if g.screens %}
{# An element of the format with all bits of a number that is none, and one unit of its lowest exponent bit. #}
{% set bad_bits, bad_unit, bad_sign, bad_shift, bad_mask = ("0x7c007c00", "0x04000400", "0x80008000", 15, "0xffff") if v_format == "f16" else ("0x7f7f7f7f", "0x01010101", "0x80808080", 7, "0xff") %}

// The sign bits of elements that are no numbers: adding to exponents of all ones carries into them. (Told by their bits: compilers take it
// that there are none.)
fn bad_bits(element: VElement) -> VElement {
    return ((element & VElement({{ bad_bits }}u)) + VElement({{ bad_unit }}u)) & VElement({{ bad_sign }}u);
}

// The same of single elements.
fn is_no_number(v: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(v) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}
{% endif %}

fn store_halves(at: u32, v: vec4<f32>) {
    let h = vec4<f16>(v);
    halves[at] = h.x;
    halves[at + 1u] = h.y;
    halves[at + 2u] = h.z;
    halves[at + 3u] = h.w;
}

fn load_products(at: u32) -> vec4<f32> {
    return vec4<f32>(products[at], products[at + 1u], products[at + 2u], products[at + 3u]);
}

fn max_of_lanes(x: f32) -> f32 {
    let y = max(x, subgroupShuffleXor(x, 1u));
    return max(y, subgroupShuffleXor(y, 2u));
}

fn sum_of_lanes(x: f32) -> f32 {
    let y = x + subgroupShuffleXor(x, 1u);
    return y + subgroupShuffleXor(y, 2u);
}

{% if g.scales_len > 0 %}
fn load_scales(at: u32) -> vec4<f32> {
    return vec4<f32>(scales[at], scales[at + 1u], scales[at + 2u], scales[at + 3u]);
}

{% endif %}
{# `vec4` c of this invocation, of `len` in all: its index, and within bounds. #}
{% macro col(c) %}lane + {{ c * g.lanes }}u{% endmacro %}
{% macro safe_col(c) -%}
    {{ "min(%s, HEAD_VEC4S - 1u)"|format(col(c)) if (c + 1) * g.lanes > head_vec4s else col(c) }}
{%- endmacro %}
{# Reads the elements of a side that this invocation moves, and moves them. #}
{% macro load_rows(name, loads, first_row) %}
{% for n in range(loads) %}
            {{ name }}_load_{{ n }} = {{ name }}_element(rows[{{ first_row }} + {{ name }}_key_{{ n }}], {{ name }}_col_{{ n }});
{% endfor %}
{% endmacro %}
{% macro store_rows(name, loads, count, dims) %}
{% for n in range(loads) %}
            {{ "if (local_idx + %du < %du) "|format(n * workgroup_size, count) if (n + 1) * workgroup_size > count }}{
{% if name == "v" and g.screens %}
                let bad_{{ n }} = bad_bits(v_load_{{ n }});
                if (any(bad_{{ n }} != VElement())) {
                    atomicMax(&screened_end[0], tile_begin + TILE_KV);
                    v_load_{{ n }} &= ~((bad_{{ n }} >> VElement({{ bad_shift }}u)) * {{ bad_mask }}u);
                }
{% endif %}
{% for d in range(0, dims, 4) %}
                store_halves(KV_TILE + {{ name }}_key_{{ n }} * HALF_ROW + {{ name }}_col_{{ n }} * {{ dims }}u + {{ d }}u, {{ name }}_dims_{{ d }}({{ name }}_load_{{ n }}));
{% endfor %}
            }
{% endfor %}
{% endmacro %}
{# Matrices of products, shared out among subgroups: A at row `a` with `a_row`, and so on; `block` neighbouring ones at a time. #}
{% macro multiply(num_cols, block, inner, a_at, a_row, b_at, b_inner_row, b_cols, b_load) %}
        for (var n = subgroup_id; n < {{ tile_q // g.size * num_cols // block }}u; n += num_subgroups) {
            let first_row = n / {{ num_cols // block }}u * SIZE;
            let first_col = n % {{ num_cols // block }}u * {{ block * g.size }}u;
{% for b in range(block) %}
            var c_{{ b }} = MatrixC();
{% endfor %}
{% for i in range(0, inner, g.size) %}
            {
                let a = coopLoadT<MatrixA>(&halves[{{ a_at }}first_row * {{ a_row }} + {{ i }}u], {{ a_row }});
{% for b in range(block) %}
                let b_{{ b }} = {{ b_load }}<MatrixB>(&halves[KV_TILE + {{ b_at }} + {{ i }}u{{ b_inner_row }} + (first_col + {{ b * g.size }}u){{ b_cols }}], HALF_ROW);
                c_{{ b }} = coopMultiplyAdd(a, b_{{ b }}, c_{{ b }});
{% endfor %}
            }
{% endfor %}
{% for b in range(block) %}
            coopStoreT(c_{{ b }}, &products[first_row * PRODUCT_ROW + first_col + {{ b * g.size }}u], PRODUCT_ROW);
{% endfor %}
        }
{% endmacro %}
@compute @workgroup_size({{ workgroup_size }})
fn prefill(
    @builtin(workgroup_id) workgroup_id: vec3<u32>,
    @builtin(local_invocation_index) local_idx: u32,
    @builtin(subgroup_id) subgroup_id: u32,
    @builtin(num_subgroups) num_subgroups: u32,
) {
    let item_idx = workgroup_id.x + workgroup_id.z * params.grid_x;
    if (item_idx >= params.num_items) {
        return;
    }
    let item = read_item(item_idx, TILE_Q);
    let kv_head = workgroup_id.y;
    let first_head = kv_head * GROUP_SIZE;
    let num_rows = item.query_len * GROUP_SIZE;

    // What this invocation moves to workgroup memory.
{% for name, loads, count in [("k", g.k_loads, g.k_count), ("v", g.v_loads, g.v_count)] %}
{% for n in range(loads) %}
    let {{ name }}_key_{{ n }} = {{ "min(" if (n + 1) * workgroup_size > count }}(local_idx + {{ n * workgroup_size }}u) / {{ name|upper }}_ROW{{ ", TILE_KV - 1u)" if (n + 1) * workgroup_size > count }};
    let {{ name }}_col_{{ n }} = (local_idx + {{ n * workgroup_size }}u) % {{ name|upper }}_ROW;
    var {{ name }}_load_{{ n }}: {{ name|upper }}Element;
{% endfor %}
{% endfor %}

    // The row of this invocation. One past the end computes the last row again, which nobody stores.
    let row = local_idx / LANES;
    let lane = local_idx % LANES;
    let sequence_row = min(item.row_start + row, num_rows - 1u);
    let q_head = first_head + sequence_row % GROUP_SIZE;
    let query = item.context_len + sequence_row / GROUP_SIZE;
    let out_row = token_of(item, sequence_row) * NUM_Q_HEADS + q_head;
    var slope = 0.0;
    if (ALIBI) {
        slope = head_slope(q_head);
    }

{% if not mask %}
    // The keys that it sees.
    var first_visible = item.kv_begin;
    var visible_end = item.kv_end;
    if (WINDOW) {
        first_visible = max(first_visible, query + 1u - min(query + 1u, params.window));
    }
    if (CAUSAL) {
        visible_end = min(visible_end, query + 1u);
    }
    let num_visible = visible_end - min(first_visible, visible_end);
{% endif %}

    // Queries.
    var q_max = vec4<f32>(0.0);
{% if k_row_scales %}
    var q_sum = 0.0;
{% elif k_channel_scales %}
    var minimum_product = 0.0;
{% endif %}
{% for c in range(g.cols) %}
    var q_{{ c }} = load_q(q_begin(out_row) + {{ safe_col(c) }});
{% if (c + 1) * g.lanes > head_vec4s %}
    q_{{ c }} = select(vec4<f32>(0.0), q_{{ c }}, {{ col(c) }} < HEAD_VEC4S);
{% endif %}
{% if k_row_scales %}
    q_sum += dot(q_{{ c }}, vec4<f32>(1.0));
{% elif k_channel_scales %}
    minimum_product = fma_dot(q_{{ c }}, k_channels(1u, kv_head, 4u * ({{ safe_col(c) }})), minimum_product);
    q_{{ c }} *= k_channels(0u, kv_head, 4u * ({{ safe_col(c) }}));
{% endif %}
    q_max = max(q_max, abs(q_{{ c }}));
{% endfor %}
{% if k_row_scales %}
    q_sum = sum_of_lanes(q_sum);
{% elif k_channel_scales %}
    minimum_product = sum_of_lanes(minimum_product);
{% endif %}
    // The factor is 2^(141 - exponent); it and its inverse are normal numbers.
    let exponent = clamp(bitcast<u32>(max_of_lanes(max(max(q_max.x, q_max.y), max(q_max.z, q_max.w)))) >> 23u, 15u, 254u);
    let q_factor = bitcast<f32>((268u - exponent) << 23u);
    let score_factor = bitcast<f32>((exponent - 14u) << 23u);
{% for c in range(g.cols) %}
    {{ "if (%s < %du) "|format(col(c), g.dims // 4) if 4 * (c + 1) * g.lanes > g.dims }}{
        store_halves(row * HALF_ROW + 4u * ({{ col(c) }}), q_{{ c }} * q_factor);
    }
{% endfor %}
{% if g.is_padded %}
    // Past the end of the head there are zeros.
    if (local_idx < TILE_KV) {
{% for d in range(head_dim, g.dims, 4) %}
        store_halves(KV_TILE + local_idx * HALF_ROW + {{ d }}u, vec4<f32>(0.0));
{% endfor %}
    }
{% endif %}

    // What weights are relative to: {{ "the largest logit" if v_row_scales else "WEIGHT_SHIFT below the largest logit" }}, and above what hidden keys have, whose weight is 0 then.
    var reference = 0.5 * LOGIT_FLOOR;
{% if v_row_scales %}
    // The same of logits with the exponents of V's scales, for the weights that are multiplied.
    var p_reference = 0.5 * LOGIT_FLOOR;
    // Of this invocation's keys only, until the end: sum of weight * minimum.
    var minimum_sum = 0.0;
{% endif %}
    // Of this invocation's keys only, until the end.
    var p_sum = 0.0;
{% for c in range(g.cols) %}
    var sum_{{ c }} = vec4<f32>(0.0);
{% endfor %}
    // Positions of the first and last row: tiles of keys that all rows see need no mask.
    let first_query = item.context_len + item.row_start / GROUP_SIZE;
    let last_query = item.context_len + (min(item.row_start + TILE_Q, num_rows) - 1u) / GROUP_SIZE;

    // Keys past the range are read as its last key, and get no weight. The block table is read a tile ahead of the cache rows.
    let last_key = item.kv_end - 1u;
    var tile_rows = 0u;
    var next_entry = 0u;
{% if g.screens %}
    if (local_idx == 0u) {
        atomicStore(&screened_end[0], 0u);
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
        {
{{ load_rows("k", g.k_loads, "0u")|trim("\n") }}
{{ store_rows("k", g.k_loads, g.k_count, g.k_dims)|trim("\n") }}
        }
    }

    for (var tile_begin = first_tile; tile_begin < item.kv_end; tile_begin += TILE_KV) {
        workgroupBarrier();
        // Scores. The values are on their way meanwhile.
        {
{{ load_rows("v", g.v_loads, "tile_rows")|trim("\n") }}
        }
{% if g.scales_len > 0 %}
        let scaled_row = rows[tile_rows + min(local_idx, TILE_KV - 1u)];
{% if k_row_scales %}
        let k_scale = k_scale_word(scaled_row);
{% endif %}
{% if v_row_scales %}
        let v_scale = v_scale_word(scaled_row);
{% endif %}
{% endif %}
{{ multiply(tile_kv // g.size, g.score_block, g.dims, "", "HALF_ROW", "0u", "", " * HALF_ROW", "coopLoad")|trim("\n") }}
{% if g.scales_len > 0 %}
        if (local_idx < TILE_KV) {
{% if k_row_scales %}
            scales[local_idx] = bitcast<f32>(k_scale << 16u);
            scales[local_idx + TILE_KV] = bitcast<f32>(k_scale & 0xffff0000u);
{% endif %}
{% if v_row_scales %}
            // A row that is no number has all of that in its minimum. Below 2^-64 a scale has a mantissa below 1.
            let v_minimum = v_scale & 0xffff0000u;
            let is_bad = (v_scale & 0x7f80u) == 0x7f80u || (v_minimum & 0x7f800000u) == 0x7f800000u;
            let v_exponent = clamp((v_scale >> 7u) & 0xffu, 63u, 253u);
            let v_mantissa = bitcast<f32>(v_scale << 16u) * bitcast<f32>((254u - v_exponent) << 23u);
            scales[V_PLANES + local_idx] = select(v_mantissa, 0.0, is_bad);
            scales[V_PLANES + local_idx + TILE_KV] = bitcast<f32>(select(v_minimum, 0x7fc00000u, is_bad));
            scales[V_PLANES + local_idx + 2u * TILE_KV] = select(f32(v_exponent) - 127.0, 0.0, is_bad);
{% endif %}
        }
{% endif %}
        workgroupBarrier();

        // Softmax.
{% for j in range(g.key_cols) %}
        let key_{{ j }} = tile_begin + 4u * ({{ col(j) }});
        let score_{{ j }} = load_products(row * PRODUCT_ROW + 4u * ({{ col(j) }})) * score_factor;
{% if k_row_scales %}
        let product_{{ j }} = fma(score_{{ j }}, load_scales(4u * ({{ col(j) }})), q_sum * load_scales(TILE_KV + 4u * ({{ col(j) }})));
{% elif k_channel_scales %}
        let product_{{ j }} = score_{{ j }} + minimum_product;
{% else %}
        let product_{{ j }} = score_{{ j }};
{% endif %}
        var logits_{{ j }} = logits_of(product_{{ j }} * params.qk_scale, vec4<f32>(vec4<u32>(key_{{ j }}) + vec4<u32>(0u, 1u, 2u, 3u)) - f32(query), vec4<f32>(slope));
{% if v_row_scales %}
        var minimum_{{ j }} = load_scales(V_PLANES + TILE_KV + 4u * ({{ col(j) }}));
{% endif %}
{% endfor %}
        var is_masked = {{ "tile_begin + TILE_KV > (item.mask_begin & ~TREE_MASK) || " if mask }}tile_begin + TILE_KV > item.kv_end;
        if (CAUSAL) {
            is_masked = is_masked || tile_begin + TILE_KV > first_query + 1u;
        }
        if (WINDOW) {
            is_masked = is_masked || tile_begin < item.kv_begin || tile_begin + params.window <= last_query;
        }
        if (is_masked) {
{% for j in range(g.key_cols) %}
{% if mask %}
            let visible_{{ j }} = vec4<bool>(
                is_visible(item, key_{{ j }}, query), is_visible(item, key_{{ j }} + 1u, query),
                is_visible(item, key_{{ j }} + 2u, query), is_visible(item, key_{{ j }} + 3u, query),
            );
{% else %}
            let visible_{{ j }} = vec4<u32>(key_{{ j }} - first_visible) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(num_visible);
{% endif %}
            logits_{{ j }} = select(vec4<f32>(LOGIT_FLOOR), logits_{{ j }}, visible_{{ j }});
{% if v_row_scales %}
            minimum_{{ j }} = select(vec4<f32>(0.0), minimum_{{ j }}, visible_{{ j }});
{% endif %}
{% endfor %}
        }
        var max_4 = logits_0;
{% for j in range(1, g.key_cols) %}
        max_4 = max(max_4, logits_{{ j }});
{% endfor %}
        let tile_max = max_of_lanes(max(max(max_4.x, max_4.y), max(max_4.z, max_4.w)));
        let new_reference = max(reference, tile_max{{ " - WEIGHT_SHIFT" if not v_row_scales }});
        let p_factor = exp2(reference - new_reference);
        reference = new_reference;
        p_sum *= p_factor;
{% if v_row_scales %}
{% for j in range(g.key_cols) %}
        let shifted_{{ j }} = logits_{{ j }} + load_scales(V_PLANES + 2u * TILE_KV + 4u * ({{ col(j) }}));
        max_4 = {{ "max(max_4, shifted_%d)"|format(j) if j else "shifted_0" }};
{% endfor %}
        let shifted_max = max_of_lanes(max(max(max_4.x, max_4.y), max(max_4.z, max_4.w)));
        let new_p_reference = max(p_reference, shifted_max - WEIGHT_SHIFT);
        let factor = exp2(p_reference - new_p_reference);
        p_reference = new_p_reference;
        minimum_sum *= p_factor;
{% else %}
        let factor = p_factor;
{% endif %}
{% for j in range(g.key_cols) %}
        let p_{{ j }} = exp2(logits_{{ j }} - reference);
        p_sum += (p_{{ j }}.x + p_{{ j }}.y) + (p_{{ j }}.z + p_{{ j }}.w);
{% if v_row_scales %}
        minimum_sum = fma_dot(p_{{ j }}, minimum_{{ j }}, minimum_sum);
        store_halves(P_TILE + row * P_ROW + 4u * ({{ col(j) }}), exp2(shifted_{{ j }} - p_reference) * load_scales(V_PLANES + 4u * ({{ col(j) }})));
{% else %}
        store_halves(P_TILE + row * P_ROW + 4u * ({{ col(j) }}), p_{{ j }});
{% endif %}
{% endfor %}
{% for c in range(g.cols) %}
        sum_{{ c }} *= factor;
{% endfor %}
        let next_rows = TILE_KV - tile_rows;
        if (local_idx < TILE_KV) {
            let key = min(tile_begin + TILE_KV + local_idx, last_key);
            rows[next_rows + local_idx] = cache_row(next_entry, kv_head, key);
            next_entry = table_entry(item, min(key + TILE_KV, last_key));
        }
        {
{{ store_rows("v", g.v_loads, g.v_count, g.v_dims)|trim("\n") }}
        }
        workgroupBarrier();

        // Values. The next keys are on their way meanwhile.
        {
{{ load_rows("k", g.k_loads, "next_rows")|trim("\n") }}
        }
{% for s in range(g.num_slices) %}
{% set first_dim = s * g.slice %}
{% set slice_dims = [g.slice, g.dims - first_dim]|min %}
{% set block = g.value_block if slice_dims // g.size % g.value_block == 0 else 1 %}
{% if s %}
        workgroupBarrier();
{% endif %}
{{ multiply(slice_dims // g.size, block, tile_kv, "P_TILE + ", "P_ROW", first_dim ~ "u", " * HALF_ROW", "", "coopLoadT")|trim("\n") }}
        workgroupBarrier();
{% for c in range(g.cols) if 4 * g.lanes * c < first_dim + slice_dims and 4 * g.lanes * (c + 1) > first_dim %}
{% set covers = 4 * g.lanes * c >= first_dim and 4 * g.lanes * (c + 1) <= first_dim + slice_dims %}
        {{ "if (%s >= %du && %s < %du) "|format(col(c), first_dim // 4, col(c), (first_dim + slice_dims) // 4) if not covers }}{
            sum_{{ c }} += load_products(row * PRODUCT_ROW + 4u * ({{ col(c) }}) - {{ first_dim }}u);
        }
{% endfor %}
{% endfor %}
        {
{{ store_rows("k", g.k_loads, g.k_count, g.k_dims)|trim("\n") }}
        }
{% if g.screens %}
        // Elements that are no numbers, from the cache, for the rows that see them.
        if (atomicLoad(&screened_end[0]) > tile_begin) {
            for (var i = 0u; i < TILE_KV; i++) {
                let cache_row = rows[tile_rows + i];
                let visible = vec4<bool>(is_visible(item, tile_begin + i, query));
{% for c in range(g.cols) %}
                {
                    let d = {{ safe_col(c) }};
                    let element = v_element(cache_row, d / 2u);
                    let v = select(v_dims_0(element), v_dims_4(element), d % 2u == 1u);
                    sum_{{ c }} += select(vec4<f32>(0.0), v, is_no_number(v) & visible);
                }
{% endfor %}
            }
        }
{% endif %}
        tile_rows = next_rows;
    }

    p_sum = sum_of_lanes(p_sum);
{% if v_row_scales %}
    minimum_sum = sum_of_lanes(minimum_sum);
    let p_scale = exp2(p_reference - reference);
{% for c in range(g.cols) %}
    sum_{{ c }} = fma(sum_{{ c }}, vec4<f32>(p_scale), vec4<f32>(minimum_sum));
{% endfor %}
{% endif %}
    if (item.row_start + row < num_rows) {
        if (item.part_row != NO_PARTIAL) {
            let partial_row = (item.part_row + kv_head * num_rows + item.row_start + row) * (HEAD_VEC4S + 1u);
{% for c in range(g.cols) %}
            {{ "if (%s < HEAD_VEC4S) "|format(col(c)) if (c + 1) * g.lanes > head_vec4s }}{
                partials[partial_row + {{ col(c) }}] = sum_{{ c }};
            }
{% endfor %}
            if (lane == 0u) {
                partials[partial_row + HEAD_VEC4S] = vec4<f32>(reference, p_sum, 0.0, 0.0);
            }
        } else {
            var row_max = reference;
{% if sinks %}
            let joined = with_sink(row_max, p_sum, head_sink(q_head));
            row_max = joined.x;
            p_sum = joined.y;
            let factor = joined.z;
{% endif %}
            let inverse = inverse_sum(p_sum);
{% for c in range(g.cols) %}
            {{ "if (%s < HEAD_VEC4S) "|format(col(c)) if (c + 1) * g.lanes > head_vec4s }}{
                store_out(out_begin(out_row) + {{ col(c) }}, sum_{{ c }}{{ " * factor" if sinks }} * inverse);
            }
{% endfor %}
{% if lse %}
            if (lane == 0u) {
                lse[out_row] = natural_lse(row_max, p_sum);
            }
{% endif %}
        }
    }
}
