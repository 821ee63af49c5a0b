{#
select_experts: to which experts each row of a mixture goes, and how much each of them counts, from the router's logits. LANES invocations share a
row.

The score of an expert is the softmax of the logits over all experts, or the sigmoid of its own logit. Those with the highest scores are
selected, of equal ones the first; with `correction` a number of each expert is added to its score for the selection only. With groups of experts, only
the best groups are selected from: those whose best expert, or whose best two together, have the highest values. The weight of a selected expert is
its score, over the sum of those that are selected if `renormalise`, times `scale`.

What is compared are the bits of floats, as integers in the order of the numbers, with NaN below all of them: whatever the logits are, SELECTED
different experts are found.

Iterations per invocation: (SELECTED + 4) * ceil(EXPERTS / LANES), and with more than one lane SELECTED * LANES; with groups EXPERTS / LANES + 2 * GROUPS.
Workgroup memory: with more than one lane a number, a key and an expert per invocation; with groups a key and a flag of each for each row.
#}
{% set score_chooses = correction or group_score == "top_two" %}
const EXPERTS: u32 = {{ experts }}u;
const SELECTED: u32 = {{ selected }}u;
const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const GRID_X: u32 = {{ grid_x }}u;
{% if groups %}
const GROUPS: u32 = {{ groups }}u;
const GROUP_EXPERTS: u32 = {{ experts // groups }}u;
const SELECTED_GROUPS: u32 = {{ selected_groups }}u;
{% endif %}

@group(0) @binding(0) var<storage, read> logits: array<f32>;  // [rows, EXPERTS]
@group(0) @binding(1) var<storage, read_write> ids: array<u32>;  // [rows, SELECTED]
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;  // [rows, SELECTED]
{% if correction %}
@group(0) @binding(3) var<storage, read> correction: array<f32>;  // [EXPERTS]
{% endif %}

{% if lanes > 1 %}
var<workgroup> partial_sums: array<f32, {{ lanes * rows }}>;
var<workgroup> partial_keys: array<u32, {{ lanes * rows }}>;
var<workgroup> partial_ids: array<u32, {{ lanes * rows }}>;
{% endif %}
{% if groups %}
var<workgroup> group_keys: array<u32, {{ groups * rows }}>;
var<workgroup> group_flags: array<u32, {{ groups * rows }}>;
{% endif %}

// In the order of the numbers; NaN is 0, and everything else more.
fn key_of(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let key = select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
    return select(key, 0u, (bits & 0x7fffffffu) > 0x7f800000u);
}

// `most` and `sum` are those of the softmax.
fn score(logit: f32, most: f32, sum: f32) -> f32 {
{% if scoring == "softmax" %}
    return exp(logit - most) / sum;
{% else %}
    // exp(88) is finite, exp(89) is not.
    return 1.0 / (1.0 + exp(clamp(-logit, -88.0, 88.0)));
{% endif %}
}

// What experts are selected by: their logits have the order of their scores.
fn choice(at: u32, expert: u32, most: f32, sum: f32) -> f32 {
{% if score_chooses %}
    return score(logits[at + expert], most, sum){% if correction %} + correction[expert]{% endif %};
{% else %}
    return logits[at + expert];
{% endif %}
}

@compute @workgroup_size({{ lanes * rows }})
fn select_experts(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let num_rows = arrayLength(&logits) / EXPERTS;
    let slot = lane / LANES;
    let part = lane % LANES;
    let own_row = (workgroup.y * GRID_X + workgroup.x) * ROWS + slot;
    // Rows beyond the last one repeat it and are not stored.
    let row = min(own_row, num_rows - 1u);
    let at = row * EXPERTS;

    var most = 0.0;
    var sum = 1.0;
{% if scoring == "softmax" %}
    most = logits[at + min(part, EXPERTS - 1u)];
    for (var e = part; e < EXPERTS; e += LANES) {
        most = max(most, logits[at + e]);
    }
{% if lanes > 1 %}
    partial_sums[lane] = most;
    workgroupBarrier();
    for (var i = 0u; i < LANES; i++) {
        most = max(most, partial_sums[slot * LANES + i]);
    }
    workgroupBarrier();
{% endif %}
    sum = 0.0;
    for (var e = part; e < EXPERTS; e += LANES) {
        sum += exp(logits[at + e] - most);
    }
{% if lanes > 1 %}
    partial_sums[lane] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var i = 0u; i < LANES; i++) {
        sum += partial_sums[slot * LANES + i];
    }
{% endif %}
{% endif %}

{% if groups %}
    for (var g = part; g < GROUPS; g += LANES) {
        var best = key_of(choice(at, g * GROUP_EXPERTS, most, sum));
{% if group_score == "top_two" %}
        var first = choice(at, g * GROUP_EXPERTS, most, sum);
        var second = choice(at, g * GROUP_EXPERTS + 1u, most, sum);
        if (second > first) {
            let swapped = first;
            first = second;
            second = swapped;
        }
        for (var e = 2u; e < GROUP_EXPERTS; e++) {
            let value = choice(at, g * GROUP_EXPERTS + e, most, sum);
            second = select(max(second, value), first, value > first);
            first = max(first, value);
        }
        best = key_of(first + second);
{% else %}
        for (var e = 1u; e < GROUP_EXPERTS; e++) {
            best = max(best, key_of(choice(at, g * GROUP_EXPERTS + e, most, sum)));
        }
{% endif %}
        group_keys[slot * GROUPS + g] = best;
    }
    workgroupBarrier();
    for (var g = part; g < GROUPS; g += LANES) {
        let key = group_keys[slot * GROUPS + g];
        var better = 0u;
        for (var i = 0u; i < GROUPS; i++) {
            let other = group_keys[slot * GROUPS + i];
            better += u32(other > key || (other == key && i < g));
        }
        group_flags[slot * GROUPS + g] = u32(better < SELECTED_GROUPS);
    }
    workgroupBarrier();
{% endif %}

    // Each time the best of those that come after the last one.
    var last_key = 0xffffffffu;
    var last_id = 0u;
    var total = 0.0;
    for (var n = 0u; n < SELECTED; n++) {
        var key = 0u;
        var id = EXPERTS;
        for (var e = part; e < EXPERTS; e += LANES) {
            let other = key_of(choice(at, e, most, sum));
            var is_left = other < last_key || (other == last_key && e > last_id);
{% if groups %}
            is_left = is_left && group_flags[slot * GROUPS + e / GROUP_EXPERTS] != 0u;
{% endif %}
            if (is_left && (id == EXPERTS || other > key)) {
                key = other;
                id = e;
            }
        }
{% if lanes > 1 %}
        partial_keys[lane] = key;
        partial_ids[lane] = id;
        workgroupBarrier();
        for (var i = 0u; i < LANES; i++) {
            let other = partial_keys[slot * LANES + i];
            let other_id = partial_ids[slot * LANES + i];
            if (other_id < EXPERTS && (id == EXPERTS || other > key || (other == key && other_id < id))) {
                key = other;
                id = other_id;
            }
        }
        workgroupBarrier();
{% endif %}
        id = min(id, EXPERTS - 1u);
        last_key = key;
        last_id = id;
        let weight = score(logits[at + id], most, sum);
        total += weight;
        if (part == 0u && own_row < num_rows) {
            ids[row * SELECTED + n] = id;
            weights[row * SELECTED + n] = weight;
        }
    }
    if (part == 0u && own_row < num_rows) {
{% if renormalise %}
        // Sigmoids may all be 0.
        let factor = {{ scale }} / (total + 1e-20);
{% else %}
        let factor = {{ scale }};
{% endif %}
        for (var n = 0u; n < SELECTED; n++) {
            weights[row * SELECTED + n] *= factor;
        }
    }
}
