{# Bindings, work items, cache rows and visibility of decode and prefill. Before it the kernel declares KElement and VElement. #}
{% import "shared/kv_side.wgsl" as side %}
{% import "shared/host_rows.wgsl" as host %}
{% set after = 1 + k_side.segments + v_side.segments %}
{% include "shared/attend.wgsl" %}

// Where a row of q begins, in vec4s; rows are token * NUM_Q_HEADS + head.
fn q_begin(row: u32) -> u32 {
    return {{ host.begin(q_rows, "row / NUM_Q_HEADS", "row % NUM_Q_HEADS") if q_rows.strided else "row * HEAD_VEC4S" }};
}

fn load_q(at: u32) -> vec4<f32> {
    return {{ host.load(q_rows, "q[at]") }};
}

const HEAD_DIM: u32 = {{ head_dim }}u;
const NUM_KV_HEADS: u32 = {{ num_kv_heads }}u;
const BLOCK_SIZE: u32 = {{ block_size }}u;
// Elements in a key and in a value.
const K_ROW: u32 = {{ head_dim // geometry.k_dims }}u;
const V_ROW: u32 = {{ value_dim // geometry.v_dims }}u;

const CAUSAL: bool = {{ causal|lower }};
const WINDOW: bool = {{ window|lower }};
const SOFTCAP: bool = {{ softcap|lower }};
const ALIBI: bool = {{ alibi|lower }};

const ITEM_WORDS: u32 = {{ item_words }}u;
// part_row of an item that is alone: it writes `out`, not a partial state.
const NO_PARTIAL: u32 = {{ no_partial }}u;
const TREE_MASK: u32 = {{ tree_mask }}u;

// a row of head_dim/4 per token and query head
@group(0) @binding(0) var<storage, read> q: array<{{ host.vec4_type(q_rows) }}>;
{{ side.declare(k_side, 1, "read", "KElement", "[num_blocks, num_kv_heads, block_size, K_ROW]") -}}
{{ side.declare(v_side, 1 + k_side.segments, "read", "VElement", "[num_blocks, num_kv_heads, block_size, V_ROW]") -}}
// work items, block tables, mask bits
@group(0) @binding({{ after }}) var<storage, read> plan: array<u32>;
// a row of value_dim/4 per token and query head
@group(0) @binding({{ after + 1 }}) var<storage, read_write> out: array<{{ host.vec4_type(out_rows) }}>;
// [partial rows, value_dim/4 + 1]: sum of p * v, then (max, sum of p, 0, 0)
@group(0) @binding({{ after + 2 }}) var<storage, read_write> partials: array<vec4<f32>>;
@group(0) @binding({{ after + 3 }}) var<uniform> params: AttendParams;
{% if lse %}
// [num_tokens, num_q_heads]
@group(0) @binding({{ after + 4 }}) var<storage, read_write> lse: array<f32>;
{% endif %}
{% if heads %}
// [num_q_heads]: ALiBi slope and sink, both times log2(e); two heads in an element
@group(0) @binding({{ after + 5 if lse else after + 4 }}) var<uniform> heads: array<vec4<f32>, {{ (num_q_heads + 1) // 2 }}>;
{% endif %}

struct WorkItem {
    query_start: u32,   // first token of the sequence in q, out and lse
    query_len: u32,
    context_len: u32,   // position of query token i is context_len + i
    row_start: u32,     // first row of the tile; row = token * GROUP_SIZE + head in the group
    kv_begin: u32,      // keys of this item: kv_begin .. kv_end, perhaps none
    kv_end: u32,
    table_offset: u32,  // word of the sequence's block table in plan
    part_row: u32,      // first partial row, or NO_PARTIAL
    mask_offset: u32,   // word of the sequence's mask bits in plan
    mask_stride: u32,   // mask words per token
    tokens_offset: u32, // word of the list of the rows' tokens in plan; 0: they stand one after another from query_start on
    mask_begin: u32,    // first key that the mask has a bit for; TREE_MASK beside it: each row ends with the first key that the window shows
}

{% if mask %}
// Rows of a tile past its last token are computed like that one.
fn mask_row(item: WorkItem, query: u32) -> u32 {
    return min(query - item.context_len, item.query_len - 1u);
}

fn is_tree(item: WorkItem) -> bool {
    return (item.mask_begin & TREE_MASK) != 0u;
}

{% endif %}
// A work item, its keys narrowed to those that some row of its tile of at most `tile_rows` rows can see.
fn read_item(item_idx: u32, tile_rows: u32) -> WorkItem {
    let word = params.items_offset + item_idx * ITEM_WORDS;
    var item = WorkItem(
        plan[word], plan[word + 1u], plan[word + 2u], plan[word + 3u], plan[word + 4u],
        plan[word + 5u], plan[word + 6u], plan[word + 7u], plan[word + 8u], plan[word + 9u],
        plan[word + 10u], plan[word + 11u],
    );
    if (CAUSAL) {
        let last_row = min(item.row_start + tile_rows, item.query_len * GROUP_SIZE) - 1u;
        item.kv_end = min(item.kv_end, item.context_len + last_row / GROUP_SIZE + 1u);
    }
    // (The keys of a tree's items begin where the window of its root does.)
    if (WINDOW{{ " && !is_tree(item)" if mask }}) {
        let end = item.context_len + item.row_start / GROUP_SIZE + 1u;
        item.kv_begin = max(item.kv_begin, end - min(end, params.window));
    }
    // No iteration for an empty range.
    item.kv_end = select(0u, item.kv_end, item.kv_begin < item.kv_end);
    return item;
}

// The token of a row, in q, out and lse. (Items of the decode kernel have no lists.)
fn token_of(item: WorkItem, row: u32) -> u32 {
    let token = row / GROUP_SIZE;
    if (item.tokens_offset == 0u) {
        return item.query_start + token;
    }
    return plan[item.tokens_offset + token];
}

// The block that holds a key, as the table has it: reading it early hides the wait for it.
fn table_entry(item: WorkItem, key: u32) -> u32 {
    return plan[item.table_offset + key / BLOCK_SIZE];
}

{{ side.cache_row_function() }}
// Whether the query at position `query` sees a key.
fn is_visible(item: WorkItem, key: u32, query: u32) -> bool {
    var visible = key - item.kv_begin < item.kv_end - item.kv_begin;
    if (CAUSAL) {
        visible = visible && key <= query;
    }
    if (WINDOW) {
        var is_near = key + params.window > query;
{% if mask %}
        if (is_tree(item)) {
            is_near = key >= plan[item.mask_offset + (mask_row(item, query) + 1u) * item.mask_stride - 1u];
        }
{% endif %}
        visible = visible && is_near;
    }
{% if mask %}
    {
        // Before the mask there is no word, and past the end of the range perhaps none.
        let mask_begin = item.mask_begin & ~TREE_MASK;
        let bit = max(min(key, item.kv_end - 1u), mask_begin) - mask_begin;
        let word = plan[item.mask_offset + mask_row(item, query) * item.mask_stride + bit / 32u];
        visible = visible && (key < mask_begin || ((word >> (bit % 32u)) & 1u) == 1u);
    }
{% endif %}
    return visible;
}

{{ side.element_function(k_side, "KElement", [k_side.row_bytes * geometry.k_dims // k_side.row_dim, 4]|max) }}
{{ side.element_function(v_side, "VElement", [v_side.row_bytes * geometry.v_dims // v_side.row_dim, 4]|max) }}
