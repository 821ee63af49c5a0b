{#
What the kernels of the linear layers share. `format` is "f32", "f16", "int8" or "int4"; a pack is 16 bytes of packed weights
(src/model/quantise.rs), and 8 weights of it a unit.
#}
{% set xyzw = ["x", "y", "z", "w"] %}
{# Weights of a pack. #}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}

{# Weight e of a vector of u32 words, as f32; an integer without its scale and minimum. #}
{% macro widen(words, e) -%}
    {%- if format == "f32" -%}
    bitcast<f32>({{ words }}.{{ xyzw[e] }})
    {%- elif format == "f16" -%}
    unpack2x16float({{ words }}.{{ xyzw[e // 2] }}).{{ xyzw[e % 2] }}
    {%- elif format == "int8" -%}
    f32(({{ words }}.{{ xyzw[e // 4] }} >> {{ 8 * (e % 4) }}u) & 255u)
    {%- else -%}
    f32(({{ words }}.{{ xyzw[e // 8] }} >> {{ 4 * (e % 8) }}u) & 15u)
    {%- endif -%}
{%- endmacro %}

{# A group's scale, and the value of its zero, from its word. #}
{% macro scale_of(word) -%}
    {%- if format == "int4" -%}bitcast<f32>({{ word }} & 0xffff0000u){%- else -%}bitcast<f32>({{ word }}){%- endif -%}
{%- endmacro %}
{% macro min_of(word) -%}
    {%- if format == "int4" -%}bitcast<f32>({{ word }} << 16u){%- else -%}(-128.0 * bitcast<f32>({{ word }})){%- endif -%}
{%- endmacro %}

{# Weight e of a unit of 8 that was loaded as `w_words{n}`, or of F32 as `w_lo{n}` and `w_hi{n}`; an integer without its scale and minimum. #}
{% macro unit_value(n, e) -%}
    {%- if format == "f32" -%}
    {{ widen(("w_lo" if e < 4 else "w_hi") ~ n, e % 4) }}
    {%- elif format == "int4" -%}
    f32((w_words{{ n }} >> {{ 4 * e }}u) & 15u)
    {%- else -%}
    {{ widen("w_words" ~ n, e) }}
    {%- endif -%}
{%- endmacro %}
