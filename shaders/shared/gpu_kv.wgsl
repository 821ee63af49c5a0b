{#
  Formats of the KV cache for the GPU-shaped kernels. A cache row (one token of one KV head) is read in
  elements of up to 16 bytes; every element holds whole vec4s of dims. A new format is a new branch here.
#}

{# Word `i` of an element. #}
{% macro element_word(side, dims, i) -%}
    element{{ "." ~ "xyzw"[i] if dims * side.row_bytes > 4 * side.row_dim }}
{%- endmacro %}

{#
  A function for each four dims of an element of K: k_codes_0, k_codes_4, ... give their codes as signed bytes of a word: of int8 counted
  from the middle of the range, of int4 as they are.
#}
{% macro k_code_words(side, dims) %}
{% for d in range(0, dims, 4) %}

fn k_codes_{{ d }}(element: KElement) -> u32 {
{% if side.levels == 255 %}
    return {{ element_word(side, dims, d // 4) }} ^ 0x80808080u;
{% else %}
    return ({{ element_word(side, dims, d // 8) }}{{ " >> 4u" if d // 4 % 2 }}) & 0x0f0f0f0fu;
{% endif %}
}
{% endfor %}
{% endmacro %}

{#
  The element type of `dims` dims of a side, and a function for each vec4 of dims in it: {name}_dims_0,
  {name}_dims_4, ... In formats with scales they give the codes. A word of int4 has 8 dims whatever `dims`
  is: where that is 4, the caller shifts the other 4 out of the way.
#}
{% macro kv_element(side, type_name, dims) %}
{% set name = side.name %}
{% set type = name|upper ~ "Element" %}
alias {{ type }} = {{ type_name }};
{% for d in range(0, dims, 4) %}

fn {{ name }}_dims_{{ d }}(element: {{ type }}) -> vec4<f32> {
{% if side.format == "f32" %}
    return element;
{% elif side.format == "f16" %}
    // Two halves per word, the even dim in the low one.
    return vec4<f32>(unpack2x16float({{ element_word(side, dims, d // 2) }}), unpack2x16float({{ element_word(side, dims, d // 2 + 1) }}));
{% elif side.format == "e4m3" %}
    return e4m3_floats({{ element_word(side, dims, d // 4) }});
{% elif side.format in ["int8", "int8_channel"] %}
    return byte_floats({{ element_word(side, dims, d // 4) }});
{% else %}
    return nibble_floats({{ element_word(side, dims, d // 8) }}{{ " >> 4u" if d // 4 % 2 }});
{% endif %}
}
{% endfor %}
{% endmacro %}
