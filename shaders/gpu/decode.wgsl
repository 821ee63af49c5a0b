{% from "shared/gpu_kv.wgsl" import kv_element, k_code_words %}
{% import "shared/packed_queries.wgsl" as packed %}
{% import "shared/kv_side.wgsl" as sides %}
{% set g = geometry %}
{# Rows of V that the mask hides may hold NaN: 0 stands for their elements, or for their scale. #}
{% set screens = g.seen_len > 0 %}
{# Scales per row: of K they are applied to sums, of V to weights. Scales per channel: the query takes them. #}
{% set k_row_scales = k_side.row_scales %}
{% set v_row_scales = v_side.row_scales %}
{% set k_channel_scales = k_side.channel_scales %}
{% set k_affine = k_row_scales or k_channel_scales %}
{# What a head's scores have in common of the minima of K: in a register, or with more of the kind in workgroup memory. #}
{% set has_q_offset = k_affine and not packed_dots %}
{% set scaled = [(k_side, k_row_scales), (v_side, v_row_scales)] %}
{% set k_parts = range(0, g.k_dims, 4) %}
{% set v_parts = range(0, g.v_dims, 4) %}
// Decode attention for GPUs: one query token per sequence, over a paged KV cache.
//
// A workgroup serves one work item (a range of keys) for one KV head and all the query heads that
// share it, so each element of K and V is read once. Keys pass in tiles of TILE_KV. In a tile
//   - scores: LANES neighbouring invocations read one key side by side and multiply it with all heads;
//   - softmax: one invocation per head and stream makes weights of logits. A stream is every
//     STREAMS-th quad (4 keys), and has its own running maximum until the end;
//   - values: V_ROW neighbouring invocations per stream read its values side by side.
// K of the next tile is on its way during softmax and values, V of this tile during scores, and the
// block table is read a further tile ahead. Two barriers a tile.
{% if subgroups %}
// Lanes of a key are neighbours by local_invocation_index, and so in their subgroup.
{% endif %}
//
// Loop iterations per invocation: ceil((kv_end - kv_begin) / TILE_KV), and at most 300 to begin and end.

{% if packed_dots %}
alias KElement = {{ g.k_type }};
{{ k_code_words(k_side, g.k_dims) }}
{% else %}
{{ kv_element(k_side, g.k_type, g.k_dims) }}
{% endif %}
{{ kv_element(v_side, g.v_type, g.v_dims) }}
{% include "shared/gpu_interface.wgsl" %}

{{ sides.place_functions(v_side, [v_side.row_bytes * g.v_dims // v_side.row_dim, 4]|max) }}
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;
const TILE_KV: u32 = {{ tile_kv }}u;
const QUADS: u32 = {{ g.quads }}u;
// Invocations per key, and keys that all of them take at a time.
const LANES: u32 = {{ g.lanes }}u;
const KEY_SLOTS: u32 = {{ g.key_slots }}u;
// vec4s of a query row, padded so that every lane has the same number of elements.
const Q_ROW: u32 = {{ g.q_row }}u;
// Neighbouring lanes that add up their parts of a score by shuffles, and the parts left then.
const BUTTERFLY: u32 = {{ g.butterfly }}u;
// Row of logits of a head, padded against bank conflicts between heads.
const LOGITS_ROW: u32 = {{ g.logits_row }}u;
const STREAMS: u32 = {{ g.streams }}u;
const MERGE_HEADS: u32 = {{ g.merge_heads }}u;

{% if packed_dots %}
{{ packed.declare(g) }}
// After the last tile [MERGE_HEADS, STREAMS, VALUE_VEC4S] sums
{% else %}
// [GROUP_SIZE, Q_ROW] scaled queries; after the last tile [MERGE_HEADS, STREAMS, VALUE_VEC4S] sums
{% endif %}
var<workgroup> tile: array<vec4<f32>, {{ g.tile_len }}>;
// [PARTS, GROUP_SIZE, LOGITS_ROW]; after the last tile [2, GROUP_SIZE, STREAMS] maxima and sums of weights, in place of which the first of each head's are then factors of its result{{ ", then the same for minima of V, then [GROUP_SIZE] sums of those" if v_row_scales }}
var<workgroup> logits: array<f32, {{ g.logits_len }}>;
// [GROUP_SIZE, QUADS]
var<workgroup> weights: array<vec4<f32>, {{ g.weights_len }}>;
// [STREAMS, GROUP_SIZE] what the sums so far are multiplied with
var<workgroup> rescale: array<f32, {{ g.rescale_len }}>;
// [TILE_KV] cache rows, as v_place has them
var<workgroup> rows: array<u32, {{ g.rows_len }}>;
{% if screens %}
// [TILE_KV] all bits if the key is visible, else none
var<workgroup> seen: array<u32, {{ g.seen_len }}>;
{% endif %}
{% for s, has in scaled if has %}
// [TILE_KV] scale and minimum of each row of {{ s.name|upper }}
var<workgroup> {{ s.name }}_scales: array<u32, {{ tile_kv }}>;
{% endfor %}
{% for s, has in scaled if has %}

// Scales, or as they stand in the upper halves minima, of a quad of the tile's rows of {{ s.name|upper }}.
fn {{ s.name }}_quad_words(quad: u32) -> vec4<u32> {
    let at = 4u * quad;
    return vec4<u32>({{ s.name }}_scales[at], {{ s.name }}_scales[at + 1u], {{ s.name }}_scales[at + 2u], {{ s.name }}_scales[at + 3u]);
}
{% endfor %}
{% if k_row_scales or v_row_scales %}

fn scales_of(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(words << vec4<u32>(16u));
}

fn minima_of(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(words & vec4<u32>(0xffff0000u));
}
{% endif %}
{% if packed_dots %}

{{ packed.functions(k_side)|trim }}
{% endif %}

// Logits of a query head with a quad of the tile's keys; LOGIT_FLOOR where the key is hidden.
{% if packed_dots %}
// The products are of codes; see q_terms.
{% elif k_row_scales %}
// A key is minimum + scale * codes: its product with the query is minimum * q_offset + scale * (query . codes), where
// q_offset is the sum of the query.
{% elif k_channel_scales %}
// The query in workgroup memory has the scales in it; q_offset is its product with the minima.
{% endif %}
fn tile_logits(item: WorkItem, head: u32, quad: u32, tile_begin: u32, slope: f32{{ ", q_offset: f32" if has_q_offset }}) -> vec4<f32> {
    var products = vec4<f32>(0.0);
{% for part in range(g.parts) %}
    let at_{{ part }} = ({{ part * group_size }}u + head) * LOGITS_ROW + 4u * quad;
    products += vec4<f32>(logits[at_{{ part }}], logits[at_{{ part }} + 1u], logits[at_{{ part }} + 2u], logits[at_{{ part }} + 3u]);
{% endfor %}
{% if packed_dots %}
    let terms = q_terms[head];
    products = fma(products, vec4<f32>(terms.x), vec4<f32>(terms.y));
{% endif %}
{% if k_row_scales %}
    let words = k_quad_words(quad);
    products = fma(products, scales_of(words), {{ "terms.z" if packed_dots else "q_offset" }} * minima_of(words));
{% elif k_channel_scales and not packed_dots %}
    products += vec4<f32>(q_offset);
{% endif %}
    let query = item.context_len;
    let key = tile_begin + 4u * quad;
    let distance = vec4<f32>(f32(key), f32(key + 1u), f32(key + 2u), f32(key + 3u)) - f32(query);
    let visible = vec4<bool>(
        is_visible(item, key, query), is_visible(item, key + 1u, query),
        is_visible(item, key + 2u, query), is_visible(item, key + 3u, query),
    );
    return select(vec4<f32>(LOGIT_FLOOR), logits_of(products, distance, vec4<f32>(slope)), visible);
}

@compute @workgroup_size({{ workgroup_size }})
fn decode(
    @builtin(workgroup_id) workgroup_id: vec3<u32>,
    @builtin(local_invocation_index) local_idx: u32,
) {
    let item_idx = workgroup_id.x + workgroup_id.z * params.grid_x;
    if (item_idx >= params.num_items) {
        return;
    }
    let item = read_item(item_idx, GROUP_SIZE);
    let kv_head = workgroup_id.y;
    let first_head = kv_head * GROUP_SIZE;

    // Scores: this invocation's keys of a tile are key_slot + i * KEY_SLOTS.
    let lane = local_idx % LANES;
    let key_slot = local_idx / LANES;
    // Softmax and values: this invocation's head, stream and element of the row.
    let softmax_head = local_idx / STREAMS;
    let softmax_stream = local_idx % STREAMS;
    let stream = local_idx / V_ROW;
    let v_idx = local_idx % V_ROW;

{% if not packed_dots %}
    for (var i = local_idx; i < GROUP_SIZE * Q_ROW; i += WORKGROUP_SIZE) {
{% if g.q_interleaved %}
        // In the order in which the lanes of a key read them: side by side, on different banks.
        let place = i % Q_ROW;
        let d = place / {{ g.lanes * g.k_dims // 4 }}u * {{ g.lanes * g.k_dims // 4 }}u + place % LANES * {{ g.k_dims // 4 }}u + place / LANES % {{ g.k_dims // 4 }}u;
{% else %}
        let d = i % Q_ROW;
{% endif %}
        let head = q_begin(item.query_start * NUM_Q_HEADS + first_head + i / Q_ROW);
        let at = min(d, HEAD_VEC4S - 1u);
        tile[i] = select(vec4<f32>(0.0), load_q(head + at) * params.qk_scale{{ " * k_channels(0u, kv_head, 4u * at)" if k_channel_scales }}, d < HEAD_VEC4S);
    }
{% endif %}
{% if k_affine %}
    // What the minima are multiplied by, per head in QUADS parts.
    if (local_idx < GROUP_SIZE * QUADS) {
        let head = q_begin(item.query_start * NUM_Q_HEADS + first_head + local_idx / QUADS);
        var part = vec4<f32>(0.0);
{% if packed_dots %}
        var largest = vec4<u32>(0u);
{% endif %}
        for (var d = local_idx % QUADS; d < HEAD_VEC4S; d += QUADS) {
{% if packed_dots %}
            largest = max(largest, {{ packed.magnitudes("load_q(head + d)", "4u * d", k_channel_scales) }});
{% endif %}
{% if k_channel_scales %}
            part = fma(load_q(head + d), {{ "fma(vec4<f32>(CENTRE), k_channels(0u, kv_head, 4u * d), k_channels(1u, kv_head, 4u * d))" if packed_dots else "k_channels(1u, kv_head, 4u * d)" }}, part);
{% else %}
            part += load_q(head + d);
{% endif %}
        }
        weights[local_idx] = part * params.qk_scale;
{% if packed_dots %}
        logits[local_idx] = bitcast<f32>(max(max(largest.x, largest.y), max(largest.z, largest.w)));
{% endif %}
    }
{% endif %}
{% if packed_dots %}
    workgroupBarrier();
{{ packed.quantise(g, k_channel_scales) }}
    let q_step = step_of_query(largest_of_query(min(softmax_head, GROUP_SIZE - 1u)));
{% endif %}

{% for i in range(g.keys_per_lane) %}
    var next_entry_{{ i }} = 0u;
{% for s, has in scaled if has %}
    var {{ s.name }}_scale_{{ i }} = 0u;
{% endfor %}
{% for c in range(g.k_loads) %}
    var k_load_{{ i }}_{{ c }}: KElement;
{% endfor %}
{% endfor %}
{# Reads this invocation's elements of K from the tile at `begin`, whose table entries are there. #}
{% macro load_keys(begin) %}
{% for i in range(g.keys_per_lane) %}
        {
            let key = min({{ begin }} + key_slot + {{ i }}u * KEY_SLOTS, last_key);
            let row = cache_row(next_entry_{{ i }}, kv_head, key);
            next_entry_{{ i }} = table_entry(item, min(key + TILE_KV, last_key));
{% for s, has in scaled if has %}
            {{ s.name }}_scale_{{ i }} = {{ s.name }}_scale_word(row);
{% endfor %}
{% if mask %}
            let is_seen = is_visible(item, {{ begin }} + key_slot + {{ i }}u * KEY_SLOTS, item.context_len);
{% if v_row_scales %}
            v_scale_{{ i }} = select(0u, v_scale_{{ i }}, is_seen);
{% endif %}
{% endif %}
{% for c in range(g.k_loads) %}
{% if (c + 1) * g.lanes > g.k_row %}
            // Past the end of the row the query is zero: any element of the same key will do.
            k_load_{{ i }}_{{ c }} = k_element(row, min(lane + {{ c * g.lanes }}u, K_ROW - 1u));
{% else %}
            k_load_{{ i }}_{{ c }} = k_element(row, lane + {{ c * g.lanes }}u);
{% endif %}
{% endfor %}
            if (lane == 0u{{ " && key_slot < TILE_KV" if g.key_slots > tile_kv }}) {
                rows[key_slot + {{ i }}u * KEY_SLOTS] = v_place(row);
{% if screens %}
                seen[key_slot + {{ i }}u * KEY_SLOTS] = select(0u, 0xffffffffu, is_seen);
{% endif %}
            }
        }
{% endfor %}
{% endmacro %}
    // Keys past the range are read as its last key, and get no weight.
    let last_key = item.kv_end - 1u;
    if (item.kv_begin < item.kv_end) {
{% for i in range(g.keys_per_lane) %}
        next_entry_{{ i }} = table_entry(item, min(item.kv_begin + key_slot + {{ i }}u * KEY_SLOTS, last_key));
{% endfor %}
{{ load_keys("item.kv_begin")|trim("\n") }}
    }

    var logit_max = LOGIT_FLOOR;
    var p_sum = 0.0;
    var slope = 0.0;
    if (ALIBI) {
        slope = head_slope(first_head + min(softmax_head, GROUP_SIZE - 1u));
    }
{% for h in range(group_size) %}
{% for d in v_parts %}
    var sum_{{ h }}_{{ d }} = vec4<f32>(0.0);
{% endfor %}
{% endfor %}
{% if v_row_scales %}
    // Sum of weight * minimum, which every dim of the result gets.
    var minimum_sum = 0.0;
{% endif %}
    workgroupBarrier();
{% if k_affine %}
    var q_offset = 0.0;
    if (softmax_head < GROUP_SIZE) {
        for (var quad = 0u; quad < QUADS; quad++) {
            let part = weights[softmax_head * QUADS + quad];
            q_offset += (part.x + part.y) + (part.z + part.w);
        }
{% if packed_dots %}
        if (softmax_stream == 0u) {
            {{ packed.terms(k_side) }}
        }
{% endif %}
    }
{% endif %}

    for (var tile_begin = item.kv_begin; tile_begin < item.kv_end; tile_begin += TILE_KV) {
        // Values of this tile: on their way while the scores are computed.
{% for j in range(g.stream_quads) %}
{% for e in range(4) %}
        var v_load_{{ j }}_{{ e }}: VElement;
{% if screens %}
        let is_seen_{{ j }}_{{ e }} = seen[(4u * stream + {{ 4 * j * g.streams + e }}u) % TILE_KV] != 0u;
{% endif %}
{% endfor %}
{% endfor %}
        {{ "if (stream < STREAMS) " if g.value_lanes < workgroup_size }}{
{% for j in range(g.stream_quads) %}
{% for e in range(4) %}
            v_load_{{ j }}_{{ e }} = v_at(rows[4u * stream + {{ 4 * j * g.streams + e }}u], v_idx{{ " / 2u" if g.v_halves }});
{% endfor %}
{% endfor %}
        }

        // Scores.
{% for i in range(g.keys_per_lane) %}
        {
{% for h in range(group_size) %}
            var score_{{ h }} = {{ "0i" if packed_dots else "0.0" }};
{% endfor %}
{% for c in range(g.k_loads) %}
{% if packed_dots %}
{{ packed.dots(g, group_size, c, "k_load_%d_%d"|format(i, c)) }}
{% endif %}
{% for d in k_parts if not packed_dots %}
            let k_{{ c }}_{{ d }} = k_dims_{{ d }}(k_load_{{ i }}_{{ c }});
{% for h in range(group_size) %}
            score_{{ h }} = fma_dot(tile[{{ h }}u * Q_ROW + {% if g.q_interleaved %}lane + {{ g.lanes * (c * g.k_dims + d) // 4 }}u{% else %}lane * {{ g.k_dims // 4 }}u + {{ (c * g.lanes * g.k_dims + d) // 4 }}u{% endif %}], k_{{ c }}_{{ d }}, score_{{ h }});
{% endfor %}
{% endfor %}
{% endfor %}
{% for distance in [1, 2, 4] if distance < g.butterfly %}
{% for h in range(group_size) %}
            score_{{ h }} += subgroupShuffleXor(score_{{ h }}, {{ distance }}u);
{% endfor %}
{% endfor %}
            let logit = lane / BUTTERFLY * GROUP_SIZE * LOGITS_ROW + key_slot + {{ i }}u * KEY_SLOTS;
            {{ "if (key_slot < TILE_KV) " if g.key_slots > tile_kv }}{
{% if g.butterfly == 1 %}
{% for h in range(group_size) %}
                logits[logit + {{ h }}u * LOGITS_ROW] = {{ "f32(score_%d)"|format(h) if packed_dots else "score_%d"|format(h) }};
{% endfor %}
{% else %}
                // Each lane holds all the sums: every one writes another head's.
                let writer = lane % BUTTERFLY;
{% for base in range(0, group_size, g.writers) %}
                if (writer < {{ [g.writers, group_size - base]|min }}u) {
                    logits[logit + (writer + {{ base }}u) * LOGITS_ROW] = {{ "f32(vec4<i32>(" if packed_dots else "vec4<f32>(" }}{% for w in range(4) %}score_{{ [base + [w, g.writers - 1]|min, group_size - 1]|min }}{{ ", " if not loop.last }}{% endfor %})[writer]{{ ")" if packed_dots }};
                }
{% endfor %}
{% endif %}
            }
{% if k_row_scales or v_row_scales %}
            if (lane == 0u{{ " && key_slot < TILE_KV" if g.key_slots > tile_kv }}) {
{% for s, has in scaled if has %}
                {{ s.name }}_scales[key_slot + {{ i }}u * KEY_SLOTS] = {{ s.name }}_scale_{{ i }};
{% endfor %}
            }
{% endif %}
        }
{% endfor %}
        workgroupBarrier();

        // Keys of the next tile: on their way until its scores.
        if (item.kv_end - tile_begin > TILE_KV) {
{{ load_keys("tile_begin + TILE_KV")|trim("\n")|indent(4, true) }}
        }

        // Softmax.
        if (softmax_head < GROUP_SIZE) {
            var new_max = logit_max;
{% for j in range(g.stream_quads) %}
            let quad_{{ j }} = softmax_stream + {{ j * g.streams }}u;
            let logits_{{ j }} = tile_logits(item, softmax_head, quad_{{ j }}, tile_begin, slope{{ ", q_offset" if has_q_offset }});
            new_max = max(new_max, max(max(logits_{{ j }}.x, logits_{{ j }}.y), max(logits_{{ j }}.z, logits_{{ j }}.w)));
{% endfor %}
            let factor = exp2(logit_max - new_max);
            logit_max = new_max;
            p_sum *= factor;
{% if v_row_scales %}
            minimum_sum *= factor;
{% endif %}
            rescale[softmax_stream * GROUP_SIZE + softmax_head] = factor;
{% for j in range(g.stream_quads) %}
            let p_{{ j }} = weights_of(logits_{{ j }}, vec4<f32>(new_max));
            p_sum += (p_{{ j }}.x + p_{{ j }}.y) + (p_{{ j }}.z + p_{{ j }}.w);
{% if v_row_scales %}
            let v_words_{{ j }} = v_quad_words(quad_{{ j }});
            minimum_sum = fma_dot(p_{{ j }}, minima_of(v_words_{{ j }}), minimum_sum);
            weights[softmax_head * QUADS + quad_{{ j }}] = p_{{ j }} * scales_of(v_words_{{ j }});
{% else %}
            weights[softmax_head * QUADS + quad_{{ j }}] = p_{{ j }};
{% endif %}
{% endfor %}
        }
        workgroupBarrier();

        // Values.
        {{ "if (stream < STREAMS) " if g.value_lanes < workgroup_size }}{
{% for h in range(group_size) %}
            let factor_{{ h }} = rescale[stream * GROUP_SIZE + {{ h }}u];
{% for d in v_parts %}
            sum_{{ h }}_{{ d }} *= factor_{{ h }};
{% endfor %}
{% endfor %}
{% for j in range(g.stream_quads) %}
            {
{% for e in range(4) %}
{% if screens %}
                let v_{{ e }} = select(VElement(), v_load_{{ j }}_{{ e }}, is_seen_{{ j }}_{{ e }});
{% endif %}
{% for d in v_parts %}
                let v_{{ e }}_{{ d }} = v_dims_{{ d }}({{ "v_%d"|format(e) if screens else "v_load_%d_%d"|format(j, e) }}{{ " >> (v_idx % 2u * 4u)" if g.v_halves }});
{% endfor %}
{% endfor %}
{% for h in range(group_size) %}
                let p_{{ h }} = weights[{{ h * g.quads + j * g.streams }}u + stream];
{% for e in range(4) %}
{% for d in v_parts %}
                sum_{{ h }}_{{ d }} = fma(vec4<f32>(p_{{ h }}.{{ "xyzw"[e] }}), v_{{ e }}_{{ d }}, sum_{{ h }}_{{ d }});
{% endfor %}
{% endfor %}
{% endfor %}
            }
{% endfor %}
        }
    }

    // Merge the streams: first the weight of each, then their weighted sums, some heads at a time.
    if (softmax_head < GROUP_SIZE) {
        logits[local_idx] = logit_max;
        logits[GROUP_SIZE * STREAMS + local_idx] = p_sum;
{% if v_row_scales %}
        logits[2u * GROUP_SIZE * STREAMS + local_idx] = minimum_sum;
{% endif %}
    }
    workgroupBarrier();
    let is_split = item.part_row != NO_PARTIAL;
    if (local_idx < GROUP_SIZE) {
        let q_head = first_head + local_idx;
        var item_max = LOGIT_FLOOR;
        for (var s = 0u; s < STREAMS; s++) {
            item_max = max(item_max, logits[local_idx * STREAMS + s]);
        }
        var item_sum = 0.0;
        for (var s = 0u; s < STREAMS; s++) {
            let weight = exp2(logits[local_idx * STREAMS + s] - item_max);
            item_sum = fma(logits[(GROUP_SIZE + local_idx) * STREAMS + s], weight, item_sum);
            rescale[s * GROUP_SIZE + local_idx] = weight;
        }
        if (is_split) {
            partials[(item.part_row + q_head + 1u) * (VALUE_VEC4S + 1u) - 1u] = vec4<f32>(item_max, item_sum, 0.0, 0.0);
        } else {
{% if sinks %}
            let joined = with_sink(item_max, item_sum, head_sink(q_head));
            item_max = joined.x;
            item_sum = joined.y;
            logits[local_idx * STREAMS] = joined.z;
{% endif %}
            // Nobody else reads what this head's streams left here.
            logits[(GROUP_SIZE + local_idx) * STREAMS] = inverse_sum(item_sum);
{% if lse %}
            lse[item.query_start * NUM_Q_HEADS + q_head] = natural_lse(item_max, item_sum);
{% endif %}
        }
{% if v_row_scales %}
        var item_minimum = 0.0;
        for (var s = 0u; s < STREAMS; s++) {
            item_minimum = fma(logits[(2u * GROUP_SIZE + local_idx) * STREAMS + s], rescale[s * GROUP_SIZE + local_idx], item_minimum);
        }
        logits[3u * GROUP_SIZE * STREAMS + local_idx] = item_minimum;
{% endif %}
    }
    workgroupBarrier();
{% for base in range(0, group_size, g.merge_heads) %}
{% set heads = [g.merge_heads, group_size - base]|min %}
    {{ "if (stream < STREAMS) " if g.value_lanes < workgroup_size }}{
{% for h in range(base, base + heads) %}
{% for d in v_parts %}
        tile[({{ h - base }}u * STREAMS + stream) * VALUE_VEC4S + v_idx * {{ g.v_dims // 4 }}u + {{ d // 4 }}u] = sum_{{ h }}_{{ d }} * rescale[stream * GROUP_SIZE + {{ h }}u];
{% endfor %}
{% endfor %}
    }
    workgroupBarrier();
    for (var i = local_idx; i < {{ heads }}u * VALUE_VEC4S; i += WORKGROUP_SIZE) {
        let head = i / VALUE_VEC4S;
        let d = i % VALUE_VEC4S;
        var sum = vec4<f32>({{ "logits[%du * STREAMS + %du + head]"|format(3 * group_size, base) if v_row_scales else "0.0" }});
        for (var s = 0u; s < STREAMS; s++) {
            sum += tile[(head * STREAMS + s) * VALUE_VEC4S + d];
        }
        let q_head = first_head + {{ base }}u + head;
        if (is_split) {
            partials[(item.part_row + q_head) * (VALUE_VEC4S + 1u) + d] = sum;
        } else {
            store_out(out_begin(item.query_start * NUM_Q_HEADS + q_head) + d, sum{{ " * logits[(%du + head) * STREAMS]"|format(base) if sinks }} * logits[({{ group_size + base }}u + head) * STREAMS]);
        }
    }
{% if not loop.last %}
    workgroupBarrier();
{% endif %}
{% endfor %}
}
