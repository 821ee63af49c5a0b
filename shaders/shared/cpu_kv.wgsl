{#
How K and V elements are loaded and widened. Imported with the context of a kernel, which has set

    kv_lanes   lanes that share a load round
    kv_keys    keys that one round may serve

Every load costs llvmpipe a bounds check and a branch per lane and component, so components are as wide as the device allows
(64 bits), and of the load types the one is chosen that wastes the fewest components on lanes beyond the rows.
A new format adds its load types to `types` and a case to `widen`.
#}
{% set types = {
    "f32": [("vec4<u64>", 8, 4), ("vec2<u64>", 4, 2)] if int64 else [("vec4<f32>", 4, 4)],
    "f16": [("vec4<u64>", 16, 4), ("vec2<u64>", 8, 2), ("u64", 4, 1)] if int64 else [("vec4<u32>", 8, 4), ("vec2<u32>", 4, 2)],
} %}
{% set k = namespace(cost=1000000) %}
{% for type, width, words in types[k_format] if head_dim % width == 0 %}
    {% set cost = ((kv_keys * head_dim // width + kv_lanes - 1) // kv_lanes) * (words + 1) %}
    {% if cost < k.cost %}
        {% set k.cost = cost %}{% set k.type = type %}{% set k.width = width %}
    {% endif %}
{% endfor %}
{% set v = namespace(cost=1000000) %}
{% for type, width, words in types[v_format] if head_dim % width == 0 %}
    {% set cost = ((kv_keys * head_dim // width + kv_lanes - 1) // kv_lanes) * (words + 1) %}
    {% if cost < v.cost %}
        {% set v.cost = cost %}{% set v.type = type %}{% set v.width = width %}
    {% endif %}
{% endfor %}
{% set k_type = k.type %}
{% set k_width = k.width %}
{% set v_type = v.type %}
{% set v_width = v.width %}

{# The i-th vec4<f32> of a loaded value x. #}
{% macro widen(format, type, x, i) %}
    {%- set pair = [["x", "y"], ["z", "w"]][i % 2] -%}
    {%- if format == "f32" and type == "vec4<f32>" %}{{ x }}
    {%- elif format == "f32" %}f32_pairs({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
    {%- elif type == "u64" %}f16_quad({{ x }})
    {%- elif "u64" in type %}f16_quad({{ x }}.{{ "xyzw"[i] }})
    {%- else %}f16_pairs({{ x }}.{{ pair[0] }}, {{ x }}.{{ pair[1] }})
    {%- endif -%}
{% endmacro %}

{% macro declare() %}
{% if int64 and "f32" in [k_format, v_format] %}
fn f32_pairs(a: u64, b: u64) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(u32(a), u32(a >> 32u), u32(b), u32(b >> 32u)));
}
{% endif %}
{% if int64 and "f16" in [k_format, v_format] %}
fn f16_quad(a: u64) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(u32(a)), unpack2x16float(u32(a >> 32u)));
}
{% endif %}
{% if not int64 and "f16" in [k_format, v_format] %}
fn f16_pairs(a: u32, b: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(a), unpack2x16float(b));
}
{% endif %}
{% endmacro %}
