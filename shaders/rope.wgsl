// rope: rows of queries (or of keys that are not in the cache yet) are rotated by their tokens' positions, in place.
// One invocation rotates 4 pairs of elements of one row, which no other invocation touches. No loops.
{% include "shared/cache_params.wgsl" %}

{# Partners that lie a multiple of 4 apart, or in the same 8 elements, come in vec4s. #}
{% set wide = rope == "interleaved" or rotary_dim % 8 == 0 %}
const MAX_GRID: u32 = 65535u;  // the grid continues along y once x is this wide
const ROW_LEN: u32 = HEAD_DIM{{ " / 4u" if wide }};

{% if wide %}
@group(0) @binding(0) var<storage, read_write> x: array<vec4<f32>>;  // [num_tokens, num_heads, HEAD_DIM / 4]
{% else %}
@group(0) @binding(0) var<storage, read_write> x: array<f32>;  // [num_tokens, num_heads, HEAD_DIM]
{% endif %}
@group(0) @binding(1) var<storage, read> step_lists: array<u32>;  // position of each token, at params.positions_offset
@group(0) @binding(2) var<storage, read> rope_table: array<vec2<u32>>;  // [ROTARY_DIM / 2] revolutions per position (high, low); [1] factor
@group(0) @binding(3) var<uniform> params: CacheParams;

{% include "shared/rope.wgsl" %}

const ROW_GROUPS: u32 = (ROTARY_PAIRS + 3u) / 4u;

@compute @workgroup_size(WORKGROUP_SIZE)
fn rope(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let idx = (workgroup.y * MAX_GRID + workgroup.x) * WORKGROUP_SIZE + lane;
    let row = idx / ROW_GROUPS;
    let num_rows = arrayLength(&x) / ROW_LEN;
    if (params.num_tokens == 0u || row >= num_rows) {
        return;
    }
    let num_heads = max(num_rows / params.num_tokens, 1u);
    let token = min(row / num_heads, params.num_tokens - 1u);
    let position = step_lists[params.positions_offset + token];
    let pair = 4u * (idx % ROW_GROUPS);
    let pairs = pair + OFFSETS;
{% if rope == "interleaved" %}
    let at = row * ROW_LEN + pair / 2u;
    let lo = x[at];
    let hi = x[at + 1u];
    let rotated = rotate_pairs(vec4<f32>(lo.xz, hi.xz), vec4<f32>(lo.yw, hi.yw), pairs, position);
    x[at] = vec4<f32>(rotated.first.x, rotated.second.x, rotated.first.y, rotated.second.y);
    x[at + 1u] = vec4<f32>(rotated.first.z, rotated.second.z, rotated.first.w, rotated.second.w);
{% elif wide %}
    let at = row * ROW_LEN + pair / 4u;
    let rotated = rotate_pairs(x[at], x[at + ROTARY_PAIRS / 4u], pairs, position);
    x[at] = rotated.first;
    x[at + ROTARY_PAIRS / 4u] = rotated.second;
{% else %}
    let at = row * ROW_LEN + min(pairs, vec4<u32>(ROTARY_PAIRS - 1u));
    let partner = at + ROTARY_PAIRS;
    let first = vec4<f32>(x[at.x], x[at.y], x[at.z], x[at.w]);
    let second = vec4<f32>(x[partner.x], x[partner.y], x[partner.z], x[partner.w]);
    let rotated = rotate_pairs(first, second, pairs, position);
{% for i in "xyzw" %}
    if (pairs.{{ i }} < ROTARY_PAIRS) {
        x[at.{{ i }}] = rotated.first.{{ i }};
        x[partner.{{ i }}] = rotated.second.{{ i }};
    }
{% endfor %}
{% endif %}
}
