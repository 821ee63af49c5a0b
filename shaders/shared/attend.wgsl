{# What decode, prefill and merge share: parameters, and what is said of a head and of a row. The includer declares `params` and `out`, and `heads` if there are any. #}
{% import "shared/host_rows.wgsl" as host %}
{% from "shared/kv_rows.wgsl" import f16_functions %}
struct AttendParams {
    items_offset: u32,   // first item, in words of plan
    num_items: u32,
    grid_x: u32,         // item_idx = workgroup_id.x + workgroup_id.z * grid_x
    num_blocks: u32,     // of the pool
    qk_scale: f32,       // takes q . k to log2 units; with a soft cap to units of the cap
    softcap_log2e: f32,
    window: u32,         // newest visible keys, the query's own position included; at most 2^31
    reserved: u32,
}

// Of a row of q, and of a row of out and of partial sums.
const HEAD_VEC4S: u32 = {{ head_dim // 4 }}u;
const VALUE_VEC4S: u32 = {{ value_dim // 4 }}u;
const NUM_Q_HEADS: u32 = {{ num_q_heads }}u;
const GROUP_SIZE: u32 = {{ group_size }}u;
// Where the running maximum starts: finite, and below any logit.
const LOGIT_FLOOR: f32 = {{ logit_floor }};

{% if heads %}
fn head_slope(q_head: u32) -> f32 {
    let pair = heads[q_head / 2u];
    return select(pair.x, pair.z, q_head % 2u == 1u);
}

fn head_sink(q_head: u32) -> f32 {
    let pair = heads[q_head / 2u];
    return select(pair.y, pair.w, q_head % 2u == 1u);
}
{% else %}
// Without ALiBi and sinks these are not called.
fn head_slope(q_head: u32) -> f32 {
    return 0.0;
}

fn head_sink(q_head: u32) -> f32 {
    return 0.0;
}
{% endif %}

// How a row ends: its sum of p * v, times what `with_sink` says if there is a sink, times `inverse_sum`. Kernels that know all keys of a row do the same
// in the same order as `merge` does with partial states, so that a row has the same bits whichever it was.

// (max, sum of p, factor of the sum of p * v) of a row when its sink has joined.
fn with_sink(logit_max: f32, p_sum: f32, sink: f32) -> vec3<f32> {
    let largest = max(logit_max, sink);
    let factor = exp2(logit_max - largest);
    return vec3<f32>(largest, fma(p_sum, factor, exp2(sink - largest)), factor);
}

// A row that sees nothing has all sums zero.
fn inverse_sum(p_sum: f32) -> f32 {
    return 1.0 / select(p_sum, 1.0, p_sum == 0.0);
}

// Where a row of out begins, in vec4s; rows are token * NUM_Q_HEADS + head.
fn out_begin(row: u32) -> u32 {
    return {{ host.begin(out_rows, "row / NUM_Q_HEADS", "row % NUM_Q_HEADS") if out_rows.strided else "row * VALUE_VEC4S" }};
}

{% if out_rows.halves %}
{{ f16_functions() }}
{% endif %}
fn store_out(at: u32, x: vec4<f32>) {
    out[at] = {{ host.stored(out_rows, "x") }};
}
{% if lse %}

// ln of the sum of exp(logit), from a maximum and sum in log2 units.
fn natural_lse(logit_max: f32, p_sum: f32) -> f32 {
    // WGSL has no infinity literal, and its bits must not be a constant expression either.
    var minus_infinity = 0xff800000u;
    return select(bitcast<f32>(minus_infinity), (logit_max + log2(max(p_sum, 1e-30))) * 0.6931471805599453, p_sum > 0.0);
}
{% endif %}
