{#
One side (K or V) of the cache: its bindings, and where things lie in it. `side` is k_side or v_side.

A row, one token of one KV head, has the number (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot. A block is its rows, then (formats
with scales per row) a word per row, then perhaps padding. A side that is larger than a binding comes in segments, buffers of
segment_blocks blocks each.
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
