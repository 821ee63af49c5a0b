{#
What the stored codes of the 8-bit and 4-bit formats mean: macros of functions over the four bytes of a word, the lowest one first. An Int4
word has the codes of eight elements: the first four in the low halves of its bytes, the other four in the high halves.
#}

{# CPUs have an instruction for signed integers only; GPUs convert a byte of a word at once, but no half of one. #}
{% macro byte_floats() %}
// The bytes of a word.
fn byte_floats(word: u32) -> vec4<f32> {
    return vec4<f32>({{ "vec4<i32>" if profile == "cpu" }}((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u)));
}
{% endmacro %}

{% macro nibble_floats() %}
// The low halves of the bytes of a word.
fn nibble_floats(word: u32) -> vec4<f32> {
{% if profile == "cpu" %}
    return vec4<f32>(vec4<i32>((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(15u)));
{% else %}
    return vec4<f32>((vec4<u32>(word & 0x0f0f0f0fu) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u));
{% endif %}
}
{% endmacro %}

{# The functions that give elements, or their codes, of these formats. #}
{% macro float_functions(formats) %}
{{ e4m3_floats() if "e4m3" in formats }}
{{- byte_floats() if "int8" in formats or "int8_channel" in formats }}
{{- nibble_floats() if "int4" in formats or "int4_channel" in formats }}
{%- endmacro %}

{% macro e4m3_floats() %}
// Four E4M3 numbers. Exponent and mantissa move to their places in an f32; below 2^-6 that gives 2^-7 + x / 2 instead of x. Adapters may
// flush subnormal f32s and halves, so none is ever made. NaN is made by integers, which no compiler takes to be impossible.
fn e4m3_floats(word: u32) -> vec4<f32> {
    let codes = vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u);
    let magnitude = codes & vec4<u32>(0x7fu);
    let widened = bitcast<vec4<f32>>((magnitude << vec4<u32>(20u)) + vec4<u32>(0x3c000000u));
    // The second is the smaller one below 2^-6 only.
    let value = min(widened, 2.0 * widened - 0.015625);
    let bits = select(bitcast<vec4<u32>>(value), vec4<u32>(0x7fc00000u), magnitude == vec4<u32>(0x7fu));
    return bitcast<vec4<f32>>(bits | ((codes & vec4<u32>(0x80u)) << vec4<u32>(24u)));
}
{% endmacro %}

{% macro e4m3_bits() %}
// Nearest E4M3, ties to even; finite values saturate at 448, infinities and NaN become NaN. Done with integers, as in half_bits.
fn e4m3_bits(x: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let magnitude = bits & vec4<u32>(0x7fffffffu);
    let rounded = magnitude + vec4<u32>(0x7ffffu) + ((magnitude >> vec4<u32>(20u)) & vec4<u32>(1u));
    let normal = min((rounded - vec4<u32>(0x3c000000u)) >> vec4<u32>(20u), vec4<u32>(0x7eu));
    // Below 2^-6 codes are multiples of 2^-9: the significand times 2^(exponent - 141). At a shift of 31 nothing is left of it.
    let significand = (magnitude & vec4<u32>(0x7fffffu)) | vec4<u32>(0x800000u);
    let shift = clamp(vec4<u32>(141u) - min(magnitude >> vec4<u32>(23u), vec4<u32>(120u)), vec4<u32>(21u), vec4<u32>(31u));
    let odd = (significand >> shift) & vec4<u32>(1u);
    let subnormal = (significand + (vec4<u32>(1u) << (shift - vec4<u32>(1u))) - vec4<u32>(1u) + odd) >> shift;
    var code = select(normal, subnormal, magnitude < vec4<u32>(0x3c800000u));
    code = select(code, vec4<u32>(0x7fu), magnitude >= vec4<u32>(0x7f800000u));
    return code | ((bits >> vec4<u32>(24u)) & vec4<u32>(0x80u));
}
{% endmacro %}

{% macro byte_word() %}
// The word of four bytes.
fn byte_word(bytes: vec4<u32>) -> u32 {
    return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}
{% endmacro %}

{% macro affine_codes() %}
// Codes 0 to `levels` of x = minimum + scale * code; 0 where the scale is 0. In halves, because a difference of finite numbers may
// overflow. The last min is for NaN, which clamps to anything.
fn affine_codes(x: vec4<f32>, scale: vec4<f32>, minimum: vec4<f32>, levels: u32) -> vec4<u32> {
    let quotients = (0.5 * x - 0.5 * minimum) / (0.5 * scale);
    let codes = vec4<u32>(clamp(floor(quotients + 0.5), vec4<f32>(0.0), vec4<f32>(f32(levels))));
    return min(select(codes, vec4<u32>(0u), scale == vec4<f32>(0.0)), vec4<u32>(levels));
}
{% endmacro %}

{% macro affine_values() %}
// What the codes stand for. In halves, because scale * code may overflow where the sum does not.
fn affine_values(codes: vec4<f32>, scale: vec4<f32>, minimum: vec4<f32>) -> vec4<f32> {
    return 2.0 * (0.5 * minimum + (0.5 * scale) * codes);
}
{% endmacro %}

{% macro row_ranges() %}
// Numbers in the order of their values, infinities and NaNs outside of all others. Integers keep what min and max of floats may lose: NaN,
// and subnormals.
fn in_order(x: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(x);
    return bits ^ (vec4<u32>(bitcast<vec4<i32>>(bits) >> vec4<u32>(31u)) | vec4<u32>(0x80000000u));
}

// Smallest and largest of eight elements, in order.
fn vec8_range(lo: vec4<f32>, hi: vec4<f32>) -> vec2<u32> {
    let a = in_order(lo);
    let b = in_order(hi);
    let minimum = min(a, b);
    let most = max(a, b);
    return vec2<u32>(min(min(minimum.x, minimum.y), min(minimum.z, minimum.w)), max(max(most.x, most.y), max(most.z, most.w)));
}

fn bits_of_order(key: u32) -> u32 {
    return select(~key, key ^ 0x80000000u, key >= 0x80000000u);
}

// Scale (lower half) and minimum (upper half) of a row of this range, as bfloat16. The minimum is rounded down and the scale up, so
// that codes 0 to `levels` cover the range; an infinity or NaN makes the minimum NaN, and so all of the row.
fn row_pair(range: vec2<u32>, levels: f32) -> u32 {
    // Beyond 1.9609375 * 2^127 values saturate: the codes of the widest row then stand for finite numbers, whatever is rounded.
    let minimum_bits = bits_of_order(clamp(range.x, 0x0084ffffu, 0xff7b0000u));
    let most = bitcast<f32>(bits_of_order(clamp(range.y, 0x0084ffffu, 0xff7b0000u)));
    let minimum = select(minimum_bits, minimum_bits + 0xffffu, minimum_bits >= 0x80000000u) & 0xffff0000u;
    // Below 2^-118 half a scale, and half a scale, come near the subnormal numbers, which adapters may flush.
    let exact = max((0.5 * most - 0.5 * bitcast<f32>(minimum)) * (2.0 / levels), 0x1p-118f);
    // What is less than 2^-20 above a bfloat16 counts as it, so that no rounding on the way here doubles the error of rounding up.
    let scale = exact - exact * 0x1p-20f;
    let finite = range.x > 0x007fffffu && range.y < 0xff800000u;
    return ((bitcast<u32>(scale) + 0xffffu) >> 16u) | select(0x7fc00000u, minimum, finite);
}
{% endmacro %}
