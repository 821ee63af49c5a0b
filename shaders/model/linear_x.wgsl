// The 4 inputs from k of a row; zero beyond its end.
fn x_at(row: u32, k: u32) -> vec4<f32> {
{% if aligned %}
    return select(vec4<f32>(), x[(row + min(k, params.in_features - 4u)) / 4u], k < params.in_features);
{% else %}
    let last = params.in_features - 1u;
    let v = vec4<f32>(x[row + min(k, last)], x[row + min(k + 1u, last)], x[row + min(k + 2u, last)], x[row + min(k + 3u, last)]);
    return select(vec4<f32>(), v, vec4<u32>(k, k + 1u, k + 2u, k + 3u) <= vec4<u32>(last));
{% endif %}
}
{% if norm %}

// The norm's 4 weights from k on; anything beyond the end of a row.
fn norm_at(k: u32) -> vec4<f32> {
{% if aligned %}
    return norm_weight[min(k, params.in_features - 4u) / 4u];
{% else %}
    let last = params.in_features - 1u;
    return vec4<f32>(norm_weight[min(k, last)], norm_weight[min(k + 1u, last)], norm_weight[min(k + 2u, last)], norm_weight[min(k + 3u, last)]);
{% endif %}
}
{% endif %}
