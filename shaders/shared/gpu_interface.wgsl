{# What the GPU-shaped kernels have beside shared/attend_interface.wgsl: functions of sides, logits and weights. #}
{% import "shared/kv_side.wgsl" as side %}
{% import "shared/kv_codes.wgsl" as codes %}
{% include "shared/attend_interface.wgsl" %}

{{ codes.float_functions([k_format, v_format]) }}
{% for s, type in [(k_side, geometry.k_type), (v_side, geometry.v_type)] if s.row_scales %}
{{ side.scale_word_function(s, type) }}
{% endfor %}
{% if k_side.channel_scales %}
{{ side.channel_function(k_side, geometry.k_type, num_kv_heads) }}
{% endif %}
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
