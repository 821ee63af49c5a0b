{#
Moves x to a texture, for the linear kernel of CPU adapters: a workgroup moves one row, and pads it with zeros.

unit: f32 of x per load: 8, 4 or 1.
Iterations per invocation: ceil(in_features / (unit * LANES)), in_features padded to 32.
Workgroup memory: none.
#}
{% include "model/linear_params.wgsl" %}

const LANES: u32 = {{ lanes }}u;

// [rows, in_features padded to 32] as texels of 4
@group(0) @binding(0) var staged: texture_storage_2d<rgba32uint, write>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ {1: "f32", 4: "vec4<f32>", 8: "vec4<u64>"}[unit] }}>;
@group(0) @binding(2) var<uniform> params: LinearParams;

fn store(texel: u32, value: vec4<u32>) {
    textureStore(staged, vec2<u32>(texel & 2047u, texel >> 11u), value);
}

@compute @workgroup_size({{ lanes }})
fn linear_stage(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.y * params.in_features;
    let row_texels = (params.in_features + 31u) / 32u * 8u;
    let first_texel = workgroup.y * row_texels;
    for (var k = lane * {{ [unit, 4] | max }}u; k < row_texels * 4u; k += LANES * {{ [unit, 4] | max }}u) {
        let texel = first_texel + k / 4u;
{% if unit == 8 %}
        var value = vec4<u64>();
        if (k < params.in_features) {
            value = x[(row + k) / 8u];
        }
        let high = value >> vec4<u32>(32u);
        store(texel, vec4<u32>(u32(value.x), u32(high.x), u32(value.y), u32(high.y)));
        store(texel + 1u, vec4<u32>(u32(value.z), u32(high.z), u32(value.w), u32(high.w)));
{% elif unit == 4 %}
        var value = vec4<f32>();
        if (k < params.in_features) {
            value = x[(row + k) / 4u];
        }
        store(texel, bitcast<vec4<u32>>(value));
{% else %}
        var value = vec4<f32>();
{% for i in range(4) %}
        if (k + {{ i }}u < params.in_features) {
            value.{{ ["x", "y", "z", "w"][i] }} = x[row + k + {{ i }}u];
        }
{% endfor %}
        store(texel, bitcast<vec4<u32>>(value));
{% endif %}
    }
}
