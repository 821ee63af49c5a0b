{#
How K and V elements are loaded and widened; imported by the CPU kernels.

A load costs llvmpipe one serial insert (some 17 cycles) per lane and component, whatever the component's width: hence the widest
components that the device has (64 bits), and no loads in lanes beyond the row. Of the types whose elements divide a row, the one is
taken that costs the fewest components per lane for `load_keys` rows (the importer's) shared by `load_lanes` lanes, and the widest of these.
A new format adds its load types here and a case to `widen`. Elements of formats with padded blocks have at most 16 bytes, which
divide a block.
#}
{% import "shared/kv_codes.wgsl" as codes %}
{# Type, elements and components of a load. #}
{% set bytes = [("vec2<u64>", 16, 2), ("u64", 8, 1)] if int64 else [("vec4<u32>", 16, 4), ("vec2<u32>", 8, 2)] %}
{% set nibbles = [("vec2<u64>", 32, 2), ("u64", 16, 1), ("u32", 8, 1)] if int64 else [("vec4<u32>", 32, 4), ("vec2<u32>", 16, 2), ("u32", 8, 1)] %}
{% set load_types = {
    "f32": [("vec4<u64>", 8, 4)] if int64 else [("vec4<f32>", 4, 4)],
    "f16": [("vec4<u64>", 16, 4), ("vec2<u64>", 8, 2)] if int64 else [("vec4<u32>", 8, 4)],
    "e4m3": bytes,
    "int8": bytes,
    "int8_channel": bytes,
    "int4": nibbles,
    "int4_channel": nibbles,
} %}
{% set k = namespace(cost=0) %}
{% set v = namespace(cost=0) %}
{% for side, format in [(k, k_format), (v, v_format)] %}
{% for type, dims, components in load_types[format] if head_dim % dims == 0 %}
    {% set cost = (load_keys * head_dim // dims + load_lanes - 1) // load_lanes * components %}
    {% if not side.cost or cost < side.cost %}
        {% set side.cost = cost %}{% set side.type = type %}{% set side.dims = dims %}
    {% endif %}
{% endfor %}
{% endfor %}
{% set k_type = k.type %}
{% set k_dims = k.dims %}
{% set v_type = v.type %}
{% set v_dims = v.dims %}
{% set k_row_scales = k_side.row_scales %}
{% set v_row_scales = v_side.row_scales %}
{% set k_channel_scales = k_side.channel_scales %}

{# Word n of the loaded value x. #}
{% macro word_of(type, x, n) %}
    {%- set long = "u64" in type -%}
    {%- set component = n // 2 if long else n -%}
    {%- set part = x ~ "." ~ "xyzw"[component] if "vec" in type else x -%}
    {%- if long -%} u32({{ part }}{{ " >> 32u" if n % 2 }}) {%- else -%} {{ part }} {%- endif -%}
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
{% if "e4m3" in [k_format, v_format] %}

{{ codes.e4m3_floats() }}
{%- endif %}
{% if k_format in ["int8", "int8_channel"] or v_format == "int8" %}

{{ codes.byte_floats() }}
{%- endif %}
{% if k_format in ["int4", "int4_channel"] or v_format == "int4" %}

{{ codes.nibble_floats() }}
{%- endif %}
{% endmacro %}
