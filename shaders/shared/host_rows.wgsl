{#
Rows of the host's: of queries, results, new keys and values. Four elements at a time are a vec4<f32>, or a vec2<u32> of halves.
#}
{% macro vec4_type(rows) %}{{ "vec2<u32>" if rows.halves else "vec4<f32>" }}{% endmacro %}

{# Where a token's row of a head begins, in vec4s. #}
{% macro begin(rows, token, head) -%}
    {{ token }} * {{ rows.token_stride // 4 }}u + {{ head }} * {{ rows.head_stride // 4 }}u{% if rows.start %} + {{ rows.start // 4 }}u{% endif %}
{%- endmacro %}

{# The four elements of a place. #}
{% macro load(rows, place) -%}
    {% if rows.halves %}vec4<f32>(unpack2x16float({{ place }}.x), unpack2x16float({{ place }}.y)){% else %}{{ place }}{% endif %}
{%- endmacro %}

{# A vec4<f32> as it is stored. Halves need half_pair. #}
{% macro stored(rows, x) -%}
    {% if rows.halves %}vec2<u32>(half_pair({{ x }}.x, {{ x }}.y), half_pair({{ x }}.z, {{ x }}.w)){% else %}{{ x }}{% endif %}
{%- endmacro %}
