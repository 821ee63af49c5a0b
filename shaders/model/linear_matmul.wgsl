{#
y = activate(x W^T + bias) for many rows of x, on GPUs: a workgroup computes a tile of `rows` x `cols`, each invocation 8 rows x 4 columns of it, from
slices of 16 inputs that lie in workgroup memory as f32, k-major. While a slice is in use the next one is on its way to registers.

With `norm` x is that of RMSNorm: it is multiplied by the weights on its way to workgroup memory, and the sums, which are linear in it, by
1 / sqrt(mean square + eps) at the end, when all squares have been seen. If `gated`, the tile's columns are those of gate and up of half as many columns of y
in alternation.

Iterations per invocation: 2 * ceil(in_features / 16) + 8.
Workgroup memory: slices of [16, rows + 4] and [16, cols + 4] f32 (the 4 spread the columns over the banks).
#}
{% import "model/linear_parts.wgsl" as parts %}
{% import "model/linear_outputs.wgsl" as outputs %}
{% import "model/linear_tiles.wgsl" as tiles %}
{% set out_vec_len = outputs.vec_len(gated, out_aligned) | int %}
{% set quantised = format in ["int8", "int4"] %}
{% set w_type = {"f32": "vec4<u32>", "f16": "vec4<u32>", "int8": "vec2<u32>", "int4": "u32"}[format] %}
{% set xyzw = ["x", "y", "z", "w"] %}
{# What an invocation brings of a slice: 4 inputs of some rows of x, and 8 of some rows of W; rows apart. #}
{% set x_loads = rows * 4 // workgroup_size %}
{% set x_stride = workgroup_size // 4 %}
{% set w_loads = cols * 2 // workgroup_size %}
{% set w_stride = workgroup_size // 2 %}
{% include "model/linear_params.wgsl" %}

const ROWS: u32 = {{ rows }}u;
const COLS: u32 = {{ cols }}u;
const SLICE: u32 = 16u;
// vec4 of a slice's line.
const X_LINE: u32 = {{ rows // 4 + 1 }}u;
const W_LINE: u32 = {{ cols // 4 + 1 }}u;

// [rows of W, row_packs] packs of packed weights; 8 weights at a time
@group(0) @binding(0) var<storage, read> w: array<{{ w_type }}>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<f32>" if aligned else "f32" }}>;
// {{ outputs.shape(regions) }}
@group(0) @binding(2) var<storage, read_write> y: array<{{ outputs.vec_type(gated, out_aligned) }}>;
{% include "model/linear_bindings.wgsl" %}

var<workgroup> x_slice: array<vec4<f32>, {{ 16 * (rows // 4 + 1) }}>;
var<workgroup> w_slice: array<vec4<f32>, {{ 16 * (cols // 4 + 1) }}>;

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
) {
    let num_rows = arrayLength(&y){% if out_aligned %} * {{ out_vec_len }}u{% endif %} / {{ outputs.width(y_width) }};
{{ tiles.tile() }}
    // Columns of the tile: rows of this binding of W.
    let first_col = (workgroup.x + workgroup.z * grid.x) * COLS;
    let last_col = {{ "2u * (params.last_row - params.first_row) + 1u" if gated else "params.last_row - params.first_row" }};

    // What this invocation brings: 4 inputs of rows of x, and 8 of rows of W.
    let load_row = lane / 4u;
    let load_k = lane % 4u * 4u;
{% for n in range(x_loads) %}
    let x_row{{ n }} = x_row(min(first_row + load_row + {{ n * x_stride }}u, end_row - 1u), num_rows) * params.in_features;
{% endfor %}
    let load_col = lane / 2u;
    let load_unit = lane % 2u;
{% for n in range(w_loads) %}
    let w_col{{ n }} = {{ "own_expert * (last_col + 1u) + " if experts }}min(first_col + load_col + {{ n * w_stride }}u, last_col);
    let w_row{{ n }} = w_col{{ n }} * params.row_packs * {{ {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] // 8 or 1 }}u;
{% endfor %}

    // What it computes.
    let tile_row = lane / (COLS / 4u) * 2u;
    let tile_col = lane % (COLS / 4u);
{% for i in range(8) %}
    var acc{{ i }} = vec4<f32>();
{% endfor %}

{% for n in range(x_loads) %}
    var x{{ n }} = x_at(x_row{{ n }}, load_k);
{% endfor %}
{% macro load_w(k, declare) %}
{% for n in range(w_loads) %}
{% if format == "f32" %}
    {{ declare }}w_lo{{ n }} = w[w_row{{ n }} + {{ k }} / 4u + load_unit * 2u];
    {{ declare }}w_hi{{ n }} = w[w_row{{ n }} + {{ k }} / 4u + load_unit * 2u + 1u];
{% else %}
    {{ declare }}w_words{{ n }} = w[w_row{{ n }} + {{ k }} / 8u + load_unit];
{% endif %}
{% if quantised %}
    {{ declare }}w_scale{{ n }} = scales[w_col{{ n }} * params.row_groups + {{ k }} / {{ group_size }}u];
{% endif %}
{% endfor %}
{% endmacro %}
{{ load_w("0u", "var ") }}
{% if norm %}
    var gain = norm_at(load_k);
{% for n in range(x_loads) %}
    var squares{{ n }} = 0.0;
{% endfor %}
{% endif %}
    for (var k = 0u; k < params.in_features; k += SLICE) {
{% if norm %}
{% for n in range(x_loads) %}
        squares{{ n }} += dot(x{{ n }}, x{{ n }});
{% endfor %}
{% for n in range(x_loads) %}
        x{{ n }} *= gain;
{% endfor %}
{% endif %}
{% for i in range(4) %}
{% for n in range(x_loads) %}
        x_slice[(load_k + {{ i }}u) * X_LINE + load_row / 4u{{ " + %du"|format(n * x_stride // 4) if n }}][load_row % 4u] = x{{ n }}.{{ xyzw[i] }};
{% endfor %}
{% endfor %}
{% for n in range(w_loads) %}
{% for e in range(8) %}
        w_slice[(load_unit * 8u + {{ e }}u) * W_LINE + load_col / 4u{{ " + %du"|format(n * w_stride // 4) if n }}][load_col % 4u] = {{ parts.unit_value(n, e) }}
            {%- if quantised %} * {{ parts.scale_of("w_scale" ~ n) }} + {{ parts.min_of("w_scale" ~ n) }}{% endif %};
{% endfor %}
{% endfor %}
        workgroupBarrier();
        // Beyond the last slice the first one is loaded again, to no use.
        let next = select(0u, k + SLICE, k + SLICE < params.in_features);
{% for n in range(x_loads) %}
        x{{ n }} = x_at(x_row{{ n }}, next + load_k);
{% endfor %}
{% if norm %}
        gain = norm_at(next + load_k);
{% endif %}
{{ load_w("next", "") }}
{% for i in range(16) %}
        {
            let a = x_slice[{{ i }}u * X_LINE + tile_row];
            let b = x_slice[{{ i }}u * X_LINE + tile_row + 1u];
            let v = w_slice[{{ i }}u * W_LINE + tile_col];
{% for r in range(8) %}
            acc{{ r }} = fma(vec4<f32>({{ "a" if r < 4 else "b" }}.{{ xyzw[r % 4] }}), v, acc{{ r }});
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
    }

{% if norm %}
    // Four invocations have the squares of a row.
{% for n in range(x_loads) %}
    x_slice[load_row{{ " + %du"|format(n * x_stride) if n }}][lane % 4u] = squares{{ n }};
{% endfor %}
    workgroupBarrier();
{% endif %}
    let col = first_col + tile_col * 4u;
    let out_col = params.first_row + {{ "col / 2u" if gated else "col" }};
    let row0 = first_row + tile_row * 4u;
{% if bias %}
{{ outputs.offset(gated) }}
{% endif %}
{% for r in range(8) %}
    if (row0 + {{ r }}u < end_row && col <= last_col) {
        var sums = acc{{ r }};
{% if norm %}
        let squares = x_slice[tile_row * 4u + {{ r }}u];
        sums *= 1.0 / sqrt((squares.x + squares.y + squares.z + squares.w) / f32(params.in_features) + params.norm_eps);
{% endif %}
{{ outputs.store("row0 + %du"|format(r), bias, gated, activation, out_aligned) }}
    }
{% endfor %}
}
