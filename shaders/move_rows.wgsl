{% import "shared/kv_side.wgsl" as sides %}
{% set kept = [k_side] if latent else [k_side, v_side] %}
// move_rows: rows of K and V go to earlier places of their sequences, their scales with them. Bytes are bytes: no format matters here.
// One invocation moves one word of the rows of one KV head, of K and of V, for one list, in the order of the list. Destinations of a list rise
// and none is behind its source, which rises too: so no word is overwritten before it is read, and lists have no block in common.
// Iterations per invocation: the moves of a list, at most {{ max_moves }}.
{% include "shared/cache_params.wgsl" %}

// Words of a row, and of a row with its scale.
{% for side in kept %}
const {{ side.name|upper }}_ROW: u32 = {{ side.row_bytes // 4 }}u;
const {{ side.name|upper }}_WORDS: u32 = {{ side.row_bytes // 4 + (1 if side.row_scales else 0) }}u;
{% endfor %}
const WORDS: u32 = {{ "K_WORDS" if latent else "max(K_WORDS, V_WORDS)" }};

{{ sides.declare(k_side, 0, "read_write", "u32", "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, K_ROW]") -}}
{{ sides.declare(v_side, k_side.segments, "read_write", "u32", "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, V_ROW]") if not latent -}}
{% set after = k_side.segments + (0 if latent else v_side.segments) %}
@group(0) @binding({{ after }}) var<storage, read> step_lists: array<u32>;  // [num_copies + 1] where each list begins, at params.list_offset; [moves, 2] slots from and to, at params.copies_offset
@group(0) @binding({{ after + 1 }}) var<uniform> params: CacheParams;

{{ sides.cache_row_function() }}
{% for side in kept %}
{% macro place(local) -%}
{% if side.row_scales -%}
    select({{ sides.row_start(side, local, 4) }} + word, {{ sides.scale_word(side, local) }}, word == {{ side.name|upper }}_ROW)
{%- else -%}
    {{ sides.row_start(side, local, 4) }} + word
{%- endif %}
{%- endmacro %}
fn read_{{ side.name }}(row: u32, word: u32) -> u32 {
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
    return {{ cache }}[{{ place(local) }}];
{%- endcall %}
}

fn write_{{ side.name }}(row: u32, word: u32, value: u32) {
{% call(cache, local) sides.in_segment(side, "row", side.block_rows) %}
    {{ cache }}[{{ place(local) }}] = value;
    return;
{%- endcall %}
}

{% endfor %}
@compute @workgroup_size(WORKGROUP_SIZE)
fn move_rows(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
    let word = idx % WORDS;
    let kv_head = idx / WORDS % NUM_KV_HEADS;
    let list = idx / WORDS / NUM_KV_HEADS;
    if (list >= params.num_copies) {
        return;
    }
    let end = step_lists[params.list_offset + list + 1u];
    for (var i = step_lists[params.list_offset + list]; i < end; i++) {
        let slot_from = step_lists[params.copies_offset + 2u * i];
        let slot_to = step_lists[params.copies_offset + 2u * i + 1u];
        let row_from = cache_row(slot_from / BLOCK_SIZE, kv_head, slot_from);
        let row_to = cache_row(slot_to / BLOCK_SIZE, kv_head, slot_to);
{% for side in kept %}
        if (word < {{ side.name|upper }}_WORDS) {
            write_{{ side.name }}(row_to, word, read_{{ side.name }}(row_from, word));
        }
{% endfor %}
    }
}
