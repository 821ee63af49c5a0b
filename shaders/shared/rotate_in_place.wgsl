{#
Four pairs of a row of `{{ rows }}`, rotated in place: no other invocation touches them. Included after rope; `wide`: the rows are vec4s, in the layout `rows_layout`.
#}
const ROW_GROUPS: u32 = (ROTARY_PAIRS + 3u) / 4u;  // of a row, of four pairs each

// Rotates the pairs from 4 * pair_group on of the row that starts at element `start`.
fn rotate_in_place(start: u32, pair_group: u32, position: u32) {
    let pair = 4u * pair_group;
    let pairs = pair + OFFSETS;
    let base = {{ "(start + ROTARY_START) / 4u" if wide else "start + ROTARY_START" }};
{% if rope == "interleaved" %}
    let at = base + pair / 2u;
    let lo = {{ host.load(rows_layout, rows ~ "[at]") }};
    let hi = {{ host.load(rows_layout, rows ~ "[at + 1u]") }};
    let rotated = rotate_pairs(vec4<f32>(lo.xz, hi.xz), vec4<f32>(lo.yw, hi.yw), pairs, position);
    let new_lo = vec4<f32>(rotated.first.x, rotated.second.x, rotated.first.y, rotated.second.y);
    let new_hi = vec4<f32>(rotated.first.z, rotated.second.z, rotated.first.w, rotated.second.w);
    {{ rows }}[at] = {{ host.stored(rows_layout, "new_lo") }};
    {{ rows }}[at + 1u] = {{ host.stored(rows_layout, "new_hi") }};
{% elif wide %}
    let at = base + pair / 4u;
    let partner = at + ROTARY_PAIRS / 4u;
    let rotated = rotate_pairs({{ host.load(rows_layout, rows ~ "[at]") }}, {{ host.load(rows_layout, rows ~ "[partner]") }}, pairs, position);
    {{ rows }}[at] = {{ host.stored(rows_layout, "rotated.first") }};
    {{ rows }}[partner] = {{ host.stored(rows_layout, "rotated.second") }};
{% else %}
    let at = base + min(pairs, vec4<u32>(ROTARY_PAIRS - 1u));
    let partner = at + ROTARY_PAIRS;
    let first = vec4<f32>({{ rows }}[at.x], {{ rows }}[at.y], {{ rows }}[at.z], {{ rows }}[at.w]);
    let second = vec4<f32>({{ rows }}[partner.x], {{ rows }}[partner.y], {{ rows }}[partner.z], {{ rows }}[partner.w]);
    let rotated = rotate_pairs(first, second, pairs, position);
{% for i in "xyzw" %}
    if (pairs.{{ i }} < ROTARY_PAIRS) {
        {{ rows }}[at.{{ i }}] = rotated.first.{{ i }};
        {{ rows }}[partner.{{ i }}] = rotated.second.{{ i }};
    }
{% endfor %}
{% endif %}
}
