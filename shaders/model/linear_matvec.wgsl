{#
y = activate(x W^T + bias) for a few rows of x, on GPUs: the invocations of a workgroup stride over the packs of COLS rows of W, so that loads are
16 bytes wide and contiguous, and each pack is read once for ROWS rows of x. Sums meet by subgroups, or in workgroup memory.

With `norm` x is that of RMSNorm: it is multiplied by the weights as it is loaded, and the sums, which are linear in it, by 1 / sqrt(mean square + eps)
at the end, when all squares have been seen. If `gated`, neighbouring rows of W are those of gate and up of one column of y.

Iterations per invocation: ceil(row_packs / SIZE) + SIZE / (ROWS * COLS) + ROWS * COLS; with `norm` SIZE more, if `gated` SIZE / (ROWS * COLS) more.
Workgroup memory: `partial`.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% import "model/linear_outputs.wgsl" as outputs %}
{% import "model/linear_tiles.wgsl" as tiles %}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}
{% set quantised = format in ["int8", "int4"] %}
{% set sums = rows * cols %}
{% set out_cols = cols // 2 if gated else cols %}
{# Sums that meet: the products', and the squares'. #}
{% set all_sums = sums + (rows if norm else 0) %}
{% set xyzw = ["x", "y", "z", "w"] %}
{% include "model/linear_params.wgsl" %}

const SIZE: u32 = {{ workgroup_size }}u;
const ROWS: u32 = {{ rows }}u;
// Rows of W, and columns of y.
const COLS: u32 = {{ cols }}u;
const OUT_COLS: u32 = {{ out_cols }}u;
const SUMS: u32 = {{ sums }}u;

// [rows of W, row_packs] packs of packed weights
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<f32>" if aligned else "f32" }}>;
// {{ outputs.shape(regions) }}
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
{% include "model/linear_bindings.wgsl" %}

{% if subgroups %}
// [SUMS{{ " and squares of ROWS" if norm }}, subgroups]; of four lanes at least
var<workgroup> partial: array<f32, {{ all_sums * workgroup_size // 4 }}>;
{% else %}
// [SUMS{{ " and squares of ROWS" if norm }}, SIZE + 1]; one more, so that the rows start in different banks
var<workgroup> partial: array<f32, {{ all_sums * (workgroup_size + 1) }}>;
// [SUMS, SIZE / SUMS]
var<workgroup> partial2: array<f32, {{ workgroup_size }}>;
{% endif %}

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{% include "model/linear_x.wgsl" %}

{{ outputs.place(regions) }}

{{ tiles.functions() }}

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
    let num_rows = arrayLength(&y) / {{ outputs.width(y_width) }};
{{ tiles.tile() }}
    // Columns of this binding of W.
    let first_col = (workgroup.x + workgroup.z * grid.x) * OUT_COLS;
    let last_col = params.last_row - params.first_row;
{% set own = "own_expert * %s(last_col + 1u) + "|format("2u * " if gated else "") if experts else "" %}
{% for c in range(cols) %}
{% if gated %}
    let col{{ c }} = {{ own }}2u * min(first_col + {{ c // 2 }}u, last_col) + {{ c % 2 }}u;
{% else %}
    let col{{ c }} = {{ own }}min(first_col + {{ c }}u, last_col);
{% endif %}
    let w_row{{ c }} = col{{ c }} * params.row_packs;
{% for r in range(rows) %}
    var acc{{ c }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
{% for r in range(rows) %}
    let x_row{{ r }} = x_row(min(first_row + {{ r }}u, end_row - 1u), num_rows) * params.in_features;
{% if norm %}
    var squares{{ r }} = 0.0;
{% endif %}
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
{% if norm %}
            let g = norm_at(k + {{ e }}u);
{% endif %}
{% for r in range(rows) %}
            {
{% if norm %}
                let raw = x_at(x_row{{ r }}, k + {{ e }}u);
                squares{{ r }} += dot(raw, raw);
                let b = raw * g;
{% else %}
                let b = x_at(x_row{{ r }}, k + {{ e }}u);
{% endif %}
{% for c in range(cols) %}
                acc{{ c }}_{{ r }} = fma(v{{ c }}.x, b.x, fma(v{{ c }}.y, b.y, fma(v{{ c }}.z, b.z, fma(v{{ c }}.w, b.w, acc{{ c }}_{{ r }}))));
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
    }

{% if subgroups %}
{% for r in range(rows) %}
{% for c in range(cols) %}
    let sum{{ c }}_{{ r }} = subgroupAdd(acc{{ c }}_{{ r }});
{% endfor %}
{% if norm %}
    let square_sum{{ r }} = subgroupAdd(squares{{ r }});
{% endif %}
{% endfor %}
    if (subgroup_lane == 0u) {
{% for r in range(rows) %}
{% for c in range(cols) %}
        partial[{{ r * cols + c }}u * (SIZE / 4u) + subgroup] = sum{{ c }}_{{ r }};
{% endfor %}
{% if norm %}
        partial[{{ sums + r }}u * (SIZE / 4u) + subgroup] = square_sum{{ r }};
{% endif %}
{% endfor %}
    }
    workgroupBarrier();
    let count = num_subgroups;
    let stride = SIZE / 4u;
{% else %}
{% for r in range(rows) %}
{% for c in range(cols) %}
    partial[{{ (r * cols + c) * (workgroup_size + 1) }}u + lane] = acc{{ c }}_{{ r }};
{% endfor %}
{% if norm %}
    partial[{{ (sums + r) * (workgroup_size + 1) }}u + lane] = squares{{ r }};
{% endif %}
{% endfor %}
    workgroupBarrier();
    let count = SIZE / SUMS;
    let stride = count;
    let start = lane / count * (SIZE + 1u) + lane % count * SUMS;
    var part = 0.0;
    for (var i = 0u; i < SUMS; i++) {
        part += partial[start + i];
    }
    partial2[lane] = part;
    workgroupBarrier();
{% endif %}
    let row = first_row + lane / OUT_COLS;
    let col = first_col + lane % OUT_COLS;
    if (lane < {{ rows * out_cols }}u && row < end_row && col <= last_col) {
        var value = 0.0;
{% if gated %}
        var up = 0.0;
{% endif %}
        for (var i = 0u; i < count; i++) {
{% set partials = "partial" if subgroups else "partial2" %}
{% if gated %}
            value += {{ partials }}[2u * lane * stride + i];
            up += {{ partials }}[(2u * lane + 1u) * stride + i];
{% else %}
            value += {{ partials }}[lane * stride + i];
{% endif %}
        }
{% if norm %}
        var squares = 0.0;
{% if subgroups %}
        let squares_at = (SUMS + lane / OUT_COLS) * stride;
        for (var i = 0u; i < count; i++) {
{% else %}
        let squares_at = (SUMS + lane / OUT_COLS) * (SIZE + 1u);
        for (var i = 0u; i < SIZE; i++) {
{% endif %}
            squares += partial[squares_at + i];
        }
        let scale = 1.0 / sqrt(squares / f32(params.in_features) + params.norm_eps);
        value *= scale;
{% if gated %}
        up *= scale;
{% endif %}
{% endif %}
{% if bias %}
        value += bias[{{ tiles.bias_at() }}params.first_row + col];
{% if gated %}
        up += bias[{{ tiles.bias_at() }}params.out_features + params.first_row + col];
{% endif %}
{% endif %}
{% if gated %}
        value = {{ "gate(value, up)" if activation != "none" else "value * up" }};
{% elif activation != "none" %}
        value = activate(value);
{% endif %}
        let at = y_at(y_row(row, num_rows), params.first_row + col, num_rows);
        if (params.accumulate != 0u) {
            value += y[at];
        }
        y[at] = value;
    }
}
