{#
select_rows: copies chosen rows. One invocation copies one vec4. No loops.
#}
const VECS: u32 = {{ vecs }}u;  // of a row
const GRID_X: u32 = {{ grid_x }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;  // [rows, VECS]
@group(0) @binding(1) var<storage, read> indices: array<u32>;  // [chosen rows]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [chosen rows, VECS]

@compute @workgroup_size(WORKGROUP_SIZE)
fn select_rows(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * GRID_X + workgroup.x) * WORKGROUP_SIZE + lane;
    if (idx >= arrayLength(&out)) {
        return;
    }
    let row = min(indices[idx / VECS], arrayLength(&x) / VECS - 1u);
    out[idx] = x[row * VECS + idx % VECS];
}
