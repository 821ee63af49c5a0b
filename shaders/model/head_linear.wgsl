{#
A matrix for each head: y[row, head] = W_head x[row, head], for rows of all heads side by side. Each invocation sums one column for ROWS rows, in the order
of the inputs, so that the bits of a row don't depend on the others. W is packed with the columns of LANES neighbours interleaved: what the invocations
of a workgroup load at a time is contiguous. Inputs pass through workgroup memory, SLICE at a time.

With `rope` elements of x behind the inputs are rotated by the row's position and go behind the columns, by one more workgroup.

Iterations per invocation: ceil(IN / SLICE) * (ceil(ROWS * SLICE / LANES) + SLICE / {{ per_pack }}) + ROWS; with `rope` ceil(ROWS * ROW_GROUPS / LANES) in that workgroup.
Workgroup memory: `inputs`.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% set quantised = format in ["int8", "int4"] %}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}
const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const NUM_HEADS: u32 = {{ num_heads }}u;
const IN: u32 = {{ in_features }}u;
const OUT: u32 = {{ out_features }}u;
// Elements of a head in a row of x, and of y.
const X_WIDTH: u32 = {{ x_width }}u;
const Y_WIDTH: u32 = {{ y_width }}u;
// Inputs in workgroup memory at a time.
const SLICE: u32 = {{ slice }}u;
const BLOCKS: u32 = (OUT + LANES - 1u) / LANES;
const ROW_PACKS: u32 = {{ row_packs }}u;
{% if quantised %}
const ROW_SCALES: u32 = {{ row_groups }}u;
{% endif %}
const MAX_GRID: u32 = 65535u;  // the grid of tiles of rows continues along x once y is this wide

// [NUM_HEADS, BLOCKS, ROW_PACKS, LANES] packs of weights
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
// [rows, NUM_HEADS, X_WIDTH]
@group(0) @binding(1) var<storage, read> x: array<f32>;
// [rows, NUM_HEADS, Y_WIDTH]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
{% if quantised %}
// [NUM_HEADS, BLOCKS, ROW_SCALES / 4, LANES, 4] words
@group(0) @binding(3) var<storage, read> scales: array<u32>;
{% endif %}
{% if rope %}
{% set after = 4 if quantised else 3 %}
@group(0) @binding({{ after }}) var<storage, read> positions: array<u32>;  // [rows]
@group(0) @binding({{ after + 1 }}) var<storage, read> rope_table: array<vec2<u32>>;  // [ROTARY_DIM / 2] revolutions per position (high, low); [1] factor
{% endif %}

var<workgroup> inputs: array<f32, {{ rows * slice }}>;  // [ROWS, SLICE]

{% if rope %}
{% include "shared/rope.wgsl" %}

const ROW_GROUPS: u32 = (ROTARY_PAIRS + 3u) / 4u;  // of a row, of four pairs each

// Rotates the elements behind the inputs, of ROWS rows of a head.
fn rotate_rest(head: u32, first_row: u32, num_rows: u32, lane: u32) {
    for (var i = lane; i < ROWS * ROW_GROUPS; i += LANES) {
        let row = first_row + i / ROW_GROUPS;
        if (row < num_rows) {
            let pairs = 4u * (i % ROW_GROUPS) + OFFSETS;
            let held = min(pairs, vec4<u32>(ROTARY_PAIRS - 1u));
{% if rope == "interleaved" %}
            let first = 2u * held;
            let second = first + 1u;
{% else %}
            let first = held;
            let second = first + ROTARY_PAIRS;
{% endif %}
            let from_x = (row * NUM_HEADS + head) * X_WIDTH + IN;
            let to_y = (row * NUM_HEADS + head) * Y_WIDTH + OUT;
            let a = vec4<f32>(x[from_x + first.x], x[from_x + first.y], x[from_x + first.z], x[from_x + first.w]);
            let b = vec4<f32>(x[from_x + second.x], x[from_x + second.y], x[from_x + second.z], x[from_x + second.w]);
            let rotated = rotate_pairs(a, b, pairs, positions[row]);
{% for e in "xyzw" %}
            if (pairs.{{ e }} < ROTARY_PAIRS) {
                y[to_y + first.{{ e }}] = rotated.first.{{ e }};
                y[to_y + second.{{ e }}] = rotated.second.{{ e }};
            }
{% endfor %}
        }
    }
}
{% endif %}

@compute @workgroup_size({{ lanes }})
fn head_linear(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let num_rows = arrayLength(&y) / (NUM_HEADS * Y_WIDTH);
    let head = workgroup.z;
    let parts = {{ "BLOCKS + 1u" if rope else "BLOCKS" }};
    let block = workgroup.x % parts;
    let first_row = (workgroup.x / parts * MAX_GRID + workgroup.y) * ROWS;
{% if rope %}
    if (block == BLOCKS) {
        rotate_rest(head, first_row, num_rows, lane);
        return;
    }
{% endif %}
    let first_pack = (head * BLOCKS + block) * ROW_PACKS * LANES + lane;
{% if quantised %}
    let first_scale = (head * BLOCKS + block) * ROW_SCALES * LANES + 4u * lane;
{% endif %}
{% for r in range(rows) %}
    var sum{{ r }} = 0.0;
{% endfor %}
    for (var first = 0u; first < IN; first += SLICE) {
        workgroupBarrier();
        for (var i = lane; i < ROWS * SLICE; i += LANES) {
            let row = first_row + i / SLICE;
            let k = first + i % SLICE;
            var value = 0.0;
            if (row < num_rows && k < IN) {
                value = x[(row * NUM_HEADS + head) * X_WIDTH + k];
            }
            inputs[i] = value;
        }
        workgroupBarrier();
        let end = min(SLICE, IN - first);
        for (var at = 0u; at < end; at += {{ per_pack }}u) {
            let pack = w[first_pack + (first + at) / {{ per_pack }}u * LANES];
{% if quantised %}
            let group = (first + at) / {{ group_size }}u;
            let word = scales[first_scale + group / 4u * 4u * LANES + group % 4u];
            let scale = {{ parts.scale_of("word") }};
            let zero = {{ parts.min_of("word") }};
{% endif %}
{% for e in range(per_pack) %}
            {
{% if quantised %}
                let weight = fma({{ parts.widen("pack", e) }}, scale, zero);
{% else %}
                let weight = {{ parts.widen("pack", e) }};
{% endif %}
{% for r in range(rows) %}
                sum{{ r }} = fma(weight, inputs[{{ r * slice + e }}u + at], sum{{ r }});
{% endfor %}
            }
{% endfor %}
        }
    }
    let column = block * LANES + lane;
    if (column < OUT) {
{% for r in range(rows) %}
        if (first_row + {{ r }}u < num_rows) {
            y[((first_row + {{ r }}u) * NUM_HEADS + head) * Y_WIDTH + column] = sum{{ r }};
        }
{% endfor %}
    }
}
