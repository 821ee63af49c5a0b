{#
How K and V elements are loaded and widened; imported by the CPU kernels.

A load costs llvmpipe one serial insert (some 17 cycles) per lane and component, whatever the component's width: hence the widest
components that the device has (64 bits), as many of them in one load as divide the row, and no loads in lanes beyond the row.
A new format adds its load types here and a case to `widen`.
#}
{% set load_types = {
    "f32": [("vec4<u64>", 8)] if int64 else [("vec4<f32>", 4)],
    "f16": [("vec4<u64>", 16), ("vec2<u64>", 8)] if int64 else [("vec4<u32>", 8)],
} %}
{% set k = namespace() %}
{% set v = namespace() %}
{# The first, widest type that divides a row; `dims` is the number of elements in one load. #}
{% for type, dims in load_types[k_format] | reverse if head_dim % dims == 0 %}
    {% set k.type = type %}{% set k.dims = dims %}
{% endfor %}
{% for type, dims in load_types[v_format] | reverse if head_dim % dims == 0 %}
    {% set v.type = type %}{% set v.dims = dims %}
{% endfor %}
{% set k_type = k.type %}
{% set k_dims = k.dims %}
{% set v_type = v.type %}
{% set v_dims = v.dims %}

{# Elements 4*i .. 4*i+4 of the loaded value x, as a vec4<f32>. #}
{% macro widen(format, x, i) %}
    {%- set pair = [["x", "y"], ["z", "w"]][i % 2] -%}
    {%- if format == "f32" and int64 %}f32_from_u64({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
    {%- elif format == "f32" %}{{ x }}
    {%- elif int64 %}f16_from_u64({{ x }}.{{ "xyzw"[i] }})
    {%- else %}f16_from_u32({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
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
{% endmacro %}
