{% from "shared/kv_rows.wgsl" import element_type, load, load_functions %}
{% from "shared/kv_side.wgsl" import cache_row_function, declare %}
// gather: a sequence's rows are read out of its blocks into contiguous f32.
// One invocation reads 8 elements of one row of K and the same of V. No loops.
{% include "shared/cache_params.wgsl" %}

{{ declare(k_side, 0, "read", element_type(k_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]") -}}
{{ declare(v_side, k_side.segments, "read", element_type(v_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 8 * VALUE_VEC8S]") -}}
{% set after = k_side.segments + v_side.segments %}
@group(0) @binding({{ after }}) var<storage, read> step_lists: array<u32>;  // block table, at params.list_offset
@group(0) @binding({{ after + 1 }}) var<storage, read_write> k_out: array<vec4<f32>>;  // [num_tokens, NUM_KV_HEADS, HEAD_DIM / 4]
@group(0) @binding({{ after + 2 }}) var<storage, read_write> v_out: array<vec4<f32>>;  // [num_tokens, NUM_KV_HEADS, VALUE_VEC8S * 2]
@group(0) @binding({{ after + 3 }}) var<uniform> params: CacheParams;

struct Vec8 { lo: vec4<f32>, hi: vec4<f32> }

{{ cache_row_function() }}
{{ load_functions([k_format, v_format]) }}
{{ load(k_side) }}
{{ load(v_side) }}
@compute @workgroup_size(WORKGROUP_SIZE)
fn gather(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
    let vec8_idx = idx % ROW_VEC8S;
    let row = idx / ROW_VEC8S;
    let kv_head = row % NUM_KV_HEADS;
    let token = row / NUM_KV_HEADS;
    if (token >= params.num_tokens) {
        return;
    }
    let in_cache = cache_row(step_lists[params.list_offset + token / BLOCK_SIZE], kv_head, token);
{% for x, name, dim in [("k", "HEAD", head_dim), ("v", "VALUE", value_dim)] %}
    {{ "if (vec8_idx < %s_VEC8S) "|format(name) if dim < [head_dim, value_dim]|max }}{
        let at = 2u * (row * {{ name }}_VEC8S + vec8_idx);
        let vec8 = load_{{ x }}(in_cache, vec8_idx);
        {{ x }}_out[at] = vec8.lo;
        {{ x }}_out[at + 1u] = vec8.hi;
    }
{% endfor %}
}
