// merge_states: attention states of the same rows over disjoint keys become one.
// An invocation owns a vec4 of a row, in the order of memory.
// Loop iterations per invocation: 2 * states.

const ROW_VEC4S: u32 = {{ head_dim // 4 }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read> outs: array<vec4<f32>>;  // [states, rows, ROW_VEC4S]
@group(0) @binding(1) var<storage, read> lses: array<f32>;  // [states, rows], natural logarithms
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [rows, ROW_VEC4S]
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;  // [rows]

// A logarithm's bits: a state of no keys has minus infinity, which compilers may take to be impossible.
fn is_empty(value: f32) -> bool {
    return bitcast<u32>(value) == 0xff800000u;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn merge_states(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) local_idx: u32) {
    let num_rows = arrayLength(&lse);
    let num_states = arrayLength(&lses) / num_rows;
    let idx = (workgroup.x + workgroup.y * {{ grid_x }}u) * WORKGROUP_SIZE + local_idx;
    let row = idx / ROW_VEC4S;
    if (row >= num_rows) {
        return;
    }
    // The weights are relative to that of the largest: at least one of them is 1.
    var largest = 0.0;
    var is_any = false;
    for (var state = 0u; state < num_states; state++) {
        let value = lses[state * num_rows + row];
        if (!is_empty(value)) {
            largest = select(value, max(largest, value), is_any);
            is_any = true;
        }
    }
    var weight_sum = 0.0;
    var sum = vec4<f32>(0.0);
    for (var state = 0u; state < num_states; state++) {
        let value = lses[state * num_rows + row];
        // What stands in the row of an empty state doesn't matter, and a state alone stays as it is to the bit.
        if (!is_empty(value)) {
            let weight = select(exp(value - largest), 1.0, value == largest);
            weight_sum += weight;
            sum += outs[state * num_rows * ROW_VEC4S + idx] * weight;
        }
    }
    if (is_any) {
        out[idx] = select(sum / weight_sum, sum, weight_sum == 1.0);
    } else {
        out[idx] = vec4<f32>(0.0);
    }
    if (idx % ROW_VEC4S == 0u) {
        var minus_infinity = 0xff800000u;
        let total = select(largest + log(max(weight_sum, 1.0)), largest, weight_sum == 1.0);
        lse[row] = select(bitcast<f32>(minus_infinity), total, is_any);
    }
}
