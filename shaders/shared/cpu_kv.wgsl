{#
How K and V elements are loaded and widened; imported by the CPU kernels. The geometry chooses the types that they are loaded as; a new
format adds its types there and a case to `widen` here.
#}
{% import "shared/kv_codes.wgsl" as codes %}
{# Word n of the loaded value x: of type "words", the variable `x`_{n}. #}
{% macro word_of(type, x, n) %}
{% if type == "words" %}{{ x }}_{{ n }}{% else %}
    {%- set long = "u64" in type -%}
    {%- set component = n // 2 if long else n -%}
    {%- set part = x ~ "." ~ "xyzw"[component] if "vec" in type else x -%}
    {%- if long -%} u32({{ part }}{{ " >> 32u" if n % 2 }}) {%- else -%} {{ part }} {%- endif -%}
{% endif %}
{% endmacro %}

{# Elements 4*i .. 4*i+4 of the loaded value x, as a vec4<f32>: of formats with scales, their codes. #}
{% macro widen(format, type, x, i) %}
    {%- set pair = [["x", "y"], ["z", "w"]][i % 2] -%}
    {%- if format == "f32" and int64 %}f32_from_u64({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
    {%- elif format == "f32" %}{{ x }}
    {%- elif format == "f16" and int64 %}f16_from_u64({{ x }}.{{ "xyzw"[i] }})
    {%- elif format == "f16" %}f16_from_u32({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
    {%- elif format == "e4m3" %}e4m3_floats({{ word_of(type, x, i) }})
    {%- elif format in ["int8", "int8_channel"] %}byte_floats({{ word_of(type, x, i) }})
    {%- else %}nibble_floats({{ word_of(type, x, i // 2) }}{{ " >> 4u" if i % 2 }})
    {%- endif -%}
{% endmacro %}

{# The functions that `widen` calls. #}
{% macro functions() %}
{% if int64 and "f32" in [k_format, v_format] %}

fn f32_from_u64(a: u64, b: u64) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(u32(a), u32(a >> 32u), u32(b), u32(b >> 32u)));
}
{% endif %}
{% if int64 and "f16" in [k_format, v_format] %}

fn f16_from_u64(a: u64) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(u32(a)), unpack2x16float(u32(a >> 32u)));
}
{% endif %}
{% if not int64 and "f16" in [k_format, v_format] %}

fn f16_from_u32(a: u32, b: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(a), unpack2x16float(b));
}
{% endif %}

{{ codes.float_functions([k_format, v_format]) }}
{%- endmacro %}
