{#
norm: RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) of each row.

A workgroup has ROWS rows, and LANES invocations for each. With `held` (GPUs) the text is unrolled and a row is read once into
registers; without it (CPU adapters) loops read it again for each sum.

LayerNorm's moments are taken around a first mean, and what that mean was off by is corrected afterwards (Chan, Golub and LeVeque 1983,
"Algorithms for computing the sample variance", the corrected two-pass algorithm): rows of a large mean and a small variance lose nothing.

Iterations per invocation: 0 with `held`; otherwise 2 (RMSNorm) or 3 (LayerNorm) times ceil(VECS / LANES).
Workgroup memory: two values per invocation; none with one invocation per row.
#}
{% set source = "out" if in_place else "x" %}
{% set element = "vec4<u64>" if wide else "vec4<f32>" %}
{% set halves = ["low(e)", "high(e)"] if wide else ["e"] %}
{% set parts = (vecs + lanes - 1) // lanes %}
{% set sums = "vec2<f32>" if layer else "f32" %}
const VECS: u32 = {{ vecs }}u;  // elements of a row: of 4 values, or (`wide`) 8
const LANES: u32 = {{ lanes }}u;  // invocations of a row
const ROWS: u32 = {{ rows }}u;  // of a workgroup
const WIDTH: f32 = {{ width }}.0;
const EPS: f32 = {{ eps }};
const GRID_X: u32 = {{ grid_x }}u;

{% if in_place %}
@group(0) @binding(0) var<storage, read_write> out: array<{{ element }}>;  // [rows, VECS]
{% else %}
@group(0) @binding(0) var<storage, read> x: array<{{ element }}>;  // [rows, VECS]
@group(0) @binding(1) var<storage, read_write> out: array<{{ element }}>;  // [rows, VECS]
{% endif %}
@group(0) @binding({{ 1 if in_place else 2 }}) var<storage, read> weight: array<{{ element }}>;  // [VECS]
{% if bias %}
@group(0) @binding({{ 2 if in_place else 3 }}) var<storage, read> bias: array<{{ element }}>;  // [VECS]
{% endif %}
{% if lanes > 1 %}

var<workgroup> partial: array<{{ sums }}, {{ lanes * rows }}>;
{% if lanes > 16 %}
var<workgroup> partial16: array<{{ sums }}, {{ lanes * rows }}>;
{% endif %}

// The sum over the lanes of a row, in all of them.
fn row_sum(value: {{ sums }}, lane: u32) -> {{ sums }} {
    let first = lane - lane % LANES;
    workgroupBarrier();
    partial[lane] = value;
    workgroupBarrier();
{% if lanes <= 16 %}
    var sum = partial[first];
{% for i in range(1, lanes) %}
    sum += partial[first + {{ i }}u];
{% endfor %}
{% else %}
    let group = lane - lane % 16u;
    var sum16 = partial[group];
{% for i in range(1, 16) %}
    sum16 += partial[group + {{ i }}u];
{% endfor %}
    partial16[lane] = sum16;
    workgroupBarrier();
    var sum = partial16[first];
{% for i in range(1, lanes // 16) %}
    sum += partial16[first + {{ i * 16 }}u];
{% endfor %}
{% endif %}
    return sum;
}
{% else %}

fn row_sum(value: {{ sums }}, lane: u32) -> {{ sums }} {
    return value;
}
{% endif %}

{% if wide %}
{% include "model/wide.wgsl" %}

{% endif %}
fn across(v: vec4<f32>) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}

{# The body for each of the lane's elements of the row, which it sees as `e`; `c` is its place. #}
{% macro each_element() %}
{% if held %}
{% for j in range(parts) %}
{% if (j + 1) * lanes > vecs %}
    if (i < {{ vecs - j * lanes }}u) {
{% else %}
    {
{% endif %}
        let c = i + {{ j * lanes }}u;
        let e = e{{ j }};
{{ caller() }}
    }
{% endfor %}
{% else %}
    for (var c = i; c < VECS; c += LANES) {
        let e = {{ source }}[base + c];
{{ caller() }}
    }
{% endif %}
{% endmacro %}
{# A vec4 of the result, from those of the row, the weight, the bias and what it is added to. #}
{% macro normed(v, w, b, old) -%}
  {% if accumulate %}{{ old }} + {% endif %}{% if layer %}(({{ v }} - first_mean) - mean){% else %}{{ v }}{% endif %} * scale * {{ w }}{% if bias %} + {{ b }}{% endif %}
{%- endmacro %}
@compute @workgroup_size({{ lanes * rows }})
fn norm(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (workgroup.y * GRID_X + workgroup.x) * ROWS + lane / LANES;
    let num_rows = arrayLength(&out) / VECS;
    // Surplus lanes take part in the barriers with the last row, and write nothing.
    let base = min(row, num_rows - 1u) * VECS;
    let i = lane % LANES;
{% if held %}
{% for j in range(parts) %}
{% if (j + 1) * lanes > vecs %}
    let e{{ j }} = {{ source }}[base + min(i + {{ j * lanes }}u, VECS - 1u)];
{% else %}
    let e{{ j }} = {{ source }}[base + i + {{ j * lanes }}u];
{% endif %}
{% endfor %}
{% endif %}

    var sum = vec4<f32>(0.0);
{% if layer %}
{% call each_element() %}
{% for v in halves %}
        sum += {{ v }};
{%- endfor %}

{%- endcall %}
    let first_mean = row_sum(vec2<f32>(across(sum), 0.0), lane).x / WIDTH;
    var squares = vec4<f32>(0.0);
    sum = vec4<f32>(0.0);
{% call each_element() %}
{% for v in halves %}
        let d{{ loop.index }} = {{ v }} - first_mean;
        sum += d{{ loop.index }};
        squares += d{{ loop.index }} * d{{ loop.index }};
{%- endfor %}

{%- endcall %}
    let moments = row_sum(vec2<f32>(across(sum), across(squares)), lane) / WIDTH;
    let mean = moments.x;  // of what is left after the first mean
    let scale = 1.0 / sqrt(max(moments.y - mean * mean, 0.0) + EPS);
{% else %}
{% call each_element() %}
{% for v in halves %}
        let v{{ loop.index }} = {{ v }};
        sum += v{{ loop.index }} * v{{ loop.index }};
{%- endfor %}

{%- endcall %}
    let scale = 1.0 / sqrt(row_sum(across(sum), lane) / WIDTH + EPS);
{% endif %}

    if (row < num_rows) {
{% call each_element() %}
        let w = weight[c];
{% if bias %}
        let b = bias[c];
{% endif %}
{% if wide %}
{% if accumulate %}
        let old = out[base + c];
{% endif %}
        out[base + c] = join({{ normed("low(e)", "low(w)", "low(b)", "low(old)") }}, {{ normed("high(e)", "high(w)", "high(b)", "high(old)") }});
{% else %}
        out[base + c] = {{ normed("e", "w", "b", "out[base + c]") }};
{% endif %}
{%- endcall %}
    }
}
