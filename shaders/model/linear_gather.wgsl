{#
out[i] = W[ids[i]] as f32, times `gather_scale` if there is one: the embedding of tokens, from the weights as the linear layer packs them. An invocation widens one pack. Rows of W that this
binding of it doesn't hold are left to another dispatch.

Iterations per invocation: none.
Workgroup memory: none.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}
{% set quantised = format in ["int8", "int4"] %}
{% include "model/linear_params.wgsl" %}

const SIZE: u32 = {{ workgroup_size }}u;
// Rows of W that are interleaved.
const LANES: u32 = {{ lanes }}u;

{% if textures %}
// [blocks of LANES rows of W, row_packs, LANES] packs of packed weights
@group(0) @binding(0) var w: texture_2d<u32>;
{% else %}
// [rows of W, row_packs] packs of packed weights
@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
{% endif %}
// [rows]
@group(0) @binding(1) var<storage, read> ids: array<u32>;
// [rows, in_features]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
{% if textures %}
// [blocks of LANES rows of W, row_groups / 4, LANES] texels of 4 words
@group(0) @binding(4) var scales: texture_2d<u32>;
{% else %}
// [rows of W, row_groups / 4] of 4 words
@group(0) @binding(4) var<storage, read> scales: array<vec4<u32>>;
{% endif %}
{% endif %}

@compute @workgroup_size({{ workgroup_size }})
fn linear_gather(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = workgroup.y;
    let pack = workgroup.x * SIZE + lane;
    let k = pack * {{ per_pack }}u;
    let id = min(ids[i], params.out_features - 1u);
    if (k >= params.in_features || id < params.first_row || id > params.last_row) {
        return;
    }
    let row = id - params.first_row;
    let block = row / LANES;
    let lane_of_row = row % LANES;
    let at = (block * params.row_packs + pack) * LANES + lane_of_row;
{% if quantised %}
    let scale_group = k / {{ group_size }}u;
    let scale_at = (block * (params.row_groups / 4u) + scale_group / 4u) * LANES + lane_of_row;
{% endif %}
{% if textures %}
    let words = textureLoad(w, vec2<u32>(at & 2047u, at >> 11u), 0);
{% if quantised %}
    let scale_words = textureLoad(scales, vec2<u32>(scale_at & 2047u, scale_at >> 11u), 0);
{% endif %}
{% else %}
    let words = w[at];
{% if quantised %}
    let scale_words = scales[scale_at];
{% endif %}
{% endif %}
{% if quantised %}
    let scale_word = scale_words[scale_group % 4u];
{% endif %}
    let out_row = i * params.in_features;
{% for e in range(per_pack) %}
    if (k + {{ e }}u < params.in_features) {
        out[out_row + k + {{ e }}u] = {{ "%s * ("|format(gather_scale) if gather_scale }}{{ parts.widen("words", e) }}
            {%- if quantised %} * {{ parts.scale_of("scale_word") }}{% endif %}{% if quantised %} + {{ parts.min_of("scale_word") }}{% endif %}{{ ")" if gather_scale }};
    }
{% endfor %}
}
