{#
activation: the nonlinearity of an MLP, gated (act(gate) * up, Shazeer 2020, "GLU variants improve transformer") or alone.
One invocation computes one element, 4 values or (`wide`) 8. No loops.

All of them are x * P, where P is a probability that is computed without cancellation: SiLU is x * sigmoid(x); GELU (Hendrycks and
Gimpel 2016) is x * Phi(x) with the normal distribution's Phi; and since 1 + tanh(u) = 2 sigmoid(2u), its tanh form is
x * sigmoid(2u).
#}
{% set element = "vec4<u64>" if wide else "vec4<f32>" %}
const VECS: u32 = {{ vecs }}u;  // elements of a row of `out`
const GRID_X: u32 = {{ grid_x }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;

{% if gated %}
@group(0) @binding(0) var<storage, read> x: array<{{ element }}>;  // [rows, gate then up, VECS]
{% else %}
@group(0) @binding(0) var<storage, read> x: array<{{ element }}>;  // [rows, VECS]
{% endif %}
@group(0) @binding(1) var<storage, read_write> out: array<{{ element }}>;  // [rows, VECS]

{% if wide %}
{% include "model/wide.wgsl" %}

{% endif %}
{% set activation = kind %}
{% set float = "vec4<f32>" %}
{% include "model/activate.wgsl" %}

@compute @workgroup_size(WORKGROUP_SIZE)
fn activation(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * GRID_X + workgroup.x) * WORKGROUP_SIZE + lane;
    if (idx >= arrayLength(&out)) {
        return;
    }
{% if gated %}
    let at = idx + idx / VECS * VECS;
    let g = x[at];
    let up = x[at + VECS];
{% if wide %}
    out[idx] = join(gate(low(g), low(up)), gate(high(g), high(up)));
{% else %}
    out[idx] = gate(g, up);
{% endif %}
{% elif wide %}
    out[idx] = join(activate(low(x[idx])), activate(high(x[idx])));
{% else %}
    out[idx] = activate(x[idx]);
{% endif %}
}
