// merge: the partial states of a row's key ranges become its result (FlashDecoding's reduction). Ranges that the row shares with rows of other
// sequences have states elsewhere: an item links to the next.
// One workgroup per token and query head; a lane owns every WORKGROUP_SIZE-th vec4 of the row.
// Loop iterations per invocation: with s for the states and l for the items of a row, (s + l) * (1 + ceil(VALUE_VEC4S / WORKGROUP_SIZE)) +
// ceil(VALUE_VEC4S / WORKGROUP_SIZE).
{% import "shared/host_rows.wgsl" as host %}
{% include "shared/attend.wgsl" %}

const STATE_VEC4S: u32 = VALUE_VEC4S + 1u;  // the sum, then (max, sum of weights, 0, 0)
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;
const ITEM_WORDS: u32 = {{ merge_item_words }}u;

struct MergeItem {
    token: u32,         // row in out and lse
    part_row: u32,      // partial row of split 0, KV head 0, first head of the group
    num_splits: u32,
    split_stride: u32,  // partial rows from a split to the next
    head_stride: u32,   // partial rows from a KV head to the next
    next: u32,          // items from here to the one with more states of this token; 0: there are no more
}

fn read_item(item_idx: u32) -> MergeItem {
    let word = params.items_offset + item_idx * ITEM_WORDS;
    return MergeItem(plan[word], plan[word + 1u], plan[word + 2u], plan[word + 3u], plan[word + 4u], plan[word + 5u]);
}

// The partial row of an item's split 0 and this head.
fn first_row(item: MergeItem, q_head: u32) -> u32 {
    return item.part_row + q_head / GROUP_SIZE * item.head_stride + q_head % GROUP_SIZE;
}

@group(0) @binding(0) var<storage, read> partials: array<vec4<f32>>;  // [partial rows, STATE_VEC4S]
@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<{{ host.vec4_type(out_rows) }}>;  // a row of VALUE_VEC4S per token and query head
@group(0) @binding(3) var<uniform> params: AttendParams;
{% if lse %}
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;  // [num_tokens, NUM_Q_HEADS]
{% endif %}
{% if heads %}
// [num_q_heads]: ALiBi slope and sink, both times log2(e); two heads in an element
@group(0) @binding({{ 5 if lse else 4 }}) var<uniform> heads: array<vec4<f32>, {{ (num_q_heads + 1) // 2 }}>;
{% endif %}

@compute @workgroup_size(WORKGROUP_SIZE)
fn merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let item_idx = workgroup.x + workgroup.z * params.grid_x;
    if (item_idx >= params.num_items) {
        return;
    }
    let first = read_item(item_idx);
    let q_head = workgroup.y;

    var row_max = LOGIT_FLOOR;
    var item = first;
    var at = item_idx;
    loop {
        let row = first_row(item, q_head);
        for (var split = 0u; split < item.num_splits; split++) {
            row_max = max(row_max, partials[(row + split * item.split_stride) * STATE_VEC4S + VALUE_VEC4S].x);
        }
        if (item.next == 0u) {
            break;
        }
        at += item.next;
        item = read_item(at);
    }
{% if sinks %}
    let sink = head_sink(q_head);
    row_max = max(row_max, sink);
    let sink_weight = exp2(sink - row_max);
{% else %}
    let sink_weight = 0.0;
{% endif %}

    var weight_sum = sink_weight;
    for (var i = lane; i < VALUE_VEC4S; i += WORKGROUP_SIZE) {
        weight_sum = sink_weight;
        var sum = vec4<f32>(0.0);
        item = first;
        at = item_idx;
        loop {
            let row_of_item = first_row(item, q_head);
            for (var split = 0u; split < item.num_splits; split++) {
                let row = (row_of_item + split * item.split_stride) * STATE_VEC4S;
                let state = partials[row + VALUE_VEC4S].xy;
                let scale = exp2(state.x - row_max);
                weight_sum = fma(state.y, scale, weight_sum);
                sum += partials[row + i] * scale;
            }
            if (item.next == 0u) {
                break;
            }
            at += item.next;
            item = read_item(at);
        }
        store_out(out_begin(first.token * NUM_Q_HEADS + q_head) + i, sum * inverse_sum(weight_sum));
    }
{% if lse %}
    // Lane 0 owns a vec4 of every row, so it knows the sum of weights.
    if (lane == 0u) {
        lse[first.token * NUM_Q_HEADS + q_head] = natural_lse(row_max, weight_sum);
    }
{% endif %}
}
