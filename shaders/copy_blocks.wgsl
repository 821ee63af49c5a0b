{% import "shared/kv_side.wgsl" as sides %}
{% set kept = [k_side] if latent else [k_side, v_side] %}
// copy_blocks: whole blocks of K and V are copied within the pool, for copy-on-write. Bytes are bytes: no format matters here.
// One invocation copies 16 bytes of {{ "K" if latent else "K and 16 bytes of V" }}. No loops.
{% include "shared/cache_params.wgsl" %}

const K_BLOCK: u32 = {{ k_side.block_bytes // 16 }}u;  // vec4<u32> of a block
{% if not latent %}
const V_BLOCK: u32 = {{ v_side.block_bytes // 16 }}u;
{% endif %}
const LARGER_BLOCK: u32 = {{ [k_side.block_bytes, v_side.block_bytes]|max // 16 }}u;

{{ sides.declare(k_side, 0, "read_write", "vec4<u32>", "[num_blocks, K_BLOCK]") -}}
{{ sides.declare(v_side, k_side.segments, "read_write", "vec4<u32>", "[num_blocks, V_BLOCK]") if not latent -}}
{% set after = k_side.segments + (0 if latent else v_side.segments) %}
@group(0) @binding({{ after }}) var<storage, read> step_lists: array<u32>;  // [num_copies, 2] source and destination, at params.copies_offset
@group(0) @binding({{ after + 1 }}) var<uniform> params: CacheParams;

{% for side in kept %}
{% set block = side.name|upper ~ "_BLOCK" %}
fn read_{{ side.name }}(block: u32, word: u32) -> vec4<u32> {
{% call(cache, local) sides.in_segment(side, "block", 1) %}
    return {{ cache }}[{{ local }} * {{ block }} + word];
{%- endcall %}
}

fn write_{{ side.name }}(block: u32, word: u32, value: vec4<u32>) {
{% call(cache, local) sides.in_segment(side, "block", 1) %}
    {{ cache }}[{{ local }} * {{ block }} + word] = value;
    return;
{%- endcall %}
}

{% endfor %}
@compute @workgroup_size(WORKGROUP_SIZE)
fn copy_blocks(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
    let copy = idx / LARGER_BLOCK;
    let word = idx % LARGER_BLOCK;
    if (copy >= params.num_copies) {
        return;
    }
    let source = min(step_lists[params.copies_offset + 2u * copy], params.num_blocks - 1u);
    let destination = min(step_lists[params.copies_offset + 2u * copy + 1u], params.num_blocks - 1u);
{% for side in kept %}
    if (word < {{ side.name|upper }}_BLOCK) {
        write_{{ side.name }}(destination, word, read_{{ side.name }}(source, word));
    }
{% endfor %}
}
