{#
Attention of many query rows, one row per lane and register set: lane i of the workgroup's one subgroup has rows i, i + LANES, ... of
the tile. A load costs per lane and component (see shared/cpu_kv.wgsl), so the lanes load different parts of the K and V rows of an
iteration, and each part reaches the other lanes by subgroupBroadcast.

A larger tile shares each load among more rows; more keys per iteration save rescaling of the sums and llvmpipe's masking of all
loop-carried variables. The price is JIT time, as all is unrolled: tile_q * head_dim = 4096 with two keys takes some 1.5 s, and twice
that tile is up to 1.4 times as fast and takes 3 s. (Rows of q and of values count alike.)

Scales are applied as in cpu/decode.wgsl: to scores and weights, or to q.

A row of V may hold NaN or infinity and be hidden from some rows of the tile only, for whom its weight 0 would make NaN of it. So such
elements count as 0; if there were any, a second pass over the keys adds something huge in their place to the rows that see them, with
zero queries, so that all weights are 1 or 0. (On adapters whose branches don't skip anything, this costs minimum: a few instructions per
element that a lane loads.)

Without subgroups every lane loads the whole K and V rows itself: for few lanes that is cheaper than barriers and workgroup memory.

tile_q: rows per workgroup, a multiple of LANES. tile_kv: keys per iteration, at most LANES; 1 without subgroups.
It is 1 without subgroups.
Iterations per invocation: 2 * (ceil((kv_end - kv_begin) / tile_kv) + 2 + head_dim / 4) + value_dim / 4.
Workgroup memory: none.
#}
{% set g = geometry %}
{% import "shared/cpu_kv.wgsl" as kv %}
{% set row_scales = k_side.row_scales or v_side.row_scales %}
{% set offsets = k_side.row_scales or k_side.channel_scales %}
{# The weights that V's elements or codes are multiplied by. #}
{% set weight = "pv" if v_side.row_scales else "p" %}
{% include "shared/cpu_bindings.wgsl" %}
{% if g.screens %}

const EXPONENT: vec4<u32> = vec4<u32>(0x7f800000u);  // all of it is set in infinities and NaN

// Four elements of V, and `instead` in place of those that are no numbers. `keep`: bits of the others.
fn screen(v: vec4<f32>, keep: u32, instead: f32) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(v);
    return select(bitcast<vec4<f32>>(bits & vec4<u32>(keep)), vec4<f32>(instead), (bits & EXPONENT) == EXPONENT);
}
{% endif %}

{% macro plus(n) %}{% if n %}{{ n }}u + {% endif %}{% endmacro %}
{# What the lanes load in round j of the rows of all keys of an iteration. #}
{% macro load_round(x, type, loads, j) %}
{% if g.lookups == g.iter_keys %}
        let {{ x }}_row{{ j }} = subgroupShuffle(looked_up, {{ x }}_key{{ j }});
{% else %}
        let {{ x }}_row{{ j }} = block_row + clamp(base + {{ x }}_key{{ j }}, item.kv_begin, item.kv_end - 1u) - first_key;
{% endif %}
{% if (j + 1) * g.lanes > g.iter_keys * loads %}
        var {{ x }}{{ j }} = {{ type }}();
        if (lane < {{ g.iter_keys * loads - j * g.lanes }}u) {
            {{ x }}{{ j }} = {{ x }}_element({{ x }}_row{{ j }}, {{ x }}_part{{ j }});
        }
{% else %}
        let {{ x }}{{ j }} = {{ x }}_element({{ x }}_row{{ j }}, {{ x }}_part{{ j }});
{% endif %}
{% endmacro %}
{# Loads those rows, but for V's first round, which is loaded already, and declares x{round}_{i}. #}
{% macro load_rows(x, type, format, loads, vecs) %}
{% for j in range(g.k_rounds if x == "k" else g.v_rounds) %}
{% if x == "k" or j > 0 %}
{{ load_round(x, type, loads, j) }}
{%- endif %}
{% for i in range(vecs) %}
{% if g.screens and x == "v" %}
        let raw_{{ x }}{{ j }}_{{ i }} = {{ kv.widen(format, type, x ~ j, i) }};
        let {{ x }}{{ j }}_{{ i }} = screen(raw_{{ x }}{{ j }}_{{ i }}, keep, instead);
        exponents = max(exponents, bitcast<vec4<u32>>(raw_{{ x }}{{ j }}_{{ i }}) & EXPONENT);
{% else %}
        let {{ x }}{{ j }}_{{ i }} = {{ kv.widen(format, type, x ~ j, i) }};
{% endif %}
{% endfor %}
{% endfor %}
{% endmacro %}
{# Dims 4*e .. 4*e+4 of key t's row, in all lanes. #}
{% macro all_lanes(x, t, e, format, loads, vecs) -%}
    {%- if subgroups -%}
    {%- set part = t * loads + e // vecs -%}
    subgroupBroadcast({{ x }}{{ part // g.lanes }}_{{ e % vecs }}, {{ part % g.lanes }}u)
    {%- else -%}
    {{ kv.widen(format, g.k_type if x == "k" else g.v_type, x ~ "_element(block_row, " ~ e // vecs ~ "u)", e % vecs) }}
    {%- endif -%}
{%- endmacro %}

@compute @workgroup_size({{ g.lanes }})
fn prefill(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
{% include "shared/cpu_item.wgsl" %}

    // This lane's rows; those beyond the tile repeat its last one and are not stored.
{% for r in range(g.rows) %}
    let row{{ r }} = min(item.row_start + {{ plus(r * g.lanes) }}lane, last_row);
    let pos{{ r }} = item.context_len + row{{ r }} / GROUP_SIZE;
    let q_row{{ r }} = token_of(item, row{{ r }}) * NUM_Q_HEADS + kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE;
{% if alibi or sinks %}
    let q_head{{ r }} = kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE;
{% endif %}
{% if alibi %}
    {{ "var" if g.screens else "let" }} slope{{ r }} = head_slope(q_head{{ r }});
{% endif %}
    var max{{ r }} = LOGIT_FLOOR;
    var sum{{ r }} = 0.0;
{% if offsets %}
    var offset{{ r }} = 0.0;  // what the minima add to scores: {{ "sum(q), times that of the key's row" if k_side.row_scales else "q . minimum, of the channels" }}
{% endif %}
{% if v_side.row_scales %}
    var minimum{{ r }} = 0.0;
{% endif %}
{% for e in range(g.q_vecs) %}
    var q{{ r }}_{{ e }} = vec4<f32>();
{% endfor %}
{% for e in range(g.o_vecs) %}
    var o{{ r }}_{{ e }} = vec4<f32>();
{% endfor %}
{% endfor %}

    // A load or store compiles to much code, and registers can't be indexed: so one load per row in a loop that shifts the registers.
    // (The bounds hide their values, or the compiler would unroll the loops.)
    let q_vecs = select(HEAD_VEC4S, 0u, item.query_len == 0u);
    let out_vecs = select(VALUE_VEC4S, 0u, item.query_len == 0u);
{% if g.screens %}
    var qk_scale = params.qk_scale;
    var keep = 0xffffffffu;
    var instead = 0.0;
    var exponents = vec4<u32>();  // the largest in V
{% for r in range(g.rows) %}
    var row_max{{ r }} = LOGIT_FLOOR;
    var row_sum{{ r }} = 0.0;
{% endfor %}
    loop {
{% endif %}
    for (var e = 0u; e < q_vecs; e++) {
{% if k_side.channel_scales %}
        let channel_scale = k_channels(0u, kv_head, 4u * e);
        let channel_minimum = k_channels(1u, kv_head, 4u * e);
{% endif %}
{% for r in range(g.rows) %}
{% for e in range(g.q_vecs - 1) %}
        q{{ r }}_{{ e }} = q{{ r }}_{{ e + 1 }};
{% endfor %}
        q{{ r }}_{{ g.q_vecs - 1 }} = load_q(q_begin(q_row{{ r }}) + e) * {{ "qk_scale" if g.screens else "params.qk_scale" }};
{% if k_side.channel_scales %}
        offset{{ r }} += dot(q{{ r }}_{{ g.q_vecs - 1 }}, channel_minimum);
        q{{ r }}_{{ g.q_vecs - 1 }} *= channel_scale;
{% elif k_side.row_scales %}
        offset{{ r }} += dot(q{{ r }}_{{ g.q_vecs - 1 }}, vec4<f32>(1.0));
{% endif %}
{% endfor %}
    }

{% if subgroups %}
    // What this lane loads of the K and V rows of an iteration: which key, and which part of its row, in each round of loads.
{% for x, loads in [("k", g.k_loads), ("v", g.v_loads)] %}
{% for j in range(g.k_rounds if x == "k" else g.v_rounds) %}
    let {{ x }}_key{{ j }} = min(({{ plus(j * g.lanes) }}lane) / {{ loads }}u, ITER_KEYS - 1u);
    let {{ x }}_part{{ j }} = ({{ plus(j * g.lanes) }}lane) % {{ loads }}u;
{% endfor %}
{% endfor %}

{% endif %}
    for (var base = item.kv_begin{% if g.iter_keys > 1 %} - item.kv_begin % ITER_KEYS{% endif %}; base < item.kv_end; base += ITER_KEYS) {
        // Cache rows of the keys. Keys outside the range are read as their nearest neighbour inside and get weight zero.
{% if not subgroups %}
        let block_row = key_row(item, kv_head, base);
{% else %}
        var looked_up = 0u;
        if (lane < {{ g.lookups }}u) {
            looked_up = key_row(item, kv_head, clamp(base + lane, item.kv_begin, item.kv_end - 1u));
        }
{% if g.lookups < g.iter_keys %}
        let block_row = subgroupBroadcast(looked_up, 0u);
        let first_key = clamp(base, item.kv_begin, item.kv_end - 1u);
{% endif %}
{% endif %}
{% for x, scaled in [("k", k_side.row_scales), ("v", v_side.row_scales)] if scaled %}
        // Scale and minimum of {{ x|upper }}'s row of each key.
{% if subgroups %}
        var {{ x }}_scale = vec2<f32>();
        if (lane < ITER_KEYS) {
            {{ x }}_scale = {{ x }}_row_scale({{ "looked_up" if g.lookups == g.iter_keys else "block_row + clamp(base + lane, item.kv_begin, item.kv_end - 1u) - first_key" }});
        }
{% for t in range(g.iter_keys) %}
        let {{ x }}_scale{{ t }} = subgroupBroadcast({{ x }}_scale, {{ t }}u);
{% endfor %}
{% else %}
        let {{ x }}_scale0 = {{ x }}_row_scale(block_row);
{% endif %}
{% endfor %}

        // Scores. (V's first load comes before K's, so that the waits for both overlap.)
{% if subgroups %}
{{ load_round("v", g.v_type, g.v_loads, 0) }}
{{ load_rows("k", g.k_type, k_format, g.k_loads, g.k_vecs) }}
{%- endif %}
{% for r in range(g.rows) %}{% for t in range(g.iter_keys) %}
        var s{{ r }}_{{ t }} = 0.0;
{% endfor %}{% endfor %}
{% for first in range(0, g.rows, g.row_block) %}
{% for e in range(g.q_vecs) %}
        {
{% for t in range(g.iter_keys) %}
            let k_{{ t }} = {{ all_lanes("k", t, e, k_format, g.k_loads, g.k_vecs) }};
{% for r in range(first, [first + g.row_block, g.rows] | min) %}
            s{{ r }}_{{ t }} += dot(q{{ r }}_{{ e }}, k_{{ t }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% endfor %}

        // Weights: one running max and one rescaling per row and iteration.
{% for t in range(g.iter_keys) %}
        let key{{ t }} = {{ plus(t) }}base;
{% endfor %}
{% for r in range(g.rows) %}
        var new_max{{ r }} = max{{ r }};
{% for t in range(g.iter_keys) %}
        let visible{{ r }}_{{ t }} = is_visible(item, key{{ t }}, pos{{ r }});
{% if k_side.row_scales %}
        s{{ r }}_{{ t }} = s{{ r }}_{{ t }} * k_scale{{ t }}.x + k_scale{{ t }}.y * offset{{ r }};
{% elif k_side.channel_scales %}
        s{{ r }}_{{ t }} += offset{{ r }};
{% endif %}
{% if softcap %}
        s{{ r }}_{{ t }} = params.softcap_log2e * tanh(clamp(s{{ r }}_{{ t }}, -10.0, 10.0));
{% endif %}
{% if alibi %}
        s{{ r }}_{{ t }} += slope{{ r }} * (f32(key{{ t }}) - f32(pos{{ r }}));
{% endif %}
        s{{ r }}_{{ t }} = select(LOGIT_FLOOR, s{{ r }}_{{ t }}, visible{{ r }}_{{ t }});
        new_max{{ r }} = max(new_max{{ r }}, s{{ r }}_{{ t }});
{% endfor %}
        let scale{{ r }} = exp2(max{{ r }} - new_max{{ r }});
        max{{ r }} = new_max{{ r }};
        sum{{ r }} *= scale{{ r }};
{% if v_side.row_scales %}
        minimum{{ r }} *= scale{{ r }};
{% endif %}
{% for t in range(g.iter_keys) %}
        let p{{ r }}_{{ t }} = select(0.0, exp2(s{{ r }}_{{ t }} - new_max{{ r }}), visible{{ r }}_{{ t }});
        sum{{ r }} += p{{ r }}_{{ t }};
{% if v_side.row_scales %}
        // (What lies in a slot that is not visible may be NaN.)
        let pv{{ r }}_{{ t }} = select(0.0, p{{ r }}_{{ t }} * v_scale{{ t }}.x, visible{{ r }}_{{ t }});
        minimum{{ r }} += select(0.0, p{{ r }}_{{ t }} * v_scale{{ t }}.y, visible{{ r }}_{{ t }});
{% endif %}
{% endfor %}
{% endfor %}

        // Weighted sum of values.
{% if subgroups %}
{{ load_rows("v", g.v_type, v_format, g.v_loads, g.v_vecs) }}
{%- endif %}
{% for first in range(0, g.rows, g.row_block) %}
{% for e in range(g.o_vecs) %}
        {
{% for t in range(g.iter_keys) %}
{% if g.screens and not subgroups %}
            let raw_v_{{ t }} = {{ all_lanes("v", t, e, v_format, g.v_loads, g.v_vecs) }};
            let v_{{ t }} = screen(raw_v_{{ t }}, keep, instead);
            exponents = max(exponents, bitcast<vec4<u32>>(raw_v_{{ t }}) & EXPONENT);
{% else %}
            let v_{{ t }} = {{ all_lanes("v", t, e, v_format, g.v_loads, g.v_vecs) }};
{% endif %}
{% endfor %}
{% for r in range(first, [first + g.row_block, g.rows] | min) %}
            o{{ r }}_{{ e }} = o{{ r }}_{{ e }} * scale{{ r }}{% for t in range(g.iter_keys) %} + {{ weight }}{{ r }}_{{ t }} * v_{{ t }}{% endfor %};
{% endfor %}
        }
{% endfor %}
{% endfor %}
    }

{% if g.screens %}
        let is_last = instead > 0.0 || !{{ "subgroupAny" if subgroups else "" }}(any(exponents == EXPONENT));
        if (instead == 0.0) {
{% for r in range(g.rows) %}
            row_max{{ r }} = max{{ r }};
            row_sum{{ r }} = sum{{ r }};
{% endfor %}
        }
        if (is_last) {
            break;
        }
        // The first visible key of a row, whose logit is 0, divides its sums by 4: times 4 at the end, they are what they were, or overflow.
        qk_scale = 0.0;
        keep = 0u;
        instead = 3.4e38;
{% for r in range(g.rows) %}
        max{{ r }} = -2.0;
{% if alibi %}
        slope{{ r }} = 0.0;
{% endif %}
{% if offsets %}
        offset{{ r }} = 0.0;
{% endif %}
{% endfor %}
    }
{% for r in range(g.rows) %}
    max{{ r }} = row_max{{ r }};
    sum{{ r }} = row_sum{{ r }};
{% endfor %}
    let restore = select(1.0, 4.0, instead > 0.0);
    let nan_bit = select(0u, 0x00400000u, instead > 0.0);

{% endif %}
    // Partial states go out as they are, whole rows are divided by their sums.
{% for r in range(g.rows) %}
    let live{{ r }} = item.row_start + {{ plus(r * g.lanes) }}lane <= last_row;
    let part{{ r }} = (item.part_row + kv_head * num_rows + row{{ r }}) * (VALUE_VEC4S + 1u);
{% if sinks %}
    var scale{{ r }} = 1.0;
{% endif %}
    var inverse{{ r }} = 1.0;
    if (item.part_row == NO_PARTIAL) {
{% if sinks %}
        let joined = with_sink(max{{ r }}, sum{{ r }}, head_sink(q_head{{ r }}));
        max{{ r }} = joined.x;
        sum{{ r }} = joined.y;
        scale{{ r }} = joined.z;
{% endif %}
        inverse{{ r }} = inverse_sum(sum{{ r }});
{% if lse %}
        if (live{{ r }}) {
            lse[q_row{{ r }}] = natural_lse(max{{ r }}, sum{{ r }});
        }
{% endif %}
    } else if (live{{ r }}) {
        partials[part{{ r }} + VALUE_VEC4S] = vec4<f32>(max{{ r }}, sum{{ r }}, 0.0, 0.0);
    }
{% endfor %}
    for (var e = 0u; e < out_vecs; e++) {
{% for r in range(g.rows) %}
        if (live{{ r }}) {
{% if g.screens %}
            // Where something huge was added stands NaN.
            let bits = bitcast<vec4<u32>>(o{{ r }}_0 * restore{{ " * scale%d"|format(r) if sinks }} * inverse{{ r }});
            let result = bitcast<vec4<f32>>(bits | select(vec4<u32>(), vec4<u32>(nan_bit), (bits & EXPONENT) == EXPONENT));
{% else %}
            let result = {{ "(o%d_0 + minimum%d)"|format(r, r) if v_side.row_scales else "o%d_0"|format(r) }}{{ " * scale%d"|format(r) if sinks }} * inverse{{ r }};
{% endif %}
            if (item.part_row == NO_PARTIAL) {
                store_out(out_begin(q_row{{ r }}) + e, result);
            } else {
                partials[part{{ r }} + e] = result;
            }
        }
{% for e in range(g.o_vecs - 1) %}
        o{{ r }}_{{ e }} = o{{ r }}_{{ e + 1 }};
{% endfor %}
{% endfor %}
    }
}
