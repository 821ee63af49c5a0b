struct Params {
    items_offset: u32,
    num_items: u32,
    grid_x: u32,
    head_offset: u32,
    qk_scale: f32,
    softcap_log2e: f32,
    window: u32,
    num_blocks: u32,
    mask_stride: u32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;               // [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding(1) var<storage, read> k_cache: array<{{ kv.k_type }}>;   // [block, kv_head, slot, head_dim/{{ kv.k_width }}]
@group(0) @binding(2) var<storage, read> v_cache: array<{{ kv.v_type }}>;   // [block, kv_head, slot, head_dim/{{ kv.v_width }}]
@group(0) @binding(3) var<storage, read> plan: array<u32>;                  // items, block tables, head parameters, mask bits
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;       // [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding(5) var<storage, read_write> partials: array<vec4<f32>>;  // [partial row, head_dim/4 + 1]
@group(0) @binding(6) var<uniform> params: Params;
{% if lse %}
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;             // [num_tokens, num_q_heads]
{% endif %}

const HEAD_VECS = {{ head_dim // 4 }}u;  // vec4s in a row of q and out
const NUM_KV_HEADS = {{ num_kv_heads }}u;
const NUM_Q_HEADS = {{ num_q_heads }}u;
const GROUP_SIZE = {{ group_size }}u;
const BLOCK_SIZE = {{ block_size }}u;
const K_ROW = {{ head_dim // kv.k_width }}u;  // loads in a row of k_cache
const V_ROW = {{ head_dim // kv.v_width }}u;  // loads in a row of v_cache
const MAX_FLOOR = -1e30;  // the running max before the first visible key

// The cache row (block, kv_head, slot) of one key, from the sequence's block table.
fn cache_row(table_offset: u32, kv_head: u32, key: u32) -> u32 {
    let block_id = min(plan[table_offset + key / BLOCK_SIZE], params.num_blocks - 1u);
    return (block_id * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
}
