{# Whole-row access to one side of the cache, 8 elements (a Vec8) at a time. A format says what the buffer is made of, and how a Vec8 is
   written and read. #}
{% import "shared/kv_side.wgsl" as sides %}
{% import "shared/kv_codes.wgsl" as codes %}

{# Vec8s of the small formats are written by different invocations, and writing a part of a vector may write all of it: hence words. #}
{% macro element_type(format) %}
{%- if format == "f32" -%} vec4<f32> {%- elif format == "f16" -%} vec4<u32> {%- else -%} u32 {%- endif -%}
{% endmacro %}

{% macro f16_functions() %}
// Nearest half, ties to even; finite values saturate at 65504, infinities and NaN stay what they are. Done with integers, because
// pack2x16float rounds as the driver likes and is undefined beyond the range.
fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    // Below 2^-14 halves are multiples of 2^-24, which is the last place of an f32 at 0.5: adding 0.5 rounds there.
    let subnormal = bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u;
    let rounded = magnitude + 0xfffu + ((magnitude >> 13u) & 1u);
    let normal = min((rounded - 0x38000000u) >> 13u, 0x7bffu);
    var half = select(normal, subnormal, magnitude < 0x38800000u);
    half = select(half, 0x7c00u, magnitude == 0x7f800000u);
    half = select(half, 0x7e00u, magnitude > 0x7f800000u);
    return sign | half;
}

fn half_pair(even: f32, odd: f32) -> u32 {
    return half_bits(even) | (half_bits(odd) << 16u);
}
{% endmacro %}

{# The functions that `store` calls, for sides of these formats. #}
{% macro store_functions(formats) %}
{{ f16_functions() if "f16" in formats }}
{%- set small = formats | reject("in", ["f32", "f16"]) | list %}
{{ codes.byte_word() if small }}
{{ codes.e4m3_bits() if "e4m3" in formats }}
{{ codes.affine_codes() if small | reject("eq", "e4m3") | list }}
{{ codes.row_ranges() if "int8" in formats or "int4" in formats }}
{%- endmacro %}

{# The functions that `load` calls. #}
{% macro load_functions(formats) %}
{%- set small = formats | reject("in", ["f32", "f16"]) | list %}
{{ codes.float_functions(formats) }}
{{ codes.affine_values() if small | reject("eq", "e4m3") | list }}
{%- endmacro %}

{# Declares lo and hi of `x`, a scale or minimum of each element of a Vec8. #}
{% macro scale_of_vec8(side, x, plane) %}
{% if side.row_scales %}
    let {{ x }}_lo = vec4<f32>(pair[{{ plane }}]);
    let {{ x }}_hi = {{ x }}_lo;
{% else %}
    let {{ x }}_lo = {{ side.name }}_channels({{ plane }}u, kv_head, 8u * vec8_idx);
    let {{ x }}_hi = {{ side.name }}_channels({{ plane }}u, kv_head, 8u * vec8_idx + 4u);
{% endif %}
{% endmacro %}

{% macro store(side) %}
{% if side.channel_scales %}
{{ sides.channel_function(side, element_type(side.format), num_kv_heads) }}
{% endif %}
// Writes elements 8 * vec8_idx .. 8 * vec8_idx + 8 of a row of {{ side.name|upper }}
{%- if side.row_scales %}, whose scale and minimum are `row_pair`{% endif %}.
fn store_{{ side.name }}(row: u32, vec8_idx: u32, lo: vec4<f32>, hi: vec4<f32>{{ ", row_pair: u32" if side.row_scales }}) {
{% if side.row_scales %}
    let pair = {{ sides.scale_pair("row_pair") }};
{% elif side.channel_scales %}
    let kv_head = row / BLOCK_SIZE % NUM_KV_HEADS;
{% endif %}
{% if side.row_scales or side.channel_scales %}
{{ scale_of_vec8(side, "scale", 0) }}
{{- scale_of_vec8(side, "minimum", 1) }}
    let codes_lo = affine_codes(lo, scale_lo, minimum_lo, {{ side.levels }}u);
    let codes_hi = affine_codes(hi, scale_hi, minimum_hi, {{ side.levels }}u);
{% elif side.format == "e4m3" %}
    let codes_lo = e4m3_bits(lo);
    let codes_hi = e4m3_bits(hi);
{% endif %}
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
{% if side.format == "f32" %}
    let at = {{ sides.row_start(side, local, 16) }} + 2u * vec8_idx;
    {{ cache }}[at] = lo;
    {{ cache }}[at + 1u] = hi;
{% elif side.format == "f16" %}
    {{ cache }}[{{ sides.row_start(side, local, 16) }} + vec8_idx] =
        vec4<u32>(half_pair(lo.x, lo.y), half_pair(lo.z, lo.w), half_pair(hi.x, hi.y), half_pair(hi.z, hi.w));
{% elif side.format in ["int4", "int4_channel"] %}
    {{ cache }}[{{ sides.row_start(side, local, 4) }} + vec8_idx] = byte_word(codes_lo) | (byte_word(codes_hi) << 4u);
{% else %}
    let at = {{ sides.row_start(side, local, 4) }} + 2u * vec8_idx;
    {{ cache }}[at] = byte_word(codes_lo);
    {{ cache }}[at + 1u] = byte_word(codes_hi);
{% endif %}
{% if side.row_scales %}
    if (vec8_idx == 0u) {
        {{ cache }}[{{ sides.scale_word(side, local) }}] = row_pair;
    }
{% endif %}
    return;
{%- endcall %}
}
{% endmacro %}

{% macro load(side) %}
{% if side.row_scales %}
{{ sides.row_scale_function(side, element_type(side.format)) }}
{% elif side.channel_scales %}
{{ sides.channel_function(side, element_type(side.format), num_kv_heads) }}
{% endif %}
// Reads elements 8 * vec8_idx .. 8 * vec8_idx + 8 of a row of {{ side.name|upper }}.
fn load_{{ side.name }}(row: u32, vec8_idx: u32) -> Vec8 {
{% if side.row_scales %}
    let pair = {{ side.name }}_row_scale(row);
{% elif side.channel_scales %}
    let kv_head = row / BLOCK_SIZE % NUM_KV_HEADS;
{% endif %}
{% if side.row_scales or side.channel_scales %}
{{ scale_of_vec8(side, "scale", 0) }}
{{- scale_of_vec8(side, "minimum", 1) }}
{% endif %}
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
{% if side.format == "f32" %}
    let at = {{ sides.row_start(side, local, 16) }} + 2u * vec8_idx;
    return Vec8({{ cache }}[at], {{ cache }}[at + 1u]);
{% elif side.format == "f16" %}
    let x = {{ cache }}[{{ sides.row_start(side, local, 16) }} + vec8_idx];
    return Vec8(
        vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y)),
        vec4<f32>(unpack2x16float(x.z), unpack2x16float(x.w)));
{% elif side.format == "e4m3" %}
    let at = {{ sides.row_start(side, local, 4) }} + 2u * vec8_idx;
    return Vec8(e4m3_floats({{ cache }}[at]), e4m3_floats({{ cache }}[at + 1u]));
{% elif side.format in ["int4", "int4_channel"] %}
    let x = {{ cache }}[{{ sides.row_start(side, local, 4) }} + vec8_idx];
    return Vec8(
        affine_values(nibble_floats(x), scale_lo, minimum_lo),
        affine_values(nibble_floats(x >> 4u), scale_hi, minimum_hi));
{% else %}
    let at = {{ sides.row_start(side, local, 4) }} + 2u * vec8_idx;
    return Vec8(
        affine_values(byte_floats({{ cache }}[at]), scale_lo, minimum_lo),
        affine_values(byte_floats({{ cache }}[at + 1u]), scale_hi, minimum_hi));
{% endif %}
{%- endcall %}
}
{% endmacro %}
