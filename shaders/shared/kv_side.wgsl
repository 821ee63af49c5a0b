{#
One side (K or V) of the cache: its bindings, and where things lie in it. `side` is k_side or v_side.

A row, one token of one KV head, has the number (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot. A block is its rows, then (formats
with scales per row) a word per row: the scale as bfloat16 in its lower half, the minimum in its upper half; then perhaps padding. A
side that is larger than a binding comes in segments, buffers of segment_blocks blocks each. Behind the blocks of the first segment
stands (formats with scales per channel) a table f32 [2, NUM_KV_HEADS, elements of a row]: scales, then minima.
#}

{# The bindings of a side, from number `first` on: {name}_cache, or {name}_cache_0, {name}_cache_1, ... #}
{% macro declare(side, first, access, element, shape) %}
{% for s in range(side.segments) %}
@group(0) @binding({{ first + s }}) var<storage, {{ access }}> {{ buffer(side, s) }}: array<{{ element }}>;  // {{ shape }}
{% endfor %}
{% endmacro %}

{% macro buffer(side, segment) %}{{ side.name }}_cache{{ "_" ~ segment if side.segments > 1 }}{% endmacro %}

{# The statements of the caller, for the segment that `number` (a row, or whatever each block has `per_block` of) lies in: called with the
   buffer's name and the number within it. #}
{% macro in_segment(side, number, per_block) %}
{% for s in range(side.segments) %}
{% set before = s * side.segment_blocks * per_block %}
{% set local = "(" ~ number ~ " - " ~ before ~ "u)" if s else number %}
{% if not loop.last %}
    if ({{ number }} < {{ before + side.segment_blocks * per_block }}u) {
{{ caller(buffer(side, s), local) }}
    }
{% else %}
{{ caller(buffer(side, s), local) }}
{% endif %}
{% endfor %}
{% endmacro %}

{# Index of the first element, of `bytes` bytes, of row `row` of a segment. #}
{% macro row_start(side, row, bytes) -%}
    {%- set padding = side.block_bytes - side.block_rows * side.row_bytes -%}
        {{ row }} * {{ side.row_bytes // bytes }}u{{ " + %s / %du * %du"|format(row, side.block_rows, padding // bytes) if padding }}
{%- endmacro %}

{# fn {name}_element(row, part): element `part`, of `bytes` bytes, of a row. #}
{% macro element_function(side, element, bytes) %}
// Element `part` of a row of {{ side.name|upper }}.
fn {{ side.name }}_element(row: u32, part: u32) -> {{ element }} {
{% call(cache, local) in_segment(side, "row", side.block_rows) %}
    return {{ cache }}[{{ row_start(side, local, bytes) }} + part];
{%- endcall %}
}
{% endmacro %}

{# Word `i` (an expression, 4 bytes each) of a buffer of `element`s, as a u32. A component is read alone, whatever the element's width. #}
{% macro word(cache, element, i) -%}
    {%- set components = 4 if "vec4" in element else 2 if "vec2" in element else 1 -%}
    {%- set words = components * 2 if "u64" in element else components -%}
    {%- set component = "[(%s) / %du %% %du]"|format(i, words // components, components) if components > 1 else "" -%}
    {%- set value = "%s[(%s) / %du]%s"|format(cache, i, words, component) -%}
    {%- if "u64" in element -%}
    u32({{ value }} >> (32u * ((({{ i }}) % 2u))))
    {%- elif "f32" in element -%}
    bitcast<u32>({{ value }})
    {%- else -%}
    {{ value }}
    {%- endif -%}
{%- endmacro %}

{# Word of the scale and minimum of row `row` of a segment. #}
{% macro scale_word(side, row) -%}
    {{ row }} / {{ side.block_rows }}u * {{ side.block_bytes // 4 }}u + {{ row }} % {{ side.block_rows }}u + {{ side.block_rows * side.row_bytes // 4 }}u
{%- endmacro %}

{# fn {name}_scale_word(row), in formats with scales per row: the word that holds a row's scale and minimum. GPU kernels read it beside the
   row and unpack it (`scale_pair`) when it is needed, so that nobody waits for it. #}
{% macro scale_word_function(side, element) %}
fn {{ side.name }}_scale_word(row: u32) -> u32 {
{% call(cache, local) in_segment(side, "row", side.block_rows) %}
    let at = {{ scale_word(side, local) }};
    return {{ word(cache, element, "at") }};
{%- endcall %}
}
{% endmacro %}

{# Scale and minimum in such a word. #}
{% macro scale_pair(word) -%}
    vec2<f32>(bitcast<f32>({{ word }} << 16u), bitcast<f32>({{ word }} & 0xffff0000u))
{%- endmacro %}

{# fn {name}_row_scale(row): scale and minimum of a row, in formats with scales per row. #}
{% macro row_scale_function(side, element) %}
{{ scale_word_function(side, element) }}
// Scale and minimum of a row of {{ side.name|upper }}.
fn {{ side.name }}_row_scale(row: u32) -> vec2<f32> {
    let pair = {{ side.name }}_scale_word(row);
    return {{ scale_pair("pair") }};
}
{% endmacro %}

{#
fn {name}_channels(plane, kv_head, dim), in formats with scales per channel: scales (plane 0) or minima (plane 1) of the four channels from
`dim`, a multiple of 4, on.
#}
{% macro channel_function(side, element, num_kv_heads) %}
{% set cache = buffer(side, 0) %}
// Scales (plane 0) or minima (plane 1) of four channels of {{ side.name|upper }}.
fn {{ side.name }}_channels(plane: u32, kv_head: u32, dim: u32) -> vec4<f32> {
    let table = {{ "params.num_blocks" if side.segments == 1 else side.segment_blocks ~ "u" }} * {{ side.block_bytes // 4 }}u;
    let at = table + (plane * {{ num_kv_heads }}u + kv_head) * {{ side.row_dim }}u + dim;
{% if element == "vec4<u32>" %}
    return bitcast<vec4<f32>>({{ cache }}[at / 4u]);
{% elif element == "vec2<u32>" %}
    return bitcast<vec4<f32>>(vec4<u32>({{ cache }}[at / 2u], {{ cache }}[at / 2u + 1u]));
{% else %}
    return bitcast<vec4<f32>>(vec4<u32>(
        {%- for i in range(4) %}{{ word(cache, element, "at + %du"|format(i)) }}{{ ", " if not loop.last }}{% endfor %}));
{% endif %}
}
{% endmacro %}

{#
  fn {name}_place(row) and {name}_at(place, part): a row's element by where the row starts, which one invocation works out for all that
  read the row. The elements have `bytes` bytes.
#}
{% macro place_functions(side, bytes) %}
{% set type = side.name|upper ~ "Element" %}
{% if side.segments == 1 %}
// Where a row of {{ side.name|upper }} starts, and an element of the row that starts there.
fn {{ side.name }}_place(row: u32) -> u32 {
    return {{ row_start(side, "row", bytes) }};
}

fn {{ side.name }}_at(place: u32, part: u32) -> {{ type }} {
    return {{ buffer(side, 0) }}[place + part];
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

{# fn cache_row(block_id, kv_head, key): the number of a row, the same on both sides. #}
{% macro cache_row_function() %}
// Row of a token, at position `key` of its sequence, in a block. A corrupt id reads a wrong row, never outside the pool.
fn cache_row(block_id: u32, kv_head: u32, key: u32) -> u32 {
    let block = min(block_id, params.num_blocks - 1u);
    return (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
}
{% endmacro %}
