{#
add_positions: adds each row's learned position embedding to it. One invocation adds one vec4. No loops.
#}
const VECS: u32 = {{ vecs }}u;  // of a row
const NUM_POSITIONS: u32 = {{ num_positions }}u;
const GRID_X: u32 = {{ grid_x }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;  // [rows, VECS]
@group(0) @binding(1) var<storage, read> positions: array<u32>;  // [rows]
@group(0) @binding(2) var<storage, read> table: array<vec4<f32>>;  // [NUM_POSITIONS, VECS]

@compute @workgroup_size(WORKGROUP_SIZE)
fn add_positions(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * GRID_X + workgroup.x) * WORKGROUP_SIZE + lane;
    if (idx >= arrayLength(&x)) {
        return;
    }
    let position = min(positions[idx / VECS], NUM_POSITIONS - 1u);
    x[idx] += table[position * VECS + idx % VECS];
}
