{# Whole-row access to one side of the cache, 8 elements (a chunk) at a time. A format says what the buffer is made of, and how a chunk is
   written and read. #}
{% import "shared/kv_side.wgsl" as sides %}

{% macro element_type(format) %}
{%- if format == "f32" -%} vec4<f32> {%- else -%} vec4<u32> {%- endif -%}
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

{% macro store(side) %}
// Writes elements 8 * chunk .. 8 * chunk + 8 of a row of {{ side.name|upper }}.
fn store_{{ side.name }}(row: u32, chunk: u32, lo: vec4<f32>, hi: vec4<f32>) {
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
{% if side.format == "f32" %}
  let at = {{ sides.row_start(side, local, 16) }} + 2u * chunk;
  {{ cache }}[at] = lo;
  {{ cache }}[at + 1u] = hi;
{% else %}
  {{ cache }}[{{ sides.row_start(side, local, 16) }} + chunk] =
    vec4<u32>(half_pair(lo.x, lo.y), half_pair(lo.z, lo.w), half_pair(hi.x, hi.y), half_pair(hi.z, hi.w));
{% endif %}
  return;
{%- endcall %}
}
{% endmacro %}

{% macro load(side) %}
// Reads elements 8 * chunk .. 8 * chunk + 8 of a row of {{ side.name|upper }}.
fn load_{{ side.name }}(row: u32, chunk: u32) -> Chunk {
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
{% if side.format == "f32" %}
  let at = {{ sides.row_start(side, local, 16) }} + 2u * chunk;
  return Chunk({{ cache }}[at], {{ cache }}[at + 1u]);
{% else %}
  let x = {{ cache }}[{{ sides.row_start(side, local, 16) }} + chunk];
  return Chunk(
    vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y)),
    vec4<f32>(unpack2x16float(x.z), unpack2x16float(x.w)));
{% endif %}
{%- endcall %}
}
{% endmacro %}
