{#
Moves x to a texture, for the linear kernel of CPU adapters: a workgroup moves one row, and pads it with zeros. With `norm` it goes there
normalised (RMSNorm).

unit: f32 of x per load: 8, 4 or 1.
Iterations per invocation: ceil(in_features / (unit * LANES)), in_features padded to 32; twice with `norm`.
Workgroup memory: with `norm` a sum per invocation.
#}
{% set element = {1: "f32", 4: "vec4<f32>", 8: "vec4<u64>"}[unit] %}
{% set stride = [unit, 4] | max %}
{% include "model/linear_params.wgsl" %}

const LANES: u32 = {{ lanes }}u;

// [rows, in_features padded to 32] as texels of 4
@group(0) @binding(0) var staged: texture_storage_2d<rgba32uint, write>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ element }}>;
@group(0) @binding(2) var<uniform> params: LinearParams;
{% if norm %}
// [in_features]
@group(0) @binding(3) var<storage, read> norm_weight: array<{{ element }}>;

var<workgroup> partial: array<f32, {{ lanes }}>;
{% endif %}
{% if unit == 8 and norm %}

{% include "model/wide.wgsl" %}
{% endif %}

fn store(texel: u32, value: vec4<u32>) {
    textureStore(staged, vec2<u32>(texel & 2047u, texel >> 11u), value);
}

@compute @workgroup_size({{ lanes }})
fn linear_stage(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.y * params.in_features;
    let row_texels = (params.in_features + 31u) / 32u * 8u;
    let first_texel = workgroup.y * row_texels;
{% if norm %}
    var sum = 0.0;
    for (var k = lane * {{ stride }}u; k < params.in_features; k += LANES * {{ stride }}u) {
{% if unit == 8 %}
        let value = x[(row + k) / 8u];
        let low_half = low(value);
        let high_half = high(value);
        sum += dot(low_half, low_half) + dot(high_half, high_half);
{% elif unit == 4 %}
        let value = x[(row + k) / 4u];
        sum += dot(value, value);
{% else %}
{% for i in range(4) %}
        if (k + {{ i }}u < params.in_features) {
            sum += x[row + k + {{ i }}u] * x[row + k + {{ i }}u];
        }
{% endfor %}
{% endif %}
    }
    partial[lane] = sum;
    workgroupBarrier();
    let squares = {% for i in range(lanes) %}{{ " + " if i }}partial[{{ i }}]{% endfor %};
    let scale = 1.0 / sqrt(squares / f32(params.in_features) + params.norm_eps);
{% endif %}
    for (var k = lane * {{ stride }}u; k < row_texels * 4u; k += LANES * {{ stride }}u) {
        let texel = first_texel + k / 4u;
{% if unit == 8 %}
        var value = vec4<u64>();
        if (k < params.in_features) {
            value = x[(row + k) / 8u];
{% if norm %}
            let weight = norm_weight[k / 8u];
            value = join(low(value) * scale * low(weight), high(value) * scale * high(weight));
{% endif %}
        }
        let high_words = value >> vec4<u32>(32u);
        store(texel, vec4<u32>(u32(value.x), u32(high_words.x), u32(value.y), u32(high_words.y)));
        store(texel + 1u, vec4<u32>(u32(value.z), u32(high_words.z), u32(value.w), u32(high_words.w)));
{% elif unit == 4 %}
        var value = vec4<f32>();
        if (k < params.in_features) {
            value = x[(row + k) / 4u]{% if norm %} * scale * norm_weight[k / 4u]{% endif %};
        }
        store(texel, bitcast<vec4<u32>>(value));
{% else %}
        var value = vec4<f32>();
{% for i in range(4) %}
        if (k + {{ i }}u < params.in_features) {
            value.{{ ["x", "y", "z", "w"][i] }} = x[row + k + {{ i }}u]{% if norm %} * scale * norm_weight[k + {{ i }}u]{% endif %};
        }
{% endfor %}
        store(texel, bitcast<vec4<u32>>(value));
{% endif %}
    }
}
