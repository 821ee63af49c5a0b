// rope: rows of queries (or of keys that are not in the cache yet) are rotated by their tokens' positions, in place.
// One invocation rotates 4 pairs of elements of one row, which no other invocation touches. No loops.
{% import "shared/host_rows.wgsl" as host %}
{% from "shared/kv_rows.wgsl" import f16_functions %}
{% include "shared/cache_params.wgsl" %}

{# Partners that lie a multiple of 4 apart, or in the same 8 elements, come in vec4s. #}
{% set wide = rope == "interleaved" or rotary_dim % 8 == 0 %}
const MAX_GRID: u32 = 65535u;  // the grid continues along y once x is this wide
{% if q_rows.strided %}
const NUM_HEADS: u32 = {{ num_q_heads }}u;
{% else %}
const ROW_LEN: u32 = HEAD_DIM{{ " / 4u" if wide }};
{% endif %}

{% if wide %}
@group(0) @binding(0) var<storage, read_write> x: array<{{ host.vec4_type(q_rows) }}>;  // a row of HEAD_DIM / 4 per token and head
{% else %}
@group(0) @binding(0) var<storage, read_write> x: array<f32>;  // a row of HEAD_DIM per token and head
{% endif %}
@group(0) @binding(1) var<storage, read> step_lists: array<u32>;  // position of each token, at params.positions_offset
@group(0) @binding(2) var<storage, read> rope_table: array<vec2<u32>>;  // [ROTARY_DIM / 2] revolutions per position (high, low); [1] factor
@group(0) @binding(3) var<uniform> params: CacheParams;

{% if q_rows.halves %}
{{ f16_functions() }}
{% endif %}
{% set rows = "x" %}
{% set rows_layout = q_rows %}
{% include "shared/rope.wgsl" %}
{% include "shared/rotate_in_place.wgsl" %}

@compute @workgroup_size(WORKGROUP_SIZE)
fn rope(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * MAX_GRID + workgroup.x) * WORKGROUP_SIZE + lane;
    let row = idx / ROW_GROUPS;
{% if q_rows.strided %}
    let token = row / NUM_HEADS;
    if (token >= params.num_tokens) {
        return;
    }
    let begin = 4u * ({{ host.begin(q_rows, "token", "row % NUM_HEADS") }});
{% else %}
    let num_rows = arrayLength(&x) / ROW_LEN;
    if (params.num_tokens == 0u || row >= num_rows) {
        return;
    }
    let num_heads = max(num_rows / params.num_tokens, 1u);
    let token = min(row / num_heads, params.num_tokens - 1u);
    let begin = row * HEAD_DIM;
{% endif %}
    let position = step_lists[params.positions_offset + token];
    rotate_in_place(begin, idx % ROW_GROUPS, position);
}
