{% from "shared/kv_rows.wgsl" import element_type, store, store_functions %}
{% from "shared/kv_side.wgsl" import cache_row_function, declare %}
{% import "shared/host_rows.wgsl" as host %}
// append: new K and V rows go into their slots, converted to the cache's formats.
{% if rope %}
// K rows are rotated by their tokens' positions before.
{% endif %}
{% if head_norm %}
// What of a latent row is the value is normalised before: RMSNorm.
{% endif %}
// One invocation writes 8 elements of one row of K{{ " and the same of V" if not latent }}.
{% set row_scales = k_side.row_scales or v_side.row_scales %}
{% set latent_norm = head_norm %}
{# The invocations of a row know something together. #}
{% set shared = row_scales or latent_norm %}
{% if shared %}
// The invocations of a row are neighbours in a workgroup, and find the row's {{ "range" if row_scales }}{{ " and " if row_scales and latent_norm }}{{ "sum of squares" if latent_norm }} together.
// Iterations per invocation: {{ "ROW_VEC8S" if row_scales }}{{ " and " if row_scales and latent_norm }}{{ "VALUE_VEC8S" if latent_norm }}.
{% else %}
// No loops.
{% endif %}
{% include "shared/cache_params.wgsl" %}

{# Partners that lie a multiple of 4 apart, or in the same 8 elements, come in vec4s. #}
{% set wide = rope != "half_split" or rotary_dim % 8 == 0 %}
{% if wide %}
@group(0) @binding(0) var<storage, read> k_new: array<{{ host.vec4_type(k_rows) }}>;  // a row of HEAD_DIM / 4 per token and head
{% else %}
@group(0) @binding(0) var<storage, read> k_new: array<f32>;  // a row of HEAD_DIM per token and head
{% endif %}
{% if not latent %}
@group(0) @binding(1) var<storage, read> v_new: array<{{ host.vec4_type(v_rows) }}>;  // a row of VALUE_VEC8S * 2 per token and head
{% endif %}
{% set sides_from = 1 if latent else 2 %}
{{ declare(k_side, sides_from, "read_write", element_type(k_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]") -}}
{{ declare(v_side, sides_from + k_side.segments, "read_write", element_type(v_format), "[num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 8 * VALUE_VEC8S]") if not latent -}}
{% set after = sides_from + k_side.segments + (0 if latent else v_side.segments) %}
@group(0) @binding({{ after }}) var<storage, read> step_lists: array<u32>;  // slot of each token, at params.list_offset{{ "; its position, at params.positions_offset" if rope }}
@group(0) @binding({{ after + 1 }}) var<uniform> params: CacheParams;
{% if rope %}
@group(0) @binding({{ after + 2 }}) var<storage, read> rope_table: array<vec2<u32>>;  // [ROTARY_DIM / 2] revolutions per position (high, low); [1] factor
{% endif %}
{% if latent_norm %}
@group(0) @binding({{ after + (3 if rope else 2) }}) var<storage, read> norm_weights: array<f32>;  // [8 * VALUE_VEC8S]; [1] epsilon
{% endif %}

{% if shared %}
const ROWS: u32 = {{ geometry.rows }}u;
{% if latent_norm %}
// The grid continues along y once x is this wide: it has other workgroups than that of the step's parameters, whose rows need not be whole.
const MAX_GRID: u32 = 65535u;
{% endif %}

{% endif %}
{% if latent_norm %}
var<workgroup> squares: array<f32, {{ geometry.squares_len }}>;  // [lane]: sum over its elements; then, where a row begins, the row's scale

{% endif %}
{% if row_scales %}
var<workgroup> ranges: array<vec4<u32>, {{ geometry.ranges_len }}>;  // [lane]: smallest and largest of its elements of K and of V, in order; then, where a row begins, the row's pairs for K and V

{% endif %}
struct Vec8 { lo: vec4<f32>, hi: vec4<f32> }
{# Where keys and values differ in length, an invocation may have a part of one of them only. #}
{% set k_part = "vec8_idx < HEAD_VEC8S" if head_dim < value_dim else "" %}
{% set v_part = "none" if latent else "vec8_idx < VALUE_VEC8S" if value_dim < head_dim else "" %}
{# A statement under a condition, if there is one; nothing under "none". #}
{% macro guarded(condition, statement) -%}
    {%- if condition == "none" -%}{%- elif condition -%} if ({{ condition }}) { {{ statement }} } {%- else -%} {{ statement }} {%- endif -%}
{%- endmacro %}
{# This invocation's part of the new key, and of the new value; the row is the row-th. #}
{% set new_k = "rotated_vec8(k_begin, vec8_idx, step_lists[params.positions_offset + token])" if rope else "Vec8(%s, %s)"|format(host.load(k_rows, "k_new[k_at]"), host.load(k_rows, "k_new[k_at + 1u]")) %}
{% set new_v = "Vec8(%s, %s)"|format(host.load(v_rows, "v_new[v_at]"), host.load(v_rows, "v_new[v_at + 1u]")) %}
{{ cache_row_function() }}
{{ store_functions([k_format, v_format]) }}
{{ store(k_side) }}
{{ store(v_side) if not latent }}
{% if rope %}
{% set rows = "k_new" %}
{% set rows_layout = k_rows %}
{% set head_norm = false %}
{% include "shared/rope.wgsl" %}
{% include "shared/rotated_rows.wgsl" %}

{% endif %}
@compute @workgroup_size(WORKGROUP_SIZE)
fn append(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
{% if shared %}
    let vec8_idx = lane % ROW_VEC8S;
    let row = (workgroup.y * {{ "MAX_GRID" if latent_norm else "params.grid_x" }} + workgroup.x) * ROWS + lane / ROW_VEC8S;
{% else %}
    let idx = (workgroup.y * params.grid_x + workgroup.x) * WORKGROUP_SIZE + lane;
    let vec8_idx = idx % ROW_VEC8S;
    let row = idx / ROW_VEC8S;
{% endif %}
    let kv_head = row % NUM_KV_HEADS;
    let token = row / NUM_KV_HEADS;
{% if rope %}
    let k_begin = {{ "4u * (%s)"|format(host.begin(k_rows, "token", "kv_head")) if k_rows.strided else "row * HEAD_DIM" }};
{% else %}
    let k_at = {{ host.begin(k_rows, "token", "kv_head") ~ " + 2u * vec8_idx" if k_rows.strided else "2u * (row * HEAD_VEC8S + vec8_idx)" }};
{% endif %}
{% if not latent %}
    let v_at = {{ host.begin(v_rows, "token", "kv_head") ~ " + 2u * vec8_idx" if v_rows.strided else "2u * (row * VALUE_VEC8S + vec8_idx)" }};
{% endif %}
{% if shared %}
    let live = lane < ROWS * ROW_VEC8S && token < params.num_tokens;
    var k = Vec8();
{% if not latent %}
    var v = Vec8();
{% endif %}
    if (live) {
        {{ guarded(k_part, "k = " ~ new_k ~ ";") }}
        {{ guarded(v_part, "v = " ~ new_v ~ ";") }}
    }
{% if latent_norm %}
    // One invocation of the row looks at all of them, since reads of workgroup memory are what costs on CPU adapters.
    squares[lane] = dot(k.lo, k.lo) + dot(k.hi, k.hi);
    workgroupBarrier();
    if (live && vec8_idx == 0u) {
        var sum = squares[lane];
        for (var other = lane + 1u; other < lane + VALUE_VEC8S; other++) {
            sum += squares[other];
        }
        squares[lane] = 1.0 / sqrt(sum / f32(8u * VALUE_VEC8S) + norm_weights[8u * VALUE_VEC8S]);
    }
    workgroupBarrier();
    if (live && vec8_idx < VALUE_VEC8S) {
        let scale = squares[lane - vec8_idx];
        let at = 8u * vec8_idx;
        k.lo *= scale * vec4<f32>(norm_weights[at], norm_weights[at + 1u], norm_weights[at + 2u], norm_weights[at + 3u]);
        k.hi *= scale * vec4<f32>(norm_weights[at + 4u], norm_weights[at + 5u], norm_weights[at + 6u], norm_weights[at + 7u]);
    }
{% endif %}
{% if row_scales %}
    // What is the smallest and the largest of no elements, in order, changes no range.
    var own_range = vec4<u32>(0xffffffffu, 0u, 0xffffffffu, 0u);
{% if k_side.row_scales %}
    {{ guarded(k_part, "own_range = vec4<u32>(vec8_range(k.lo, k.hi), own_range.zw);") }}
{% endif %}
{% if v_side.row_scales and not latent %}
    {{ guarded(v_part, "own_range = vec4<u32>(own_range.xy, vec8_range(v.lo, v.hi));") }}
{% endif %}
    ranges[lane] = own_range;
    workgroupBarrier();
    // One invocation of the row looks at all of them, since reads of workgroup memory are what costs on CPU adapters.
    if (live && vec8_idx == 0u) {
        var range = ranges[lane];
        for (var other = lane + 1u; other < lane + ROW_VEC8S; other++) {
            let next = ranges[other];
            range = select(min(range, next), max(range, next), vec4<bool>(false, true, false, true));
        }
        ranges[lane] = vec4<u32>({{ "row_pair(range.xy, %d.0)"|format(k_side.levels) if k_side.row_scales else "0u" }}, {{ "row_pair(range.zw, %d.0)"|format(v_side.levels) if v_side.row_scales and not latent else "0u" }}, 0u, 0u);
    }
    workgroupBarrier();
{% endif %}
    if (!live) {
        return;
    }
{% if row_scales %}
    let pairs = ranges[lane - vec8_idx].xy;
{% endif %}
{% else %}
    if (token >= params.num_tokens) {
        return;
    }
    var k = Vec8();
{% if not latent %}
    var v = Vec8();
{% endif %}
    {{ guarded(k_part, "k = " ~ new_k ~ ";") }}
    {{ guarded(v_part, "v = " ~ new_v ~ ";") }}
{% endif %}
    let slot = step_lists[params.list_offset + token];
    let in_cache = cache_row(slot / BLOCK_SIZE, kv_head, slot);
    {{ guarded(k_part, "store_k(in_cache, vec8_idx, k.lo, k.hi%s);"|format(", pairs.x" if k_side.row_scales else "")) }}
    {{ guarded(v_part, "store_v(in_cache, vec8_idx, v.lo, v.hi%s);"|format(", pairs.y" if v_side.row_scales else "")) }}
}
