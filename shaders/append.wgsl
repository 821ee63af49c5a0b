{% from "shared/kv_rows.wgsl" import element_type, store, f16_functions %}
// append: new K and V rows go into their slots, converted to the cache's formats.
// One invocation writes 8 elements of one row of K and the same of V. No loops.
{% include "shared/cache_params.wgsl" %}

@group(0) @binding(0) var<storage, read> k_new: array<vec4<f32>>;  // [num_tokens, NUM_KV_HEADS, HEAD_DIM / 4]
@group(0) @binding(1) var<storage, read> v_new: array<vec4<f32>>;  // [num_tokens, NUM_KV_HEADS, HEAD_DIM / 4]
@group(0) @binding(2) var<storage, read_write> k_cache: array<{{ element_type(k_format) }}>;  // [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
@group(0) @binding(3) var<storage, read_write> v_cache: array<{{ element_type(v_format) }}>;  // [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
@group(0) @binding(4) var<storage, read> step: array<u32>;  // slot of each token, at params.list_offset
@group(0) @binding(5) var<uniform> params: CacheParams;

{{ f16_functions() if "f16" in [k_format, v_format] }}
{{ store("k_cache", k_format) }}
{{ store("v_cache", v_format) }}
@compute @workgroup_size(WORKGROUP_SIZE)
fn append(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
  let chunk = idx % CHUNKS;
  let row = idx / CHUNKS;
  let kv_head = row % NUM_KV_HEADS;
  let token = row / NUM_KV_HEADS;
  if (token >= params.num_tokens) {
    return;
  }
  let slot = min(step[params.list_offset + token], params.num_blocks * BLOCK_SIZE - 1u);
  let cache_row = ((slot / BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE;
  let destination = cache_row * CHUNKS + chunk;
  store_k_cache(destination, k_new[2u * idx], k_new[2u * idx + 1u]);
  store_v_cache(destination, v_new[2u * idx], v_new[2u * idx + 1u]);
}
