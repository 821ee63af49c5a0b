{#
y = activate(x W^T + bias) for many rows of x, on GPUs: a workgroup computes a tile of 64 x 64, each invocation 8 rows x 4 columns of it, from slices of
16 inputs that lie in workgroup memory as f32, k-major. While a slice is in use the next one is on its way to registers.

Iterations per invocation: 2 * ceil(in_features / 16) + 8.
Workgroup memory: two slices of [16, 64 + 4] f32 (the 4 spread the columns over the banks).
#}
{% import "model/linear_parts.wgsl" as parts %}
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
// [rows, out_features]
@group(0) @binding(2) var<storage, read_write> y: array<{{ "vec4<f32>" if out_aligned else "f32" }}>;
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
// [rows of W, row_groups] words
@group(0) @binding(4) var<storage, read> scales: array<u32>;
{% endif %}
{% if bias %}
// [out_features]
@group(0) @binding({{ 5 if quantised else 4 }}) var<storage, read> bias: array<f32>;
{% endif %}

var<workgroup> x_slice: array<vec4<f32>, 272>;
var<workgroup> w_slice: array<vec4<f32>, 272>;

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{% include "model/linear_x.wgsl" %}

@compute @workgroup_size(128)
fn linear(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let num_rows = arrayLength(&y){% if out_aligned %} * 4u{% endif %} / params.out_features;
    let first_row = workgroup.y * TILE;
    let first_col = (workgroup.x + workgroup.z * grid.x) * TILE;
    let last_col = params.last_row - params.first_row;

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
    for (var k = 0u; k < params.in_features; k += SLICE) {
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

    let col = first_col + tile_col * 4u;
    let row0 = first_row + tile_row * 4u;
{% if bias %}
    let last = params.last_row;
    let bias_at = params.first_row + col;
    let offset = vec4<f32>(bias[min(bias_at, last)], bias[min(bias_at + 1u, last)], bias[min(bias_at + 2u, last)], bias[min(bias_at + 3u, last)]);
{% endif %}
{% for r in range(8) %}
    if (row0 + {{ r }}u < num_rows && col <= last_col) {
        var value = acc{{ r }}{% if bias %} + offset{% endif %};
{% if activation != "none" %}
        value = vec4<f32>(activate(value.x), activate(value.y), activate(value.z), activate(value.w));
{% endif %}
        let at = (row0 + {{ r }}u) * params.out_features + params.first_row + col;
{% if out_aligned %}
        if (params.accumulate != 0u) {
            value += y[at / 4u];
        }
        y[at / 4u] = value;
{% else %}
{% for i in range(4) %}
        if (col + {{ i }}u <= last_col) {
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
