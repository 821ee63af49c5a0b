// copy_blocks: whole blocks of K and V are copied within the pool, for copy-on-write. Bytes are bytes: no format matters here.
// One invocation copies 16 bytes of K and 16 bytes of V. No loops.
{% include "shared/cache_params.wgsl" %}

{% set bits = {"f32": 32, "f16": 16} %}
const ELEMENTS: u32 = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM;
const K_BLOCK: u32 = ELEMENTS * {{ bits[k_format] }}u / 128u;  // vec4<u32> of a block
const V_BLOCK: u32 = ELEMENTS * {{ bits[v_format] }}u / 128u;
const LARGER_BLOCK: u32 = {{ [bits[k_format], bits[v_format]] | max }}u * ELEMENTS / 128u;

@group(0) @binding(0) var<storage, read_write> k_cache: array<vec4<u32>>;  // [num_blocks, K_BLOCK]
@group(0) @binding(1) var<storage, read_write> v_cache: array<vec4<u32>>;  // [num_blocks, V_BLOCK]
@group(0) @binding(2) var<storage, read> step: array<u32>;  // [num_copies, 2] source and destination, at params.copies_offset
@group(0) @binding(3) var<uniform> params: CacheParams;

@compute @workgroup_size(WORKGROUP_SIZE)
fn copy_blocks(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
  let copy = idx / LARGER_BLOCK;
  let word = idx % LARGER_BLOCK;
  if (copy >= params.num_copies) {
    return;
  }
  let source = min(step[params.copies_offset + 2u * copy], params.num_blocks - 1u);
  let destination = min(step[params.copies_offset + 2u * copy + 1u], params.num_blocks - 1u);
  if (word < K_BLOCK) {
    k_cache[destination * K_BLOCK + word] = k_cache[source * K_BLOCK + word];
  }
  if (word < V_BLOCK) {
    v_cache[destination * V_BLOCK + word] = v_cache[source * V_BLOCK + word];
  }
}
