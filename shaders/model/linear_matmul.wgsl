{#
y = activate(x W^T + bias) for many rows of x, on GPUs: a workgroup computes a tile of 64 x 64, each invocation 8 rows x 4 columns of it, from slices of
16 inputs that lie in workgroup memory as f32, k-major. While a slice is in use the next one is on its way to registers.

With `norm` x is that of RMSNorm: it is multiplied by the weights on its way to workgroup memory, and the sums, which are linear in it, by
1 / sqrt(mean square + eps) at the end, when all squares have been seen. If `gated`, the tile's columns are those of gate and up of 32 columns of y in
alternation.

Iterations per invocation: 2 * ceil(in_features / 16) + 8.
Workgroup memory: two slices of [16, 64 + 4] f32 (the 4 spread the columns over the banks).
#}
{% import "model/linear_parts.wgsl" as parts %}
{% import "model/linear_outputs.wgsl" as outputs %}
{% set out_vec = ("vec2<f32>" if gated else "vec4<f32>") if out_aligned else "f32" %}
{% set out_vec_len = (2 if gated else 4) if out_aligned else 1 %}
{% set quantised = format in ["int8", "int4"] %}
{% set w_type = {"f32": "vec4<u32>", "f16": "vec4<u32>", "int8": "vec2<u32>", "int4": "u32"}[format] %}
{% set xyzw = ["x", "y", "z", "w"] %}
{% include "model/linear_params.wgsl" %}

const TILE: u32 = 64u;
const SLICE: u32 = 16u;
// vec4 of a slice's line.
const LINE: u32 = 17u;

// [rows of W, row_packs] packs of packed weights; 8 weights at a time
@group(0) @binding(0) var<storage, read> w: array<{{ w_type }}>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<f32>" if aligned else "f32" }}>;
// {{ outputs.shape(regions) }}
@group(0) @binding(2) var<storage, read_write> y: array<{{ out_vec }}>;
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
// [rows of W, row_groups] words
@group(0) @binding(4) var<storage, read> scales: array<u32>;
{% endif %}
{% if bias %}
// [{{ "gate and up, " if gated }}out_features]
@group(0) @binding({{ 5 if quantised else 4 }}) var<storage, read> bias: array<f32>;
{% endif %}
{% if norm %}
// [in_features]
@group(0) @binding({{ 4 + quantised + bias }}) var<storage, read> norm_weight: array<{{ "vec4<f32>" if aligned else "f32" }}>;
{% endif %}

var<workgroup> x_slice: array<vec4<f32>, 272>;
var<workgroup> w_slice: array<vec4<f32>, 272>;

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{% include "model/linear_x.wgsl" %}

{{ outputs.place(regions) }}

@compute @workgroup_size(128)
fn linear(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let num_rows = arrayLength(&y){% if out_aligned %} * {{ out_vec_len }}u{% endif %} / {{ outputs.width(y_width) }};
    let first_row = workgroup.y * TILE;
    // Columns of the tile: rows of this binding of W.
    let first_col = (workgroup.x + workgroup.z * grid.x) * TILE;
    let last_col = {{ "2u * (params.last_row - params.first_row) + 1u" if gated else "params.last_row - params.first_row" }};

    // What this invocation brings: 4 inputs of two rows of x, and 8 of one row of W.
    let load_row = lane / 4u;
    let load_k = lane % 4u * 4u;
    let x_row0 = min(first_row + load_row, num_rows - 1u) * params.in_features;
    let x_row1 = min(first_row + load_row + 32u, num_rows - 1u) * params.in_features;
    let load_col = lane / 2u;
    let load_unit = lane % 2u;
    let w_col = min(first_col + load_col, last_col);
    let w_row = w_col * params.row_packs * {{ {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] // 8 or 1 }}u;

    // What it computes.
    let tile_row = lane / 16u * 2u;
    let tile_col = lane % 16u;
{% for i in range(8) %}
    var acc{{ i }} = vec4<f32>();
{% endfor %}

    var x0 = x_at(x_row0, load_k);
    var x1 = x_at(x_row1, load_k);
{% macro load_w(k, declare) %}
{% if format == "f32" %}
    {{ declare }}w_lo = w[w_row + {{ k }} / 4u + load_unit * 2u];
    {{ declare }}w_hi = w[w_row + {{ k }} / 4u + load_unit * 2u + 1u];
{% else %}
    {{ declare }}w_words = w[w_row + {{ k }} / 8u + load_unit];
{% endif %}
{% if quantised %}
    {{ declare }}w_scale = scales[w_col * params.row_groups + {{ k }} / {{ group_size }}u];
{% endif %}
{% endmacro %}
{{ load_w("0u", "var ") }}
{% if norm %}
    var gain = norm_at(load_k);
    var squares0 = 0.0;
    var squares1 = 0.0;
{% endif %}
    for (var k = 0u; k < params.in_features; k += SLICE) {
{% if norm %}
        squares0 += dot(x0, x0);
        squares1 += dot(x1, x1);
        x0 *= gain;
        x1 *= gain;
{% endif %}
{% for i in range(4) %}
        x_slice[(load_k + {{ i }}u) * LINE + load_row / 4u][load_row % 4u] = x0.{{ xyzw[i] }};
        x_slice[(load_k + {{ i }}u) * LINE + load_row / 4u + 8u][load_row % 4u] = x1.{{ xyzw[i] }};
{% endfor %}
{% for e in range(8) %}
{% if format == "f32" %}
{% set value = parts.widen("w_lo" if e < 4 else "w_hi", e % 4) %}
{% elif format == "int4" %}
{% set value = "f32((w_words >> " ~ 4 * e ~ "u) & 15u)" %}
{% else %}
{% set value = parts.widen("w_words", e) %}
{% endif %}
        w_slice[(load_unit * 8u + {{ e }}u) * LINE + load_col / 4u][load_col % 4u] = {{ value }}
            {%- if quantised %} * {{ parts.scale_of("w_scale") }}{% endif %}{% if quantised %} + {{ parts.min_of("w_scale") }}{% endif %};
{% endfor %}
        workgroupBarrier();
        // Beyond the last slice the first one is loaded again, to no use.
        let next = select(0u, k + SLICE, k + SLICE < params.in_features);
        x0 = x_at(x_row0, next + load_k);
        x1 = x_at(x_row1, next + load_k);
{% if norm %}
        gain = norm_at(next + load_k);
{% endif %}
{{ load_w("next", "") }}
{% for i in range(16) %}
        {
            let a = x_slice[{{ i }}u * LINE + tile_row];
            let b = x_slice[{{ i }}u * LINE + tile_row + 1u];
            let v = w_slice[{{ i }}u * LINE + tile_col];
{% for r in range(8) %}
            acc{{ r }} = fma(vec4<f32>({{ "a" if r < 4 else "b" }}.{{ xyzw[r % 4] }}), v, acc{{ r }});
{% endfor %}
        }
{% endfor %}
        workgroupBarrier();
    }

{% if norm %}
    // Four invocations have the squares of a row.
    x_slice[load_row][lane % 4u] = squares0;
    x_slice[load_row + 32u][lane % 4u] = squares1;
    workgroupBarrier();
{% endif %}
    let col = first_col + tile_col * 4u;
    let out_col = params.first_row + {{ "col / 2u" if gated else "col" }};
    let row0 = first_row + tile_row * 4u;
{% if bias %}
    let last = params.last_row;
{% if gated %}
    let up_bias = params.out_features;
    let next_col = min(out_col + 1u, last);
    let own_col = min(out_col, last);
    let offset = vec4<f32>(bias[own_col], bias[up_bias + own_col], bias[next_col], bias[up_bias + next_col]);
{% else %}
    let offset = vec4<f32>(bias[min(out_col, last)], bias[min(out_col + 1u, last)], bias[min(out_col + 2u, last)], bias[min(out_col + 3u, last)]);
{% endif %}
{% endif %}
{% for r in range(8) %}
    if (row0 + {{ r }}u < num_rows && col <= last_col) {
        var sums = acc{{ r }};
{% if norm %}
        let squares = x_slice[tile_row * 4u + {{ r }}u];
        sums *= 1.0 / sqrt((squares.x + squares.y + squares.z + squares.w) / f32(params.in_features) + params.norm_eps);
{% endif %}
{% if bias %}
        sums += offset;
{% endif %}
{% if gated %}
{% if activation != "none" %}
        var value = vec2<f32>(activate(sums.x), activate(sums.z)) * sums.yw;
{% else %}
        var value = sums.xz * sums.yw;
{% endif %}
{% elif activation != "none" %}
        var value = vec4<f32>(activate(sums.x), activate(sums.y), activate(sums.z), activate(sums.w));
{% else %}
        var value = sums;
{% endif %}
        let at = y_at(row0 + {{ r }}u, out_col, num_rows);
{% if out_aligned %}
        if (params.accumulate != 0u) {
            value += y[at / {{ out_vec_len }}u];
        }
        y[at / {{ out_vec_len }}u] = value;
{% else %}
{% for i in range(2 if gated else 4) %}
        if (col + {{ 2 * i if gated else i }}u <= last_col) {
            if (params.accumulate != 0u) {
                value.{{ xyzw[i] }} += y[at + {{ i }}u];
            }
            y[at + {{ i }}u] = value.{{ xyzw[i] }};
        }
{% endfor %}
{% endif %}
    }
{% endfor %}
}
