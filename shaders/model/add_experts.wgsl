{#
add_experts: writes the weighted sum of what the experts of a row have computed, in the order in which they were selected, or adds it. One invocation
computes one vec4.

Iterations per invocation: SELECTED.
#}
const VECS: u32 = {{ vecs }}u;  // of a row
const SELECTED: u32 = {{ selected }}u;
const GRID_X: u32 = {{ grid_x }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;  // [rows, SELECTED, VECS]
@group(0) @binding(1) var<storage, read> weights: array<f32>;  // [rows, SELECTED]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [rows, VECS]

@compute @workgroup_size(WORKGROUP_SIZE)
fn add_experts(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * GRID_X + workgroup.x) * WORKGROUP_SIZE + lane;
    if (idx >= arrayLength(&out)) {
        return;
    }
    let row = idx / VECS;
    var sum = vec4<f32>();
    for (var n = 0u; n < SELECTED; n++) {
        let from_row = row * SELECTED + n;
        sum = fma(vec4<f32>(weights[from_row]), x[from_row * VECS + idx % VECS], sum);
    }
    out[idx] {{ "+" if accumulate }}= sum;
}
