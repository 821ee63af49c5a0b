{#
Elements of rows, rotated by their token's position. Included after rope; reads `{{ rows }}`, of vec4s if `wide`, otherwise of elements, and in the layout `rows_layout`. With `head_norm`
each element is multiplied by its weight before, from `norm_weights`.
#}
{% if head_norm %}
// The weights of four elements of a head; those of its first element are at `first`.
fn weights_of(first: u32, dims: vec4<u32>) -> vec4<f32> {
    let at = first + dims;
    return vec4<f32>(norm_weights[at.x], norm_weights[at.y], norm_weights[at.z], norm_weights[at.w]);
}

{% endif %}
// Four elements{{ ", which are neighbours" if wide }}, of the row that starts at element `start`.
fn row_elements(start: u32, dims: vec4<u32>{{ ", weights: u32" if head_norm }}) -> vec4<f32> {
{% if wide %}
    let elements = {{ host.load(rows_layout, rows ~ "[(start + dims.x) / 4u]") }};
{% else %}
    let at = start + dims;
    let elements = vec4<f32>({{ rows }}[at.x], {{ rows }}[at.y], {{ rows }}[at.z], {{ rows }}[at.w]);
{% endif %}
    return elements{{ " * weights_of(weights, dims)" if head_norm }};
}
{% set weights = ", weights" if head_norm else "" %}

{% if rope == "interleaved" %}
// Elements 8 * vec8_idx .. 8 * vec8_idx + 8 of the row that starts at element `start`: four pairs, rotated.
fn rotated_vec8(start: u32, vec8_idx: u32, position: u32{{ ", weights: u32" if head_norm }}) -> Vec8 {
    let lo = row_elements(start, 8u * vec8_idx + OFFSETS{{ weights }});
    let hi = row_elements(start, 8u * vec8_idx + 4u + OFFSETS{{ weights }});
    // (Elements before the first one wrap around.)
    let dim = 8u * vec8_idx - ROTARY_START;
    if (dim >= ROTARY_DIM) {
        return Vec8(lo, hi);
    }
    let rotated = rotate_pairs(vec4<f32>(lo.xz, hi.xz), vec4<f32>(lo.yw, hi.yw), dim / 2u + OFFSETS, position);
    return Vec8(
        vec4<f32>(rotated.first.x, rotated.second.x, rotated.first.y, rotated.second.y),
        vec4<f32>(rotated.first.z, rotated.second.z, rotated.first.w, rotated.second.w));
}
{% else %}
// Elements dim .. dim + 4 of a row, rotated with their partners, which lie ROTARY_DIM / 2 before or behind.
fn rotated_dims(start: u32, own_dim: u32, position: u32{{ ", weights: u32" if head_norm }}) -> vec4<f32> {
    let own = row_elements(start, own_dim + OFFSETS{{ weights }});
    // (Elements before the first one wrap around.)
    let dim = own_dim - ROTARY_START;
    let dims = dim + OFFSETS;
    if (dim >= ROTARY_DIM) {
        return own;
    }
    let is_second = dims >= vec4<u32>(ROTARY_PAIRS);
    let other = row_elements(start, ROTARY_START + select(dims + ROTARY_PAIRS, dims - ROTARY_PAIRS, is_second){{ weights }});
    let pairs = select(dims, dims - ROTARY_PAIRS, is_second);
    let rotated = rotate_pairs(select(own, other, is_second), select(other, own, is_second), pairs, position);
    return select(rotated.first, rotated.second, is_second);
}

fn rotated_vec8(start: u32, vec8_idx: u32, position: u32{{ ", weights: u32" if head_norm }}) -> Vec8 {
    return Vec8(rotated_dims(start, 8u * vec8_idx, position{{ weights }}), rotated_dims(start, 8u * vec8_idx + 4u, position{{ weights }}));
}
{% endif %}
