{# Parameters of append, copy_blocks, gather and rope, and the linear index that they share. #}
struct CacheParams {
    num_tokens: u32,
    num_copies: u32,
    list_offset: u32,    // words
    copies_offset: u32,  // words
    num_blocks: u32,
    grid_x: u32,         // workgroups along x; the linear index goes on along y
    positions_offset: u32,  // words
    reserved0: u32,
}

const HEAD_DIM: u32 = {{ head_dim }}u;
const NUM_KV_HEADS: u32 = {{ num_kv_heads }}u;
const BLOCK_SIZE: u32 = {{ block_size }}u;
// A Vec8 is 8 elements of a row: those of a key, of a value, and of the longer one.
const HEAD_VEC8S: u32 = HEAD_DIM / 8u;
const VALUE_VEC8S: u32 = {{ value_dim // 8 }}u;
const ROW_VEC8S: u32 = {{ [head_dim, value_dim]|max // 8 }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;
