// pack_blocks: listed blocks of one side of a layer are copied into consecutive memory, or back. Bytes are bytes: no format matters here.
// One invocation copies 16 bytes. The listed block is workgroup_id.y; x, then z, go through its bytes. No loops.
struct PackParams {
    list_offset: u32,    // words
    num_blocks: u32,     // blocks that `side` holds; ids are clamped below it
    block_len: u32,      // vec4<u32> of a block
    packed_offset: u32,  // vec4<u32> before position 0
    grid_x: u32,         // workgroups along x
    unpack: u32,         // 0: from side to packed_blocks; 1: back
    reserved0: u32,
    reserved1: u32,
}

const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read_write> side: array<vec4<u32>>;           // [num_blocks, block_len]
@group(0) @binding(1) var<storage, read_write> packed_blocks: array<vec4<u32>>;  // [positions, block_len], at params.packed_offset
@group(0) @binding(2) var<storage, read> step_lists: array<u32>;  // [listed blocks, 2]: block and position, at params.list_offset
@group(0) @binding(3) var<uniform> params: PackParams;

@compute @workgroup_size(WORKGROUP_SIZE)
fn pack_blocks(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let word = (workgroup.z * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
    if (word >= params.block_len) {
        return;
    }
    let entry = params.list_offset + 2u * workgroup.y;
    let in_side = min(step_lists[entry], params.num_blocks - 1u) * params.block_len + word;
    let in_packed = params.packed_offset + step_lists[entry + 1u] * params.block_len + word;
    if (params.unpack == 0u) {
        packed_blocks[in_packed] = side[in_side];
    } else {
        side[in_side] = packed_blocks[in_packed];
    }
}
