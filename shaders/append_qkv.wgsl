{% from "shared/kv_rows.wgsl" import element_type, store, store_functions %}
{% from "shared/kv_side.wgsl" import cache_row_function, declare %}
{% import "shared/host_rows.wgsl" as host %}
// append_qkv: rows of queries, keys and values, one matrix after another. Keys and values go into their slots as `append` does it, queries stay where
// they are; queries and keys are rotated by their tokens' positions{{ ", after RMSNorm of each head" if head_norm }}.
{% if sink_queries %}
// Queries are written a second time, for sink tokens: rotated by their positions up to SINK_POSITION.
{% endif %}
{% set whole_rows = head_norm or sink_queries %}
{% if whole_rows %}
// One invocation writes 8 elements of a row of queries, or 8 of keys and the same of values. Those of a row are neighbours in a workgroup: all read
// before one writes.
{% else %}
// One invocation rotates 4 pairs of a row of queries, which no other one touches, or writes 8 elements of a row of keys and the same of values.
{% endif %}
// Iterations per invocation: {{ "head_dim / 8" if k_side.row_scales or v_side.row_scales else "none" }}{{ ", and head_dim / 8 for the norm" if head_norm }}.
{% include "shared/cache_params.wgsl" %}

{# Partners that lie a multiple of 4 apart, or in the same 8 elements, come in vec4s. #}
{% set wide = rope == "interleaved" or rotary_dim % 8 == 0 %}
{% set row_scales = k_side.row_scales or v_side.row_scales %}
{% set k_region = regions[1] %}
{% set v_region = regions[2] %}
@group(0) @binding(0) var<storage, read_write> qkv: array<{{ "vec4<f32>" if wide else "f32" }}>;  // three matrices: [num_tokens, NUM_Q_HEADS, HEAD_DIM], [num_tokens, NUM_KV_HEADS, HEAD_DIM] twice
{{ declare(k_side, 1, "read_write", element_type(k_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]") -}}
{{ declare(v_side, 1 + k_side.segments, "read_write", element_type(v_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]") -}}
{% set after = 1 + k_side.segments + v_side.segments %}
@group(0) @binding({{ after }}) var<storage, read> step_lists: array<u32>;  // slot of each token, at params.list_offset; its position, at params.positions_offset
@group(0) @binding({{ after + 1 }}) var<uniform> params: CacheParams;
@group(0) @binding({{ after + 2 }}) var<storage, read> rope_table: array<vec2<u32>>;  // [ROTARY_DIM / 2] revolutions per position (high, low); [1] factor
{% if head_norm %}
@group(0) @binding({{ after + 3 }}) var<storage, read> norm_weights: array<f32>;  // [HEAD_DIM] of queries, [HEAD_DIM] of keys, [1] epsilon
{% endif %}
{% if sink_queries %}
@group(0) @binding({{ after + (4 if head_norm else 3) }}) var<storage, read_write> sink_q: array<{{ "vec4<f32>" if wide else "f32" }}>;  // [num_tokens, NUM_Q_HEADS, HEAD_DIM]
{% endif %}

const MAX_GRID: u32 = 65535u;  // the grid continues along y once x is this wide
const NUM_Q_HEADS: u32 = {{ num_q_heads }}u;
const NUM_HEADS: u32 = NUM_Q_HEADS + NUM_KV_HEADS;
const ROWS: u32 = {{ geometry.rows }}u;
// Elements before the matrices, per token.
const K_OFFSET: u32 = {{ k_region.offset }}u;
const V_OFFSET: u32 = {{ v_region.offset }}u;
{% if sink_queries %}
const SINK_POSITION: u32 = {{ sink_position }}u;
{% endif %}

{% if row_scales %}
var<workgroup> ranges: array<vec4<u32>, {{ geometry.ranges_len }}>;  // [lane]: smallest and largest of its elements of K and of V, in order; then, where a row begins, the row's pairs for K and V
{% endif %}
{% if head_norm %}
var<workgroup> squares: array<f32, {{ geometry.squares_len }}>;  // [lane]: sum over its elements; then, where a row begins, the row's scale
{% endif %}

struct Vec8 { lo: vec4<f32>, hi: vec4<f32> }
{{ cache_row_function() }}
{{ store_functions([k_format, v_format]) }}
{{ store(k_side) }}
{{ store(v_side) }}
{% set rows = "qkv" %}
{% set rows_layout = k_rows %}
{% include "shared/rope.wgsl" %}
{% include "shared/rotated_rows.wgsl" %}
{% if not whole_rows %}

{% include "shared/rotate_in_place.wgsl" %}
{% endif %}

// Elements at .. at + 8 of qkv.
fn load_vec8(at: u32) -> Vec8 {
{% if wide %}
    return Vec8(qkv[at / 4u], qkv[at / 4u + 1u]);
{% else %}
    return Vec8(
        vec4<f32>(qkv[at], qkv[at + 1u], qkv[at + 2u], qkv[at + 3u]),
        vec4<f32>(qkv[at + 4u], qkv[at + 5u], qkv[at + 6u], qkv[at + 7u]));
{% endif %}
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn append_qkv(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let vec8_idx = lane % HEAD_VEC8S;
    let row = (workgroup.y * MAX_GRID + workgroup.x) * ROWS + lane / HEAD_VEC8S;
    let token = row / NUM_HEADS;
    let head = row % NUM_HEADS;
    let is_query = head < NUM_Q_HEADS;
    let kv_head = select(head - NUM_Q_HEADS, 0u, is_query);
    let kv_row = (token * NUM_KV_HEADS + kv_head) * HEAD_DIM;
    let start = select(params.num_tokens * K_OFFSET + kv_row, (token * NUM_Q_HEADS + head) * HEAD_DIM, is_query);
    let live = lane < ROWS * HEAD_VEC8S && token < params.num_tokens;
    var x = Vec8();
    var v = Vec8();
{% if sink_queries %}
    var sink_x = Vec8();
{% endif %}
{% if head_norm %}
    var sum = 0.0;
{% endif %}
    if (live) {
        let position = step_lists[params.positions_offset + token];
{% if whole_rows %}
{% set weights = ", select(HEAD_DIM, 0u, is_query)" if head_norm else "" %}
        x = rotated_vec8(start, vec8_idx, position{{ weights }});
{% if sink_queries %}
        if (is_query) {
            sink_x = rotated_vec8(start, vec8_idx, min(position, SINK_POSITION){{ weights }});
        }
{% endif %}
{% else %}
        if (!is_query) {
            x = rotated_vec8(start, vec8_idx, position);
        } else if (vec8_idx < ROW_GROUPS) {
            rotate_in_place(start, vec8_idx, position);
        }
{% endif %}
        if (!is_query) {
            v = load_vec8(params.num_tokens * V_OFFSET + kv_row + 8u * vec8_idx);
        }
{% if head_norm %}
        let own = load_vec8(start + 8u * vec8_idx);
        sum = dot(own.lo, own.lo) + dot(own.hi, own.hi);
{% endif %}
    }
{% if whole_rows %}
    storageBarrier();
{% endif %}
{% if head_norm %}
    // One invocation of the row looks at all of them, since reads of workgroup memory are what costs on CPU adapters.
    squares[lane] = sum;
    workgroupBarrier();
    if (live && vec8_idx == 0u) {
        for (var other = lane + 1u; other < lane + HEAD_VEC8S; other++) {
            sum += squares[other];
        }
        squares[lane] = 1.0 / sqrt(sum / f32(HEAD_DIM) + norm_weights[2u * HEAD_DIM]);
    }
    workgroupBarrier();
    // Rotation is linear: the scale may as well come after it.
    let scale = squares[lane - vec8_idx];
    x.lo *= scale;
    x.hi *= scale;
{% if sink_queries %}
    sink_x.lo *= scale;
    sink_x.hi *= scale;
{% endif %}
{% endif %}
{% if row_scales %}
    ranges[lane] = vec4<u32>({{ "vec8_range(x.lo, x.hi)" if k_side.row_scales else "0u, 0u" }}, {{ "vec8_range(v.lo, v.hi)" if v_side.row_scales else "0u, 0u" }});
    workgroupBarrier();
    if (live && vec8_idx == 0u) {
        var range = ranges[lane];
        for (var other = lane + 1u; other < lane + HEAD_VEC8S; other++) {
            let next = ranges[other];
            range = select(min(range, next), max(range, next), vec4<bool>(false, true, false, true));
        }
        ranges[lane] = vec4<u32>({{ "row_pair(range.xy, %d.0)"|format(k_side.levels) if k_side.row_scales else "0u" }}, {{ "row_pair(range.zw, %d.0)"|format(v_side.levels) if v_side.row_scales else "0u" }}, 0u, 0u);
    }
    workgroupBarrier();
{% endif %}
    if (!live{{ " || is_query" if not whole_rows }}) {
        return;
    }
{% if whole_rows %}
    if (is_query) {
        let at = start + 8u * vec8_idx;
{% for target, values in [("qkv", "x"), ("sink_q", "sink_x")] if target == "qkv" or sink_queries %}
{% if wide %}
        {{ target }}[at / 4u] = {{ values }}.lo;
        {{ target }}[at / 4u + 1u] = {{ values }}.hi;
{% else %}
{% for i in range(4) %}
        {{ target }}[at + {{ i }}u] = {{ values }}.lo[{{ i }}];
        {{ target }}[at + {{ i + 4 }}u] = {{ values }}.hi[{{ i }}];
{% endfor %}
{% endif %}
{% endfor %}
        return;
    }
{% endif %}
{% if row_scales %}
    let pairs = ranges[lane - vec8_idx].xy;
{% endif %}
    let slot = step_lists[params.list_offset + token];
    let in_cache = cache_row(slot / BLOCK_SIZE, kv_head, slot);
    store_k(in_cache, vec8_idx, x.lo, x.hi{{ ", pairs.x" if k_side.row_scales }});
    store_v(in_cache, vec8_idx, v.lo, v.hi{{ ", pairs.y" if v_side.row_scales }});
}
