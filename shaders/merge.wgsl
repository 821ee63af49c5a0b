// merge: the partial states of a row's key ranges become its result (FlashDecoding's reduction).
// One workgroup per token and query head; a lane owns every WORKGROUP_SIZE-th vec4 of the row.
// Loop iterations per invocation: num_splits * (1 + ceil(HEAD_DIM / 4 / WORKGROUP_SIZE)) + ceil(HEAD_DIM / 4 / WORKGROUP_SIZE).
{% include "shared/attend_params.wgsl" %}

const HEAD_VEC4S: u32 = {{ head_dim // 4 }}u;
const STATE_VEC4S: u32 = HEAD_VEC4S + 1u;  // the sum, then (max, sum of weights, 0, 0)
const GROUP_SIZE: u32 = {{ group_size }}u;
const NUM_Q_HEADS: u32 = {{ num_q_heads }}u;
const WORKGROUP_SIZE: u32 = {{ workgroup_size }}u;
const ITEM_WORDS: u32 = 8u;
const MIN_MAX: f32 = -0x1p127;  // the max of a state that saw no key

@group(0) @binding(0) var<storage, read> partials: array<vec4<f32>>;  // [partial rows, STATE_VEC4S]
@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;  // [num_tokens, NUM_Q_HEADS, HEAD_VEC4S]
@group(0) @binding(3) var<uniform> params: AttendParams;
{% if lse %}
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;  // [num_tokens, NUM_Q_HEADS]
{% endif %}

@compute @workgroup_size(WORKGROUP_SIZE)
fn merge(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let item_idx = workgroup.x + workgroup.z * params.grid_x;
  if (item_idx >= params.num_items) {
    return;
  }
  let item = params.items_offset + item_idx * ITEM_WORDS;
  let q_head = workgroup.y;
  let kv_head = q_head / GROUP_SIZE;
  let token = plan[item];
  let first_row = plan[item + 1u] + kv_head * plan[item + 4u] + q_head % GROUP_SIZE;
  let num_splits = plan[item + 2u];
  let split_stride = plan[item + 3u];

  var row_max = MIN_MAX;
  for (var split = 0u; split < num_splits; split++) {
    row_max = max(row_max, partials[(first_row + split * split_stride) * STATE_VEC4S + HEAD_VEC4S].x);
  }
{% if sinks %}
  let sink = bitcast<f32>(plan[params.head_offset + NUM_Q_HEADS + q_head]);
  row_max = max(row_max, sink);
  let sink_weight = exp2(sink - row_max);
{% else %}
  let sink_weight = 0.0;
{% endif %}

  var weight_sum = sink_weight;
  for (var i = lane; i < HEAD_VEC4S; i += WORKGROUP_SIZE) {
    weight_sum = sink_weight;
    var sum = vec4<f32>(0.0);
    for (var split = 0u; split < num_splits; split++) {
      let row = (first_row + split * split_stride) * STATE_VEC4S;
      let state = partials[row + HEAD_VEC4S].xy;
      let scale = exp2(state.x - row_max);
      weight_sum += state.y * scale;
      sum += partials[row + i] * scale;
    }
    // Without a visible key and without a sink the sum is 0 and so is the result.
    out[(token * NUM_Q_HEADS + q_head) * HEAD_VEC4S + i] = select(sum / weight_sum, vec4<f32>(0.0), weight_sum == 0.0);
  }
{% if lse %}
  // Lane 0 owns a vec4 of every row, so it knows the sum of weights.
  if (lane == 0u) {
    var minus_infinity = 0xff800000u;  // a variable, because constant infinities are refused
    let natural = (row_max + log2(weight_sum)) * 0.6931471805599453;
    lse[token * NUM_Q_HEADS + q_head] = select(natural, bitcast<f32>(minus_infinity), weight_sum == 0.0);
  }
{% endif %}
}
