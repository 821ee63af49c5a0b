{# Bindings, constants and the block table of the CPU attention kernels; the includer has imported `kv`. #}
{% import "shared/kv_side.wgsl" as side %}
{% set after = 1 + k_side.segments + v_side.segments %}
{% include "shared/attend_params.wgsl" %}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;               // [num_tokens, num_q_heads, head_dim/4]
{{ side.declare(k_side, 1, "read", geometry.k_type, "[block, kv_head, slot, head_dim/%d]"|format(geometry.k_dims)) -}}
{{ side.declare(v_side, 1 + k_side.segments, "read", geometry.v_type, "[block, kv_head, slot, head_dim/%d]"|format(geometry.v_dims)) -}}
@group(0) @binding({{ after }}) var<storage, read> plan: array<u32>;                  // work items, block tables, head parameters, mask bits
@group(0) @binding({{ after + 1 }}) var<storage, read_write> out: array<vec4<f32>>;       // [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding({{ after + 2 }}) var<storage, read_write> partials: array<vec4<f32>>;  // [partial row, head_dim/4 + 1]
@group(0) @binding({{ after + 3 }}) var<uniform> params: AttendParams;
{% if lse %}
@group(0) @binding({{ after + 4 }}) var<storage, read_write> lse: array<f32>;             // [num_tokens, num_q_heads]
{% endif %}

const LANES = {{ geometry.lanes }}u;  // one subgroup, the whole workgroup
const TILE_Q = {{ tile_q }}u;
const STEP = {{ geometry.iter_keys }}u;  // keys per iteration
const BLOCK_SIZE = {{ block_size }}u;
const NUM_KV_HEADS = {{ num_kv_heads }}u;
const NUM_Q_HEADS = {{ num_q_heads }}u;
const GROUP_SIZE = {{ group_size }}u;
const ROW_VECS = {{ head_dim // 4 }}u;  // vec4s in a row of q and out
const MAX_FLOOR = -0x1p127;  // the running max before the first visible key
const LN_2 = 0.6931471805599453;
const ITEM_WORDS = 12u;
const DIRECT = 0xffffffffu;  // part_row of an item that has its rows to itself
{{ kv.functions() }}
{{ side.element_function(k_side, geometry.k_type, k_side.row_bytes * geometry.k_dims // head_dim) }}
{{ side.element_function(v_side, geometry.v_type, v_side.row_bytes * geometry.v_dims // head_dim) }}
{% if k_side.row_scales %}
{{ side.row_scale_function(k_side, geometry.k_type) }}
{% elif k_side.channel_scales %}
{{ side.channel_function(k_side, geometry.k_type, num_kv_heads, head_dim) }}
{% endif %}
{% if v_side.row_scales %}
{{ side.row_scale_function(v_side, geometry.v_type) }}
{% endif %}
// The row of K and of V that holds `key`.
fn cache_row(table_offset: u32, kv_head: u32, key: u32) -> u32 {
    let block_id = min(plan[table_offset + key / BLOCK_SIZE], params.num_blocks - 1u);
    return (block_id * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
}
