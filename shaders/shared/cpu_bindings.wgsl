{# Bindings, constants and the block table of the CPU attention kernels; the includer has imported `kv`. #}
{% include "shared/attend_params.wgsl" %}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;               // [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding(1) var<storage, read> k_cache: array<{{ kv.k_type }}>;         // [block, kv_head, slot, head_dim/{{ kv.k_dims }}]
@group(0) @binding(2) var<storage, read> v_cache: array<{{ kv.v_type }}>;         // [block, kv_head, slot, head_dim/{{ kv.v_dims }}]
@group(0) @binding(3) var<storage, read> plan: array<u32>;                  // work items, block tables, head parameters, mask bits
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;       // [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding(5) var<storage, read_write> partials: array<vec4<f32>>;  // [partial row, head_dim/4 + 1]
@group(0) @binding(6) var<uniform> params: AttendParams;
{% if lse %}
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;             // [num_tokens, num_q_heads]
{% endif %}

const LANES = {{ lanes }}u;  // one subgroup, the whole workgroup
const TILE_Q = {{ tile_q }}u;
const STEP = {{ step }}u;  // keys per iteration
const BLOCK_SIZE = {{ block_size }}u;
const NUM_KV_HEADS = {{ num_kv_heads }}u;
const NUM_Q_HEADS = {{ num_q_heads }}u;
const GROUP_SIZE = {{ group_size }}u;
const ROW_VECS = {{ head_dim // 4 }}u;  // vec4s in a row of q and out
const K_LOADS = {{ head_dim // kv.k_dims }}u;  // loads in a row of k_cache
const V_LOADS = {{ head_dim // kv.v_dims }}u;  // loads in a row of v_cache
const MAX_FLOOR = -1e30;  // the running max before the first visible key
const LN_2 = 0.6931471805599453;
const ITEM_WORDS = 12u;
const DIRECT = 0xffffffffu;  // part_row of an item that has its rows to itself
{{ kv.functions() }}
// The row of k_cache and v_cache that holds `key`.
fn cache_row(table_offset: u32, kv_head: u32, key: u32) -> u32 {
    let block_id = min(plan[table_offset + key / BLOCK_SIZE], params.num_blocks - 1u);
    return (block_id * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
}
