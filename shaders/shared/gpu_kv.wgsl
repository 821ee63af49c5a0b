{#
  Formats of the KV cache for the GPU-shaped kernels. A cache row (one token of one KV head) is read in
  elements of up to 16 bytes; every element holds whole vec4s of dims. A new format is a new branch here.
#}

{# Type of an element of `dims` dims of a side. #}
{% macro element_type(side, dims, head_dim) -%}
    {%- set words = dims * side.row_bytes // (4 * head_dim) -%}
    {%- if side.format == "f32" -%} vec4<f32> {%- elif words > 1 -%} vec{{ words }}<u32> {%- else -%} u32 {%- endif -%}
{%- endmacro %}

{# Word `i` of an element. #}
{% macro element_word(side, dims, head_dim, i) -%}
    element{{ "." ~ "xyzw"[i] if dims * side.row_bytes > 4 * head_dim }}
{%- endmacro %}

{#
  An element type of `dims` dims for a side, and a function for each vec4 of dims in it: {name}_dims_0,
  {name}_dims_4, ... In formats with scales they give the codes. A word of int4 has 8 dims whatever `dims`
  is: where that is 4, the caller shifts the other 4 out of the way.
#}
{% macro kv_element(side, dims, head_dim) %}
{% set name = side.name %}
{% set type = name|upper ~ "Element" %}
alias {{ type }} = {{ element_type(side, dims, head_dim) }};
{% if side.format in ["int8", "int8_channel"] %}

fn {{ name }}_codes(word: u32) -> vec4<f32> {
    return vec4<f32>(f32(word & 0xffu), f32((word >> 8u) & 0xffu), f32((word >> 16u) & 0xffu), f32(word >> 24u));
}
{% elif side.format in ["int4", "int4_channel"] %}

// The lower halves of 4 bytes: 4 neighbouring dims. The upper halves are the next 4.
fn {{ name }}_codes(word: u32) -> vec4<f32> {
    let low = word & 0x0f0f0f0fu;
    return vec4<f32>(f32(low & 0xffu), f32((low >> 8u) & 0xffu), f32((low >> 16u) & 0xffu), f32(low >> 24u));
}
{% endif %}
{% for d in range(0, dims, 4) %}

fn {{ name }}_dims_{{ d }}(element: {{ type }}) -> vec4<f32> {
{% if side.format == "f32" %}
    return element;
{% elif side.format == "f16" %}
    // Two halves per word, the even dim in the low one.
    return vec4<f32>(unpack2x16float({{ element_word(side, dims, head_dim, d // 2) }}), unpack2x16float({{ element_word(side, dims, head_dim, d // 2 + 1) }}));
{% elif side.format == "e4m3" %}
    return e4m3_floats({{ element_word(side, dims, head_dim, d // 4) }});
{% elif side.format in ["int8", "int8_channel"] %}
    return {{ name }}_codes({{ element_word(side, dims, head_dim, d // 4) }});
{% else %}
    return {{ name }}_codes({{ element_word(side, dims, head_dim, d // 8) }}{{ " >> 4u" if d // 4 % 2 }});
{% endif %}
}
{% endfor %}
{% endmacro %}

{# fn {name}_channel_vec4(plane, kv_head, d), in formats with scales per channel: scales (plane 0) or least values (1) of vec4 `d` of the head. #}
{% macro channel_function(sides, side, element) %}
{% set cache = sides.buffer(side, 0) %}
fn {{ side.name }}_channel_vec4(plane: u32, kv_head: u32, d: u32) -> vec4<f32> {
    let table = {{ "params.num_blocks" if side.segments == 1 else side.segment_blocks ~ "u" }} * {{ side.block_bytes // 16 }}u;
    let at = table + (plane * NUM_KV_HEADS + kv_head) * HEAD_VEC4S + d;
{% if element == "vec4<u32>" %}
    return bitcast<vec4<f32>>({{ cache }}[at]);
{% elif element == "vec2<u32>" %}
    return bitcast<vec4<f32>>(vec4<u32>({{ cache }}[2u * at], {{ cache }}[2u * at + 1u]));
{% else %}
    return bitcast<vec4<f32>>(vec4<u32>({{ cache }}[4u * at], {{ cache }}[4u * at + 1u], {{ cache }}[4u * at + 2u], {{ cache }}[4u * at + 3u]));
{% endif %}
}
{% endmacro %}

{#
  fn {name}_place(row) and {name}_at(place, part): a row's element by where the row starts, which one invocation
  works out for all that read the row. The elements have `bytes` bytes.
#}
{% macro place_functions(sides, side, bytes) %}
{% set type = side.name|upper ~ "Element" %}
{% if side.segments == 1 %}
// Where a row of {{ side.name|upper }} starts, and an element of the row that starts there.
fn {{ side.name }}_place(row: u32) -> u32 {
    return {{ sides.row_start(side, "row", bytes) }};
}

fn {{ side.name }}_at(place: u32, part: u32) -> {{ type }} {
    return {{ sides.buffer(side, 0) }}[place + part];
}
{% else %}
// A row of {{ side.name|upper }} is told by its number, which says the segment too.
fn {{ side.name }}_place(row: u32) -> u32 {
    return row;
}

fn {{ side.name }}_at(place: u32, part: u32) -> {{ type }} {
    return {{ side.name }}_element(place, part);
}
{% endif %}
{% endmacro %}
