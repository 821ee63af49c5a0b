{% set lanes = subgroup_size %}
{% set rows = tile_q // lanes %}
{% set step = x_t if x_t is defined else 2 %}
{% set row_block = x_rb if x_rb is defined else 4 %}
{% set kv_lanes = lanes %}
{% set kv_keys = step %}
{% import "shared/cpu_kv.wgsl" as kv %}
{% set k_elems = step * (head_dim // kv.k_width) %}
{% set v_elems = step * (head_dim // kv.v_width) %}
{% set k_rounds = (k_elems + lanes - 1) // lanes %}
{% set v_rounds = (v_elems + lanes - 1) // lanes %}
{% set k_vecs = kv.k_width // 4 %}
{% set v_vecs = kv.v_width // 4 %}
{% set vecs = head_dim // 4 %}
{% include "shared/cpu_bindings.wgsl" %}

{{ kv.declare() }}
const STEP = {{ step }}u;

@compute @workgroup_size({{ lanes }})
fn prefill(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let item_idx = workgroup.x + workgroup.z * params.grid_x;
    if item_idx >= params.num_items { return; }
    let item = params.items_offset + 12u * item_idx;
    let kv_head = workgroup.y;
    let query_start = plan[item];
    let query_len = plan[item + 1u];
    let context_len = plan[item + 2u];
    let row_start = plan[item + 3u];
    let table_offset = plan[item + 6u];
    let part_row = plan[item + 7u];
{% if mask %}
    let mask_offset = plan[item + 8u];
    let mask_stride = plan[item + 9u];
{% endif %}
    var kv_begin = plan[item + 4u];
    var kv_end = plan[item + 5u];
    let num_rows = query_len * GROUP_SIZE;
    let last_row = min(row_start + {{ tile_q }}u, num_rows) - 1u;
{% if causal %}
    kv_end = min(kv_end, context_len + last_row / GROUP_SIZE + 1u);
{% endif %}
{% if window %}
    let first_pos = context_len + row_start / GROUP_SIZE;
    kv_begin = max(kv_begin, first_pos + 1u - min(first_pos + 1u, params.window));
{% endif %}

{% for r in range(rows) %}
    let row{{ r }} = min(row_start + {{ r * lanes }}u + lane, last_row);
    let pos{{ r }} = context_len + row{{ r }} / GROUP_SIZE;
    let head{{ r }} = (query_start + row{{ r }} / GROUP_SIZE) * NUM_Q_HEADS + kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE;
{% for e in range(vecs) %}
    var q{{ r }}_{{ e }} = vec4<f32>();
    var o{{ r }}_{{ e }} = vec4<f32>();
{% endfor %}
    var m{{ r }} = MAX_FLOOR;
    var l{{ r }} = 0.0;
{% if alibi %}
    let slope{{ r }} = bitcast<f32>(plan[params.head_offset + kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE]);
{% endif %}
{% if mask %}
    let mask{{ r }} = mask_offset + row{{ r }} / GROUP_SIZE * mask_stride;
{% endif %}
{% endfor %}

    let head_vecs = select(HEAD_VECS, 0u, num_rows == 0u);
    for (var e = 0u; e < head_vecs; e++) {
{% for r in range(rows) %}
{% for e in range(vecs - 1) %}
        q{{ r }}_{{ e }} = q{{ r }}_{{ e + 1 }};
{% endfor %}
        q{{ r }}_{{ vecs - 1 }} = q[head{{ r }} * HEAD_VECS + e] * params.qk_scale;
{% endfor %}
    }
{% set lookups = 1 if block_size % step == 0 else step %}
    for (var base = kv_begin - kv_begin % STEP; base < kv_end; base += STEP) {
        var block_row = 0u;
        if lane < {{ lookups }}u {
            block_row = cache_row(table_offset, kv_head, clamp(base + lane, kv_begin, kv_end - 1u));
        }
{% if lookups == 1 %}
        block_row = subgroupBroadcast(block_row, 0u);
        let first_key = clamp(base, kv_begin, kv_end - 1u);
{% endif %}
{% macro load(name, type, row_elems, elems, rounds, vecs, format) %}
{% for j in range(rounds) %}
        let {{ name }}_elem{{ j }} = {% if j * lanes + lanes > elems %}min(lane + {{ j * lanes }}u, {{ elems - 1 }}u){% else %}lane + {{ j * lanes }}u{% endif %};
{% if lookups == 1 %}
        let {{ name }}_row{{ j }} = block_row + clamp(base + {{ name }}_elem{{ j }} / {{ row_elems }}u, kv_begin, kv_end - 1u) - first_key;
{% else %}
        let {{ name }}_row{{ j }} = subgroupShuffle(block_row, {{ name }}_elem{{ j }} / {{ row_elems }}u);
{% endif %}
        let {{ name }}_x{{ j }} = {{ name }}_cache[{{ name }}_row{{ j }} * {{ row_elems }}u + {{ name }}_elem{{ j }} % {{ row_elems }}u];
{% for i in range(vecs) %}
        let {{ name }}{{ j }}_{{ i }} = {{ kv.widen(format, type, name ~ "_x" ~ j, i) }};
{% endfor %}
{% endfor %}
{% endmacro %}
{{ load("k", kv.k_type, head_dim // kv.k_width, k_elems, k_rounds, k_vecs, k_format) }}
{% for r in range(rows) %}{% for t in range(step) %}
        var z{{ r }}_{{ t }} = 0.0;
{% endfor %}{% endfor %}
{% for rb in range(0, rows, row_block) %}
{% for e in range(head_dim // kv.k_width) %}{% for i in range(k_vecs) %}{% for c in "xyzw" %}
        {
{% for t in range(step) %}
{% set at = t * (head_dim // kv.k_width) + e %}
            let b{{ t }} = subgroupBroadcast(k{{ at // lanes }}_{{ i }}.{{ c }}, {{ at % lanes }}u);
{% endfor %}
{% for r in range(rb, [rb + row_block, rows] | min) %}{% for t in range(step) %}
            z{{ r }}_{{ t }} = fma(q{{ r }}_{{ e * k_vecs + i }}.{{ c }}, b{{ t }}, z{{ r }}_{{ t }});
{% endfor %}{% endfor %}
        }
{% endfor %}{% endfor %}{% endfor %}
{% endfor %}
{% for t in range(step) %}
        let key{{ t }} = base + {{ t }}u;
        let inside{{ t }} = key{{ t }} - kv_begin < kv_end - kv_begin;
{% endfor %}
{% for r in range(rows) %}
{% for t in range(step) %}
        let visible{{ r }}_{{ t }} = inside{{ t }}{% if causal %} && key{{ t }} <= pos{{ r }}{% endif %}{% if window %} && key{{ t }} + params.window > pos{{ r }}{% endif %};
        var s{{ r }}_{{ t }} = z{{ r }}_{{ t }};
{% if softcap %}
        s{{ r }}_{{ t }} = params.softcap_log2e * tanh(clamp(s{{ r }}_{{ t }}, -10.0, 10.0));
{% endif %}
{% if alibi %}
        s{{ r }}_{{ t }} += slope{{ r }} * (f32(key{{ t }}) - f32(pos{{ r }}));
{% endif %}
        s{{ r }}_{{ t }} = select(MAX_FLOOR, s{{ r }}_{{ t }}, visible{{ r }}_{{ t }});
{% endfor %}
        let m_new{{ r }} = max(m{{ r }}, {% for t in range(step) %}{% if not loop.last %}max({% endif %}s{{ r }}_{{ t }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ")" * step }};
        let c{{ r }} = exp2(m{{ r }} - m_new{{ r }});
        m{{ r }} = m_new{{ r }};
        l{{ r }} *= c{{ r }};
{% for t in range(step) %}
        let p{{ r }}_{{ t }} = select(0.0, exp2(s{{ r }}_{{ t }} - m_new{{ r }}), visible{{ r }}_{{ t }});
        l{{ r }} += p{{ r }}_{{ t }};
{% endfor %}
{% endfor %}
{{ load("v", kv.v_type, head_dim // kv.v_width, v_elems, v_rounds, v_vecs, v_format) }}
{% for rb in range(0, rows, row_block) %}
{% for e in range(head_dim // kv.v_width) %}{% for i in range(v_vecs) %}{% for c in "xyzw" %}
        {
{% for t in range(step) %}
{% set at = t * (head_dim // kv.v_width) + e %}
            let b{{ t }} = subgroupBroadcast(v{{ at // lanes }}_{{ i }}.{{ c }}, {{ at % lanes }}u);
{% endfor %}
{% for r in range(rb, [rb + row_block, rows] | min) %}
            o{{ r }}_{{ e * v_vecs + i }}.{{ c }} = {% for t in range(step) %}fma(p{{ r }}_{{ step - 1 - t }}, b{{ step - 1 - t }}, {% endfor %}o{{ r }}_{{ e * v_vecs + i }}.{{ c }} * c{{ r }}{{ ")" * step }};
{% endfor %}
        }
{% endfor %}{% endfor %}{% endfor %}
{% endfor %}
    }

    let direct = part_row == 0xffffffffu;
{% for r in range(rows) %}
    let live{{ r }} = row_start + {{ r * lanes }}u + lane <= last_row;
    let at{{ r }} = (part_row + kv_head * num_rows + row{{ r }}) * (HEAD_VECS + 1u);
    var scale{{ r }} = 1.0;
    if direct {
{% if sinks %}
        let sink = bitcast<f32>(plan[params.head_offset + NUM_Q_HEADS + kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE]);
        let m_all = max(m{{ r }}, sink);
        scale{{ r }} = exp2(m{{ r }} - m_all);
        l{{ r }} = l{{ r }} * scale{{ r }} + exp2(sink - m_all);
        m{{ r }} = m_all;
{% endif %}
        scale{{ r }} = select(scale{{ r }} / l{{ r }}, 0.0, l{{ r }} == 0.0);
{% if lse %}
        if live{{ r }} {
            var bits = 0xff800000u;
            if l{{ r }} != 0.0 { bits = bitcast<u32>((m{{ r }} + log2(l{{ r }})) * 0.6931471805599453); }
            lse[head{{ r }}] = bitcast<f32>(bits);
        }
{% endif %}
    } else if live{{ r }} {
        partials[at{{ r }} + HEAD_VECS] = vec4<f32>(m{{ r }}, l{{ r }}, 0.0, 0.0);
    }
{% endfor %}
    for (var e = 0u; e < head_vecs; e++) {
{% for r in range(rows) %}
        if live{{ r }} {
            let result = o{{ r }}_0 * scale{{ r }};
            if direct {
                out[head{{ r }} * HEAD_VECS + e] = result;
            } else {
                partials[at{{ r }} + e] = result;
            }
        }
{% for e in range(vecs - 1) %}
        o{{ r }}_{{ e }} = o{{ r }}_{{ e + 1 }};
{% endfor %}
{% endfor %}
    }
}
