{#
  Bindings, parameters and work items of the GPU-shaped kernels. Before it the kernel declares the
  element types KElement and VElement (shared/gpu_kv.wgsl) and sets k_dims and v_dims.
#}
{% import "shared/kv_side.wgsl" as side %}
{% import "shared/gpu_kv.wgsl" as kv %}
{% import "shared/kv_codes.wgsl" as codes %}
{% set after = 1 + k_side.segments + v_side.segments %}
const HEAD_DIM: u32 = {{ head_dim }}u;
const HEAD_VEC4S: u32 = {{ head_dim // 4 }}u;
const NUM_Q_HEADS: u32 = {{ num_q_heads }}u;
const NUM_KV_HEADS: u32 = {{ num_kv_heads }}u;
const GROUP_SIZE: u32 = {{ group_size }}u;
const BLOCK_SIZE: u32 = {{ block_size }}u;
// Elements in a cache row.
const K_ROW: u32 = {{ head_dim // geometry.k_dims }}u;
const V_ROW: u32 = {{ head_dim // geometry.v_dims }}u;

const CAUSAL: bool = {{ causal|lower }};
const WINDOW: bool = {{ window|lower }};
const SOFTCAP: bool = {{ softcap|lower }};
const ALIBI: bool = {{ alibi|lower }};
const SINKS: bool = {{ sinks|lower }};
const MASK: bool = {{ mask|lower }};

// Floor of the running maximum: finite, and below any logit.
const LOGIT_FLOOR: f32 = -0x1p127;
// Word 7 of a work item that is alone: it writes `out`, not a partial state.
const NOT_SPLIT: u32 = 0xffffffffu;
const ITEM_WORDS: u32 = 12u;

{% include "shared/attend_params.wgsl" %}

// [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
{{ side.declare(k_side, 1, "read", "KElement", "[num_blocks, num_kv_heads, block_size, K_ROW]") -}}
{{ side.declare(v_side, 1 + k_side.segments, "read", "VElement", "[num_blocks, num_kv_heads, block_size, V_ROW]") -}}
// work items, block tables, head parameters, mask bits
@group(0) @binding({{ after }}) var<storage, read> plan: array<u32>;
// [num_tokens, num_q_heads, head_dim/4]
@group(0) @binding({{ after + 1 }}) var<storage, read_write> out: array<vec4<f32>>;
// [partial rows, head_dim/4 + 1]: sum of p * v, then (max, sum of p, 0, 0)
@group(0) @binding({{ after + 2 }}) var<storage, read_write> partials: array<vec4<f32>>;
@group(0) @binding({{ after + 3 }}) var<uniform> params: AttendParams;
{% if lse %}
// [num_tokens, num_q_heads]
@group(0) @binding({{ after + 4 }}) var<storage, read_write> lse: array<f32>;
{% endif %}

struct Item {
    query_start: u32,   // first token of the sequence in q, out and lse
    query_len: u32,
    context_len: u32,   // position of query token i is context_len + i
    row_start: u32,     // first row of the tile; row = token * GROUP_SIZE + head in the group
    kv_begin: u32,      // keys of this item: kv_begin .. kv_end, perhaps none
    kv_end: u32,
    table_offset: u32,  // word of the sequence's block table in plan
    part_row: u32,      // first partial row, or NOT_SPLIT
    mask_offset: u32,   // word of the sequence's mask bits in plan
    mask_stride: u32,   // mask words per token
}

fn read_item(item_idx: u32) -> Item {
    let word = params.items_offset + item_idx * ITEM_WORDS;
    return Item(
        plan[word], plan[word + 1u], plan[word + 2u], plan[word + 3u], plan[word + 4u],
        plan[word + 5u], plan[word + 6u], plan[word + 7u], plan[word + 8u], plan[word + 9u],
    );
}

// The block that holds a key, as the table has it: reading it early hides the wait for it.
fn table_entry(item: Item, key: u32) -> u32 {
    return plan[item.table_offset + key / BLOCK_SIZE];
}

// Cache row of a key in a block. A corrupt table reads a wrong row, never outside the pool.
fn cache_row(entry: u32, kv_head: u32, key: u32) -> u32 {
    let block = min(entry, params.num_blocks - 1u);
    return (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
}

{{ side.element_function(k_side, "KElement", k_side.row_bytes * geometry.k_dims // head_dim) }}
{{ side.element_function(v_side, "VElement", [v_side.row_bytes * geometry.v_dims // head_dim, 4]|max) }}
{% if "e4m3" in [k_format, v_format] %}
{{ codes.e4m3_floats() }}
{% endif %}
{% for s, dims in [(k_side, geometry.k_dims), (v_side, geometry.v_dims)] if s.row_scales %}
{{ side.scale_word_function(s, kv.element_type(s, dims, head_dim)) }}
{% endfor %}
{% if k_side.channel_scales %}
{{ kv.channel_function(side, k_side, kv.element_type(k_side, geometry.k_dims, head_dim)) }}
{% endif %}
fn head_slope(q_head: u32) -> f32 {
    return bitcast<f32>(plan[params.head_offset + q_head]);
}

fn head_sink(q_head: u32) -> f32 {
    return bitcast<f32>(plan[params.head_offset + NUM_Q_HEADS + q_head]);
}

// a . b + c as a chain of fma, which is cheaper than dot() on most GPUs.
fn fma_dot(a: vec4<f32>, b: vec4<f32>, c: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, c))));
}

// Logits, in log2 units, from scaled products; distance is key position - query position.
fn logits_of(products: vec4<f32>, distance: vec4<f32>, slope: vec4<f32>) -> vec4<f32> {
    var logits = products;
    if (SOFTCAP) {
        // tanh is flat past 10, and some drivers overflow in it for large arguments.
        logits = params.softcap_log2e * tanh(clamp(logits, vec4<f32>(-10.0), vec4<f32>(10.0)));
    }
    if (ALIBI) {
        logits = fma(slope, distance, logits);
    }
    return logits;
}

// Weights exp2(logit - max). A hidden key has the logit LOGIT_FLOOR and gets exactly 0, also when the
// maximum is the floor itself because no key was visible yet.
fn weights_of(logits: vec4<f32>, logit_max: vec4<f32>) -> vec4<f32> {
    return exp2(logits - max(logit_max, vec4<f32>(0.5 * LOGIT_FLOOR)));
}

// Whether the query at position `query` sees a key of the item.
fn is_visible(item: Item, key: u32, query: u32) -> bool {
    var visible = key < item.kv_end;
    if (CAUSAL) {
        visible = visible && key <= query;
    }
    if (WINDOW) {
        visible = visible && key + params.window > query;
    }
    if (MASK) {
        // Past the end of the range there may be no mask word.
        let bit = min(key, item.kv_end - 1u);
        let token = query - item.context_len;
        let word = plan[item.mask_offset + token * item.mask_stride + bit / 32u];
        visible = visible && ((word >> (bit % 32u)) & 1u) == 1u;
    }
    return visible;
}
{% if lse %}

// ln of the sum of exp(logit), from a maximum and sum in log2 units.
fn natural_lse(logit_max: f32, p_sum: f32) -> f32 {
    // WGSL has no infinity literal, and its bits must not be a constant expression either.
    var minus_infinity = 0xff800000u;
    return select(bitcast<f32>(minus_infinity), (logit_max + log2(max(p_sum, 1e-30))) * 0.6931471805599453, p_sum > 0.0);
}
{% endif %}
