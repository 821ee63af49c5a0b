{#
Queries as codes, for packed integer dot products with the codes of K. A query of a token and head, times all factors of a score, is about
q_step * codes, with codes of -127 to 127. The sums of products are exact: at most 127 * 128 * head_dim, below 2^24 to head_dim 1024.

A key is minimum + scale * CENTRE + scale * (code - CENTRE), with the code in the middle of the range for CENTRE. Codes of the query are multiplied
with code - CENTRE only, which is as small as it can be, and with it what quantising costs; the rest is multiplied with the query as it was.
#}

{% import "shared/kv_codes.wgsl" as codes %}

{% macro declare(g) %}
// [GROUP_SIZE, Q_CODES_ROW] codes of the queries, bytes of words
var<workgroup> q_codes: array<{{ g.q_codes_type }}, {{ g.q_codes_len }}>;
// [GROUP_SIZE] of each head: q_step; what is added to q_step * products before the scale of the row; what the minimum of the row is multiplied by
var<workgroup> q_terms: array<vec4<f32>, {{ g.q_terms_len }}>;
{%- endmacro %}

{% macro functions(k_side) %}
// The code in the middle of the range of K's.
const CENTRE: f32 = {{ k_side.centre }}.0;
const Q_CODES_ROW: u32 = {{ geometry.q_codes_row }}u;

// The largest magnitude of a head's scaled query, from its QUADS parts.
fn largest_of_query(head: u32) -> u32 {
    var largest = 0u;
    for (var part = 0u; part < QUADS; part++) {
        largest = max(largest, bitcast<u32>(logits[head * QUADS + part]));
    }
    return largest;
}

// What a code of a query stands for. A query with an infinity or NaN has NaN, made by integers, which no compiler takes to be impossible.
fn step_of_query(largest: u32) -> f32 {
    let step = bitcast<u32>(bitcast<f32>(largest) / 127.0);
    return bitcast<f32>(select(step, 0x7fc00000u, largest >= 0x7f800000u));
}

// Codes per quarter of what elements are multiplied with: a quarter, because division is exact to some ulp for divisors up to 2^126 only. Below
// 2^-116 all codes are 0, so that neither this overflows nor q_step is flushed.
fn codes_per_quarter(largest: u32) -> f32 {
    let is_normal = largest >= 0x05800000u && largest < 0x7f800000u;
    return select(0.0, 127.0 / (0.25 * bitcast<f32>(select(0x3f800000u, largest, is_normal))), is_normal);
}

{{ codes.byte_word() }}
// Codes of four elements. What is no number becomes some code.
fn query_codes(x: vec4<f32>, per_quarter: f32) -> u32 {
    let is_finite = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) < vec4<u32>(0x7f800000u);
    let codes = round(0.25 * select(vec4<f32>(0.0), x, is_finite) * per_quarter);
    return byte_word(bitcast<vec4<u32>>(vec4<i32>(clamp(codes, vec4<f32>(-127.0), vec4<f32>(127.0)))) & vec4<u32>(255u));
}
{% if k_side.levels == 15 %}

// Sum of a head's codes.
fn sum_of_codes(head: u32) -> f32 {
    var sum = 0i;
    for (var i = 0u; i < Q_CODES_ROW; i++) {
        let codes = q_codes[head * Q_CODES_ROW + i];
{% for w in range(geometry.q_code_words) %}
        sum += dot4I8Packed(codes.{{ "xyzw"[w] }}, 0x01010101u);
{% endfor %}
    }
    return f32(sum);
}
{% endif %}
{% endmacro %}

{# Four elements of a query, times all factors of a score. #}
{% macro scaled(q, dim, k_channel_scales) -%}
    {{ q }} * params.qk_scale{{ " * k_channels(0u, kv_head, %s)"|format(dim) if k_channel_scales }}
{%- endmacro %}

{# Their magnitudes, as integers that are in the same order, NaN behind all. #}
{% macro magnitudes(q, dim, k_channel_scales) -%}
    bitcast<vec4<u32>>({{ scaled(q, dim, k_channel_scales) }}) & vec4<u32>(0x7fffffffu)
{%- endmacro %}

{# Fills q_codes: a head's elements as the lanes of a key read them, lane by lane for each element of K, then each of q_code_words. #}
{% macro quantise(g, k_channel_scales) %}
{% set k_codes = g.k_dims // 4 // g.q_code_words %}
    for (var i = local_idx; i < GROUP_SIZE * Q_CODES_ROW; i += WORKGROUP_SIZE) {
        let place = i % Q_CODES_ROW;
        let element = place / {{ g.lanes * k_codes }}u * LANES + place % LANES;
        let first = element * {{ g.k_dims // 4 }}u{{ " + place / LANES %% %du * 4u"|format(k_codes) if k_codes > 1 }};
        let head = q_begin(item.query_start * NUM_Q_HEADS + first_head + i / Q_CODES_ROW);
        let per_quarter = codes_per_quarter(largest_of_query(i / Q_CODES_ROW));
        // Past the end of the row codes are 0.
{% for w in range(g.q_code_words) %}
        let at_{{ w }} = min(first + {{ w }}u, HEAD_VEC4S - 1u);
        let codes_{{ w }} = query_codes({{ scaled("load_q(head + at_%d)"|format(w), "4u * at_%d"|format(w), k_channel_scales) }}, per_quarter);
{% endfor %}
        q_codes[i] = {{ g.q_codes_type }}(
            {%- for w in range(g.q_code_words) %}select(0u, codes_{{ w }}, first + {{ w }}u < HEAD_VEC4S){{ ", " if not loop.last }}{% endfor %});
    }
{%- endmacro %}

{#
Sets q_terms of softmax_head. q_offset is the sum of the query, or where scales are per channel, its product with minimum + scale * CENTRE. Codes of
Int4 are multiplied as they are, 0 to 15, so that CENTRE times the sum of the query's codes is to be taken off.
#}
{% macro terms(k_side) %}
let middle = {{ "CENTRE * q_offset" if k_side.row_scales else "q_offset" }}{{ " - q_step * (CENTRE * sum_of_codes(softmax_head))" if k_side.levels == 15 }};
            q_terms[softmax_head] = vec4<f32>(q_step, middle, q_offset, 0.0);
{%- endmacro %}

{# Adds the products of an element of K with all heads to score_0, score_1, ... #}
{% macro dots(g, group_size, c, load) %}
{% set words = g.q_code_words %}
{% set k_codes = g.k_dims // 4 // words %}
{% for p in range(k_codes) %}
{% for w in range(words) %}
            let k_{{ c }}_{{ p }}_{{ w }} = k_codes_{{ 4 * (p * words + w) }}({{ load }});
{% endfor %}
{% for h in range(group_size) %}
            let q_{{ c }}_{{ p }}_{{ h }} = q_codes[lane + {{ h * g.q_codes_row + (c * k_codes + p) * g.lanes }}u];
{% for w in range(words) %}
            score_{{ h }} += dot4I8Packed(q_{{ c }}_{{ p }}_{{ h }}.{{ "xyzw"[w] }}, k_{{ c }}_{{ p }}_{{ w }});
{% endfor %}
{% endfor %}
{% endfor %}
{%- endmacro %}
