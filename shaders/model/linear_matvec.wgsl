{#
y = activate(x W^T + bias) for a few rows of x, on GPUs: the invocations of a workgroup stride over the packs of COLS rows of W, so that loads are
16 bytes wide and contiguous, and each pack is read once for ROWS rows of x. Sums meet by subgroups, or in workgroup memory.

Iterations per invocation: ceil(row_packs / SIZE) + SIZE / (ROWS * COLS) + ROWS * COLS.
Workgroup memory: `partial`.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}
{% set quantised = format in ["int8", "int4"] %}
{% set outputs = rows * cols %}
{% set xyzw = ["x", "y", "z", "w"] %}
{% include "model/linear_params.wgsl" %}

const SIZE: u32 = {{ workgroup_size }}u;
const ROWS: u32 = {{ rows }}u;
const COLS: u32 = {{ cols }}u;
const OUTPUTS: u32 = {{ outputs }}u;

// [rows of W, row_packs] packs of packed weights
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<f32>" if aligned else "f32" }}>;
// [rows, out_features]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
// [rows of W, row_groups] words
@group(0) @binding(4) var<storage, read> scales: array<u32>;
{% endif %}
{% if bias %}
// [out_features]
@group(0) @binding({{ 5 if quantised else 4 }}) var<storage, read> bias: array<f32>;
{% endif %}

{% if subgroups %}
// [OUTPUTS, subgroups]; of four lanes at least
var<workgroup> partial: array<f32, {{ outputs * workgroup_size // 4 }}>;
{% else %}
// [OUTPUTS, SIZE + 1]; one more, so that the rows start in different banks
var<workgroup> partial: array<f32, {{ outputs * (workgroup_size + 1) }}>;
// [OUTPUTS, SIZE / OUTPUTS]
var<workgroup> partial2: array<f32, {{ workgroup_size }}>;
{% endif %}

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{% include "model/linear_x.wgsl" %}

@compute @workgroup_size({{ workgroup_size }})
fn linear(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if subgroups %}
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_invocation_id) subgroup_lane: u32,
{% endif %}
) {
    let num_rows = arrayLength(&y) / params.out_features;
    let first_row = workgroup.y * ROWS;
    let first_col = (workgroup.x + workgroup.z * grid.x) * COLS;
    let last_col = params.last_row - params.first_row;
{% for c in range(cols) %}
    let col{{ c }} = min(first_col + {{ c }}u, last_col);
    let w_row{{ c }} = col{{ c }} * params.row_packs;
{% for r in range(rows) %}
    var acc{{ c }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
    let x_row{{ r }} = min(first_row + {{ r }}u, num_rows - 1u) * params.in_features;
{% endfor %}

    for (var pack = lane; pack < params.row_packs; pack += SIZE) {
        let k = pack * {{ per_pack }}u;
{% for c in range(cols) %}
        let w{{ c }} = w[w_row{{ c }} + pack];
{% if quantised %}
        let word{{ c }} = scales[col{{ c }} * params.row_groups + k / {{ group_size }}u];
        let scale{{ c }} = {{ parts.scale_of("word" ~ c) }};
        let min{{ c }} = {{ parts.min_of("word" ~ c) }};
{% endif %}
{% endfor %}
{% for e in range(0, per_pack, 4) %}
        {
{% for c in range(cols) %}
            let v{{ c }} = vec4<f32>({% for i in range(4) %}{{ ", " if i }}{{ parts.widen("w" ~ c, e + i) }}{% endfor %})
                {%- if quantised %} * scale{{ c }}{% endif %}{% if quantised %} + min{{ c }}{% endif %};
{% endfor %}
{% for r in range(rows) %}
            {
                let b = x_at(x_row{{ r }}, k + {{ e }}u);
{% for c in range(cols) %}
                acc{{ c }}_{{ r }} = fma(v{{ c }}.x, b.x, fma(v{{ c }}.y, b.y, fma(v{{ c }}.z, b.z, fma(v{{ c }}.w, b.w, acc{{ c }}_{{ r }}))));
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
    }

{% if subgroups %}
{% for c in range(cols) %}
{% for r in range(rows) %}
    let sum{{ c }}_{{ r }} = subgroupAdd(acc{{ c }}_{{ r }});
{% endfor %}
{% endfor %}
    if (subgroup_lane == 0u) {
{% for c in range(cols) %}
{% for r in range(rows) %}
        partial[{{ r * cols + c }}u * (SIZE / 4u) + subgroup] = sum{{ c }}_{{ r }};
{% endfor %}
{% endfor %}
    }
    workgroupBarrier();
    let count = num_subgroups;
    let first = lane * (SIZE / 4u);
{% else %}
{% for c in range(cols) %}
{% for r in range(rows) %}
    partial[{{ (r * cols + c) * (workgroup_size + 1) }}u + lane] = acc{{ c }}_{{ r }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
    let count = SIZE / OUTPUTS;
    let start = lane / count * (SIZE + 1u) + lane % count * OUTPUTS;
    var part = 0.0;
    for (var i = 0u; i < OUTPUTS; i++) {
        part += partial[start + i];
    }
    partial2[lane] = part;
    workgroupBarrier();
    let first = lane * count;
{% endif %}
    let row = first_row + lane / COLS;
    let col = first_col + lane % COLS;
    if (lane < OUTPUTS && row < num_rows && col <= last_col) {
        var value = 0.0;
        for (var i = 0u; i < count; i++) {
            value += {{ "partial" if subgroups else "partial2" }}[first + i];
        }
{% if bias %}
        value += bias[params.first_row + col];
{% endif %}
{% if activation != "none" %}
        value = activate(value);
{% endif %}
        let at = row * params.out_features + params.first_row + col;
        if (params.accumulate != 0u) {
            value += y[at];
        }
        y[at] = value;
    }
}
