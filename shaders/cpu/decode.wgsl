{% set lanes = subgroup_size %}
{% set dim_lanes = x_l if x_l is defined else 8 %}
{% set key_lanes = lanes // dim_lanes %}
{% set unroll = x_t if x_t is defined else 2 %}
{% set step = key_lanes * unroll %}
{% set kv_lanes = dim_lanes %}
{% set kv_keys = 1 %}
{% import "shared/cpu_kv.wgsl" as kv %}
{% set k_rounds = (head_dim // kv.k_width + dim_lanes - 1) // dim_lanes %}
{% set v_rounds = (head_dim // kv.v_width + dim_lanes - 1) // dim_lanes %}
{% set k_vecs = kv.k_width // 4 %}
{% set v_vecs = kv.v_width // 4 %}
{% set k_ragged = head_dim // kv.k_width % dim_lanes != 0 %}
{% set v_ragged = head_dim // kv.v_width % dim_lanes != 0 %}
{% include "shared/cpu_bindings.wgsl" %}
{{ kv.declare() }}
const STEP = {{ step }}u;

@compute @workgroup_size({{ lanes }})
fn decode(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let item_idx = workgroup.x + workgroup.z * params.grid_x;
    if item_idx >= params.num_items { return; }
    let item = params.items_offset + 12u * item_idx;
    let kv_head = workgroup.y;
    let query_start = plan[item];
    let context_len = plan[item + 2u];
    let table_offset = plan[item + 6u];
    let part_row = plan[item + 7u];
{% if mask %}
    let mask_offset = plan[item + 8u];
{% endif %}
    var kv_begin = plan[item + 4u];
    var kv_end = plan[item + 5u];
{% if causal %}
    kv_end = min(kv_end, context_len + 1u);
{% endif %}
{% if window %}
    kv_begin = max(kv_begin, context_len + 1u - min(context_len + 1u, params.window));
{% endif %}
    let dim_lane = lane % {{ dim_lanes }}u;
    let key_lane = lane / {{ dim_lanes }}u;
    let q_row = (query_start * NUM_Q_HEADS + kv_head * GROUP_SIZE) * HEAD_VECS;

{% for j in range(k_rounds) %}
{% if k_ragged and loop.last %}
    let k_own{{ j }} = dim_lane + {{ j * dim_lanes }}u < K_ROW;
    let k_elem{{ j }} = min(dim_lane + {{ j * dim_lanes }}u, K_ROW - 1u);
    let k_on{{ j }} = select(0.0, params.qk_scale, k_own{{ j }});
{% else %}
    let k_elem{{ j }} = dim_lane + {{ j * dim_lanes }}u;
    let k_on{{ j }} = params.qk_scale;
{% endif %}
{% endfor %}
{% for j in range(v_rounds) %}
    let v_elem{{ j }} = {% if v_ragged and loop.last %}min(dim_lane + {{ j * dim_lanes }}u, V_ROW - 1u){% else %}dim_lane + {{ j * dim_lanes }}u{% endif %};
{% endfor %}
{% for h in range(group_size) %}
{% for j in range(k_rounds) %}{% for i in range(k_vecs) %}
    let q{{ h }}_{{ j }}_{{ i }} = q[q_row + {{ h }}u * HEAD_VECS + k_elem{{ j }} * {{ k_vecs }}u + {{ i }}u] * k_on{{ j }};
{% endfor %}{% endfor %}
{% for j in range(v_rounds) %}{% for i in range(v_vecs) %}
    var o{{ h }}_{{ j }}_{{ i }} = vec4<f32>();
{% endfor %}{% endfor %}
    var m{{ h }} = MAX_FLOOR;
    var l{{ h }} = 0.0;
{% if alibi %}
    let slope{{ h }} = bitcast<f32>(plan[params.head_offset + kv_head * GROUP_SIZE + {{ h }}u]);
{% endif %}
{% endfor %}
{% set chains = 4 if group_size == 1 else 2 if group_size <= 4 else 1 %}
{% if x_c is defined %}{% set chains = x_c %}{% endif %}
    for (var base = kv_begin - kv_begin % STEP; base < kv_end; base += STEP) {
{% set lookups = 1 if block_size % step == 0 else step %}
        var block_row = 0u;
        if lane < {{ lookups }}u {
            block_row = cache_row(table_offset, kv_head, clamp(base + lane, kv_begin, kv_end - 1u));
        }
{% if lookups == 1 %}
        block_row = subgroupBroadcast(block_row, 0u);
        let row_key = clamp(base, kv_begin, kv_end - 1u);
{% endif %}
{% for t in range(unroll) %}
        let pos{{ t }} = base + {{ t * key_lanes }}u + key_lane;
        let key{{ t }} = clamp(pos{{ t }}, kv_begin, kv_end - 1u);
{% if lookups == 1 %}
        let row{{ t }} = block_row + key{{ t }} - row_key;
{% else %}
        let row{{ t }} = subgroupShuffle(block_row, {{ t * key_lanes }}u + key_lane);
{% endif %}
        let visible{{ t }} = pos{{ t }} - kv_begin < kv_end - kv_begin{% if mask %} && ((plan[mask_offset + key{{ t }} / 32u] >> (key{{ t }} % 32u)) & 1u) != 0u{% endif %};
{% for h in range(group_size) %}
        var z{{ h }}_{{ t }} = {{ ["", "0.0", "vec2<f32>()", "", "vec4<f32>()"][chains] }};
{% endfor %}
{% for j in range(k_rounds) %}
        {
            let x = k_cache[row{{ t }} * K_ROW + k_elem{{ j }}];
{% for i in range(k_vecs) %}
            let y{{ i }} = {{ kv.widen(k_format, kv.k_type, "x", i) }};
{% for h in range(group_size) %}
{% if chains == 4 %}
            z{{ h }}_{{ t }} = fma(q{{ h }}_{{ j }}_{{ i }}, y{{ i }}, z{{ h }}_{{ t }});
{% elif chains == 2 %}
            z{{ h }}_{{ t }} = fma(q{{ h }}_{{ j }}_{{ i }}.zw, y{{ i }}.zw, fma(q{{ h }}_{{ j }}_{{ i }}.xy, y{{ i }}.xy, z{{ h }}_{{ t }}));
{% else %}
{% for c in "xyzw" %}
            z{{ h }}_{{ t }} = fma(q{{ h }}_{{ j }}_{{ i }}.{{ c }}, y{{ i }}.{{ c }}, z{{ h }}_{{ t }});
{% endfor %}
{% endif %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% for h in range(group_size) %}
        var s{{ h }}_{{ t }} = {% if chains == 4 %}(z{{ h }}_{{ t }}.x + z{{ h }}_{{ t }}.y) + (z{{ h }}_{{ t }}.z + z{{ h }}_{{ t }}.w){% elif chains == 2 %}z{{ h }}_{{ t }}.x + z{{ h }}_{{ t }}.y{% else %}z{{ h }}_{{ t }}{% endif %};
{% for x in [1, 2, 4, 8, 16] if x < dim_lanes %}
        s{{ h }}_{{ t }} += subgroupShuffleXor(s{{ h }}_{{ t }}, {{ x }}u);
{% endfor %}
{% if softcap %}
        s{{ h }}_{{ t }} = params.softcap_log2e * tanh(clamp(s{{ h }}_{{ t }}, -10.0, 10.0));
{% endif %}
{% if alibi %}
        s{{ h }}_{{ t }} += slope{{ h }} * (f32(key{{ t }}) - f32(context_len));
{% endif %}
        s{{ h }}_{{ t }} = select(MAX_FLOOR, s{{ h }}_{{ t }}, visible{{ t }});
{% endfor %}
{% endfor %}
{% for h in range(group_size) %}
        let m_new{{ h }} = max(m{{ h }}, {% for t in range(unroll) %}{% if not loop.last %}max({% endif %}s{{ h }}_{{ t }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ")" * unroll }};
        let c{{ h }} = exp2(m{{ h }} - m_new{{ h }});
        m{{ h }} = m_new{{ h }};
        l{{ h }} *= c{{ h }};
{% for t in range(unroll) %}
        let p{{ h }}_{{ t }} = select(0.0, exp2(s{{ h }}_{{ t }} - m_new{{ h }}), visible{{ t }});
        l{{ h }} += p{{ h }}_{{ t }};
{% endfor %}
{% endfor %}
{% for j in range(v_rounds) %}
        {
{% for t in range(unroll) %}
            let x{{ t }} = v_cache[row{{ t }} * V_ROW + v_elem{{ j }}];
{% endfor %}
{% for i in range(v_vecs) %}
{% for t in range(unroll) %}
            let y{{ i }}_{{ t }} = {{ kv.widen(v_format, kv.v_type, "x" ~ t, i) }};
{% endfor %}
{% for h in range(group_size) %}
            o{{ h }}_{{ j }}_{{ i }} = {% for t in range(unroll) %}fma(vec4<f32>(p{{ h }}_{{ unroll - 1 - t }}), y{{ i }}_{{ unroll - 1 - t }}, {% endfor %}o{{ h }}_{{ j }}_{{ i }} * c{{ h }}{{ ")" * unroll }};
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }

{% for x in [1, 2, 4, 8, 16] if x >= dim_lanes and x < lanes %}
{% for h in range(group_size) %}
    {
        let m_all = max(m{{ h }}, subgroupShuffleXor(m{{ h }}, {{ x }}u));
        let c = exp2(m{{ h }} - m_all);
        m{{ h }} = m_all;
        l{{ h }} *= c;
        l{{ h }} += subgroupShuffleXor(l{{ h }}, {{ x }}u);
{% for j in range(v_rounds) %}{% for i in range(v_vecs) %}
        o{{ h }}_{{ j }}_{{ i }} *= c;
        o{{ h }}_{{ j }}_{{ i }} += subgroupShuffleXor(o{{ h }}_{{ j }}_{{ i }}, {{ x }}u);
{% endfor %}{% endfor %}
    }
{% endfor %}
{% endfor %}
    let direct = part_row == 0xffffffffu;
    let neg_inf_bits = 0xff800000u;
{% for h in range(group_size) %}
    {
        var scale = 1.0;
        var at = (part_row + kv_head * GROUP_SIZE + {{ h }}u) * (HEAD_VECS + 1u);
        if direct {
            at = q_row + {{ h }}u * HEAD_VECS;
{% if sinks %}
            let sink = bitcast<f32>(plan[params.head_offset + NUM_Q_HEADS + kv_head * GROUP_SIZE + {{ h }}u]);
            let m_all = max(m{{ h }}, sink);
            scale = exp2(m{{ h }} - m_all);
            l{{ h }} = l{{ h }} * scale + exp2(sink - m_all);
            m{{ h }} = m_all;
{% endif %}
            scale = select(scale / l{{ h }}, 0.0, l{{ h }} == 0.0);
        }
{% for j in range(v_rounds) %}{% for i in range(v_vecs) %}
        let r{{ j }}_{{ i }} = o{{ h }}_{{ j }}_{{ i }} * scale;
{% endfor %}{% endfor %}
        if direct {
{% for j in range(v_rounds) %}{% for i in range(v_vecs) %}
            out[at + v_elem{{ j }} * {{ v_vecs }}u + {{ i }}u] = r{{ j }}_{{ i }};
{% endfor %}{% endfor %}
{% if lse %}
            var bits = 0xff800000u;
            if l{{ h }} != 0.0 { bits = bitcast<u32>((m{{ h }} + log2(l{{ h }})) * 0.6931471805599453); }
            lse[query_start * NUM_Q_HEADS + kv_head * GROUP_SIZE + {{ h }}u] = bitcast<f32>(bits);
{% endif %}
        } else {
{% for j in range(v_rounds) %}{% for i in range(v_vecs) %}
            partials[at + v_elem{{ j }} * {{ v_vecs }}u + {{ i }}u] = r{{ j }}_{{ i }};
{% endfor %}{% endfor %}
            if lane == 0u { partials[at + HEAD_VECS] = vec4<f32>(m{{ h }}, l{{ h }}, 0.0, 0.0); }
        }
    }
{% endfor %}
}
