{#
Attention with the lanes over head_dim and all query rows of the tile in registers. For decode the rows are the query heads of one KV
head, so that each K and V element is read once.

Per iteration every lane loads its own part of `iter_keys` K rows, once for all query rows, and gets a partial sum for each score
(row, key). Summing these across lanes also transposes them, so that lane i ends up with score i, and masks, bias and softmax
are done for all scores at once. The weights then go back to all lanes, which add up their part of the V rows.

Formats with scales never have their elements computed. With x = minimum + scale * code per row, a score is
scale * (q . code) + minimum * sum(q), and an output sum(p * scale * code) + sum(p * minimum): the lane of a score applies both scales, and sums
the last term up. Per channel, q takes the scales, and q . minimum is the same for all keys.

Where a row of codes is narrower than what all lanes can load at once, a load spans the rows of several keys (`k_span`, `v_span`), each lane
loading more of one row. Exchanges between lanes then give every lane a part of each row: a few instructions, where a load takes 26 to 62 per
lane.

What doesn't wait for anything is loaded first, so that the waits for memory overlap: scales, and V's first row, before K.

tile_q: query rows, at most 8. tile_kv: keys per iteration, a power of two of at most LANES. It is 1 without
subgroups.
Iterations per invocation: ceil((kv_end - kv_begin) / tile_kv) + 1.
Workgroup memory: none; without subgroups tile_q * (4 * LANES + 16) bytes.
#}
{% set g = geometry %}
{% import "shared/cpu_kv.wgsl" as kv %}
{% set row_scales = k_side.row_scales or v_side.row_scales %}
{% set offsets = k_side.row_scales or k_side.channel_scales %}
{# The weights that V's elements or codes are multiplied by. #}
{% set weight = "pv" if v_side.row_scales else "p" %}
{# Rows of V that the mask hides may hold NaN: 0 stands for their elements. Codes always are numbers. #}
{% set screens = mask and not v_side.row_scales %}
{# Of each side: keys whose rows a load spans; parts of a row, one per lane and round; `vec4`s of a part; type of a load; bits of an element. #}
{% set span = {"k": g.k_span, "v": g.v_span} %}
{% set loads_of = {"k": g.k_loads, "v": g.v_loads} %}
{% set vecs_of = {"k": g.k_vecs, "v": g.v_vecs} %}
{% set type_of = {"k": g.k_type, "v": g.v_type} %}
{% set bits_of = {"k": k_side.row_bytes * 8 // k_side.row_dim, "v": v_side.row_bytes * 8 // v_side.row_dim} %}
{% include "shared/cpu_bindings.wgsl" %}
{% if not subgroups %}

var<workgroup> partial_scores: array<vec4<f32>, {{ g.partial_scores_len }}>;  // [score, lane/4]
var<workgroup> weights: array<vec4<f32>, {{ g.weights_len }}>;  // [score]: weight of the key, rescaling of the row; at the end sum of the minima, two factors of the row
{% endif %}

{% macro plus(n) %}{% if n %}{{ n }}u + {% endif %}{% endmacro %}
{# Which part of a row a lane has. #}
{% macro lane_of(x) %}{{ x ~ "_lane" if span[x] > 1 else "lane" }}{% endmacro %}
{# What a lane loads of key t's row, or of the rows from key t on: declares `x`{t}_raw{j}. #}
{% macro load_raw(x, t, j) %}
{% set loads = loads_of[x] %}
{% set raw = "%s%d_raw%d"|format(x, t, j) %}
{% if span[x] > 1 %}
        let {{ raw }} = {{ x }}_element(cache_row0 + clamp(base + {{ plus(t) }}{{ x }}_key, item.kv_begin, item.kv_end - 1u) - key0, {{ x }}_part);
{% elif (j + 1) * g.lanes > loads %}
        var {{ raw }} = {{ type_of[x] }}();
        if (lane < {{ loads - j * g.lanes }}u) {
            {{ raw }} = {{ x }}_element(cache_row{{ t }}, {{ plus(j * g.lanes) }}lane);
        }
{% else %}
        let {{ raw }} = {{ x }}_element(cache_row{{ t }}, {{ plus(j * g.lanes) }}lane);
{% endif %}
{% endmacro %}
{# Hands out a load that spans the rows of keys t, t + 1, ...: declares `x`{t}_raw0_{word}, this lane's words of each row. #}
{% macro spread(x, t) %}
{% set words = vecs_of[x] * bits_of[x] // 8 %}
{% set n = namespace(at="%s%d_loaded"|format(x, t)) %}
{% for c in range(span[x]) %}{% for m in range(words) %}
        let {{ n.at }}{{ c }}_{{ m }} = {{ kv.word_of(type_of[x], "%s%d_raw0"|format(x, t), c * words + m) }};
{% endfor %}{% endfor %}
{% for bit in [1, 2, 4] if bit < span[x] %}
{% set w = g.lanes // span[x] * bit %}
{% set last = 2 * bit == span[x] %}
{% for c in range(span[x]) if c // bit % 2 == 0 %}{% for m in range(words) %}
{% set a = "%s%d_%d"|format(n.at, c, m) %}
{% set b = "%s%d_%d"|format(n.at, c + bit, m) %}
{% set to_a = "%s%d_raw0_%d"|format(x, t + c, m) if last else "%s%d_over%d_%d_%d"|format(x, t, bit, c, m) %}
{% set to_b = "%s%d_raw0_%d"|format(x, t + c + bit, m) if last else "%s%d_over%d_%d_%d"|format(x, t, bit, c + bit, m) %}
        let {{ a }}_other = subgroupShuffleXor(select({{ b }}, {{ a }}, swap{{ w }}), {{ w }}u);
        let {{ to_a }} = select({{ a }}, {{ a }}_other, swap{{ w }});
        let {{ to_b }} = select({{ a }}_other, {{ b }}, swap{{ w }});
{% endfor %}{% endfor %}
{% set n.at = "%s%d_over%d_"|format(x, t, bit) %}
{% endfor %}
{% endmacro %}
{# A lane's part of key t's row: declares the variables `to`, one vec4<f32> per i. #}
{% macro widen_part(to, x, t, j, format, seen="") %}
{% for i in range(vecs_of[x]) %}
{% set value = kv.widen(format, "words" if span[x] > 1 else type_of[x], "%s%d_raw%d"|format(x, t, j), i) %}
            let {{ to }}_{{ i }} = {{ "select(vec4<f32>(), %s, %s)"|format(value, seen) if seen else value }};
{% endfor %}
{% endmacro %}
{# The value that the lane of score n holds in the per-score variable `name`, for all lanes. #}
{% macro from_score(name, n) -%}
    subgroupBroadcast({{ name }}{{ n // g.lanes }}, {{ n % g.lanes }}u)
{%- endmacro %}
{# Index of the vec4 of q or out that belongs to a lane's part j, i of a row of K or V. #}
{% macro vec_idx(x, j, i) -%}
    {% if (j + 1) * g.lanes > loads_of[x] %}min({{ plus(j * g.lanes) }}lane, {{ loads_of[x] - 1 }}u){% elif j %}({{ j * g.lanes }}u + lane){% else %}{{ lane_of(x) }}{% endif %} * {{ vecs_of[x] }}u{% if i %} + {{ i }}u{% endif %}
{%- endmacro %}
{# Sums the partial scores z0, z1, ... of all lanes: lane i gets score v * LANES + i in the variable `result`{v}. #}
{% macro sum_scores(result) %}
{% for v in range(g.vectors) %}
{% if subgroups %}
        // Sum and transpose: each exchange halves the number of partial sums and doubles the lanes that they cover.
{% set n = namespace(count=[g.scores - v * g.lanes, g.lanes] | min, at="z", first=v * g.lanes) %}
{% for w in [1, 2, 4, 8, 16, 32, 64] if w < g.lanes %}
{% set n.to = "z" ~ v ~ "_over" ~ 2 * w ~ "_" %}
{% for i in range((n.count + 1) // 2) %}
{% set a = n.at ~ (n.first + 2 * i) %}
{% set b = n.at ~ (n.first + 2 * i + 1) if 2 * i + 1 < n.count else "0.0" %}
        let {{ n.to }}{{ i }} = select({{ a }}, {{ b }}, swap{{ w }}) + subgroupShuffleXor(select({{ b }}, {{ a }}, swap{{ w }}), {{ w }}u);
{% endfor %}
{% set n.count = (n.count + 1) // 2 %}
{% set n.at = n.to %}
{% set n.first = 0 %}
{% endfor %}
        {{ result }}{{ v }} = {{ n.at }}0;
{% else %}
{% for n in range(v * g.lanes, [g.scores, v * g.lanes + g.lanes] | min) %}
        partial_scores[{{ plus(n * g.lanes // 4) }}lane / 4u][lane % 4u] = z{{ n }};
{% endfor %}
{% endif %}
{% endfor %}
{% if not subgroups %}
        workgroupBarrier();
{% for v in range(g.vectors) %}
        var parts{{ v }} = vec4<f32>();
        if ({{ plus(v * g.lanes) }}lane < {{ g.scores }}u) {
{% for i in range(g.lanes // 4) %}
            parts{{ v }} += partial_scores[({{ plus(v * g.lanes) }}lane) * {{ g.lanes // 4 }}u + {{ i }}u];
{% endfor %}
        }
        {{ result }}{{ v }} = (parts{{ v }}.x + parts{{ v }}.y) + (parts{{ v }}.z + parts{{ v }}.w);
{% endfor %}
{% endif %}
{% endmacro %}

@compute @workgroup_size({{ g.lanes }})
fn decode(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
{% include "shared/cpu_item.wgsl" %}

{% for x in ["k", "v"] if span[x] > 1 %}
    // Which key and part of its row this lane loads of {{ x|upper }}, and which part of all rows it has after the exchanges.
    let {{ x }}_key = lane / {{ g.lanes // span[x] }}u;
    let {{ x }}_part = lane % {{ g.lanes // span[x] }}u;
    let {{ x }}_lane = {{ x }}_part * {{ span[x] }}u + {{ x }}_key;
{% endfor %}
    // Each lane's part of the query rows. Lanes beyond the row multiply zeros, rows beyond the tile repeat its last one.
{% for r in range(g.rows) %}
    let row{{ r }} = min({{ plus(r) }}item.row_start, last_row);
    let q_row{{ r }} = (item.query_start + row{{ r }} / GROUP_SIZE) * NUM_Q_HEADS + kv_head * GROUP_SIZE + row{{ r }} % GROUP_SIZE;
{% for j in range(g.k_rounds) %}{% for i in range(g.k_vecs) %}
    {{ "var" if k_side.channel_scales else "let" }} q{{ r }}_{{ j }}_{{ i }} = load_q(q_begin(q_row{{ r }}) + {{ vec_idx("k", j, i) }}) * params.qk_scale;
{% endfor %}{% endfor %}
{% for j in range(g.v_rounds) %}{% for i in range(g.v_vecs) %}
    var sum{{ r }}_{{ j }}_{{ i }} = vec4<f32>();
{% endfor %}{% endfor %}
{% endfor %}

    // What a lane needs to know about its scores: lane i of vector v has score v * LANES + i = row * ITER_KEYS + key.
{% if g.iter_keys > 1 %}
    let score_key = lane % ITER_KEYS;
{% else %}
    let score_key = 0u;
{% endif %}
{% for v in range(g.vectors) %}
    let score_row{{ v }} = min(item.row_start + ({{ plus(v * g.lanes) }}lane) / ITER_KEYS, last_row);
    let score_pos{{ v }} = item.context_len + score_row{{ v }} / GROUP_SIZE;
{% if alibi or sinks %}
    let score_head{{ v }} = kv_head * GROUP_SIZE + score_row{{ v }} % GROUP_SIZE;
{% endif %}
{% if alibi %}
    let slope{{ v }} = head_slope(score_head{{ v }});
{% endif %}
    var row_max{{ v }} = LOGIT_FLOOR;
    var row_sum{{ v }} = 0.0;
{% if v_side.row_scales %}
    var row_minimum{{ v }} = 0.0;
{% endif %}
{% endfor %}

{% if subgroups %}
{% for w in [1, 2, 4, 8, 16, 32, 64] if w < g.lanes %}
    let swap{{ w }} = (lane & {{ w }}u) != 0u;
{% endfor %}

{% endif %}
{% if offsets %}
    // What the minima add to the scores of a row: {{ "sum(q), times that of the key's row" if k_side.row_scales else "q . minimum, of the channels" }}.
{% for v in range(g.vectors) %}
    var offset{{ v }} = 0.0;
{% endfor %}
    {
{% for r in range(g.rows) %}
        var z{{ r * g.iter_keys }} = 0.0;
{% endfor %}
{% for j in range(g.k_rounds) %}
{% if (j + 1) * g.lanes > g.k_loads %}
        if (lane < {{ g.k_loads - j * g.lanes }}u) {
{% else %}
        {
{% endif %}
{% for i in range(g.k_vecs) %}
{% if k_side.channel_scales %}
            let minimum{{ i }} = k_channels(1u, kv_head, 4u * ({{ vec_idx("k", j, i) }}));
            let scale{{ i }} = k_channels(0u, kv_head, 4u * ({{ vec_idx("k", j, i) }}));
{% endif %}
{% for r in range(g.rows) %}
            z{{ r * g.iter_keys }} += dot(q{{ r }}_{{ j }}_{{ i }}, {{ "minimum" ~ i if k_side.channel_scales else "vec4<f32>(1.0)" }});
{% if k_side.channel_scales %}
            q{{ r }}_{{ j }}_{{ i }} *= scale{{ i }};
{% endif %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% for r in range(g.rows) %}{% for t in range(1, g.iter_keys) %}
        let z{{ r * g.iter_keys + t }} = z{{ r * g.iter_keys }};
{% endfor %}{% endfor %}
{{ sum_scores("offset") }}
{%- if not subgroups %}
        workgroupBarrier();
{% endif %}
    }

{% endif %}
    for (var base = item.kv_begin{% if g.iter_keys > 1 %} - item.kv_begin % ITER_KEYS{% endif %}; base < item.kv_end; base += ITER_KEYS) {
        // Cache rows of the keys. Keys outside the range are read as their nearest neighbour inside and get weight zero.
{% if not subgroups %}
        let cache_row0 = key_row(item, kv_head, base);
{% else %}
        var looked_up = 0u;
        if (lane < {{ g.lookups }}u) {
            looked_up = key_row(item, kv_head, clamp(base + lane, item.kv_begin, item.kv_end - 1u));
        }
{% for t in range(g.iter_keys) %}
{% if g.lookups == g.iter_keys %}
        let cache_row{{ t }} = subgroupBroadcast(looked_up, {{ t }}u);
{% elif t == 0 %}
        let cache_row0 = subgroupBroadcast(looked_up, 0u);
        let key0 = clamp(base, item.kv_begin, item.kv_end - 1u);
{% else %}
        let cache_row{{ t }} = cache_row0 + clamp(base + {{ t }}u, item.kv_begin, item.kv_end - 1u) - key0;
{% endif %}
{% endfor %}
{% endif %}

        let key = base + score_key;
{% if row_scales %}
        // Scale and minimum of the rows of this lane's key.
{% for x, scaled in [("k", k_side.row_scales), ("v", v_side.row_scales)] if scaled %}
{% if subgroups %}
        var loaded_{{ x }}_scale = vec2<f32>();
        if (lane < ITER_KEYS) {
            loaded_{{ x }}_scale = {{ x }}_row_scale({{ "looked_up" if g.lookups == g.iter_keys else "cache_row0 + clamp(base + lane, item.kv_begin, item.kv_end - 1u) - key0" }});
        }
        let {{ x }}_scale = subgroupShuffle(loaded_{{ x }}_scale, score_key);
{% else %}
        let {{ x }}_scale = {{ x }}_row_scale(cache_row0);
{% endif %}
{% endfor %}
{% endif %}
{{ load_raw("v", 0, 0) }}
{% for t in range(g.iter_keys) %}
{% for r in range(g.rows) %}
        var z{{ r * g.iter_keys + t }} = 0.0;
{% endfor %}
{% if g.k_span > 1 and t % g.k_span == 0 %}
{{ load_raw("k", t, 0) }}
{{- spread("k", t) }}
{% endif %}
{% for j in range(g.k_rounds) %}
        {
{% if g.k_span == 1 %}
{{ load_raw("k", t, j) }}
{% endif %}
{{- widen_part("k", "k", t, j, k_format) }}
{%- for i in range(g.k_vecs) %}{% for r in range(g.rows) %}
            z{{ r * g.iter_keys + t }} += dot(q{{ r }}_{{ j }}_{{ i }}, k_{{ i }});
{% endfor %}{% endfor %}
        }
{% endfor %}
{% endfor %}

{{ sum_scores("var s") }}
{%- for v in range(g.vectors) %}
{% if k_side.row_scales %}
        s{{ v }} = s{{ v }} * k_scale.x + k_scale.y * offset{{ v }};
{% elif k_side.channel_scales %}
        s{{ v }} += offset{{ v }};
{% endif %}
{% endfor %}
{% for v in range(g.vectors) %}
        let visible{{ v }} = is_visible(item, key, score_pos{{ v }});
{% if softcap %}
        s{{ v }} = params.softcap_log2e * tanh(clamp(s{{ v }}, -10.0, 10.0));
{% endif %}
{% if alibi %}
        s{{ v }} += slope{{ v }} * (f32(key) - f32(score_pos{{ v }}));
{% endif %}
        s{{ v }} = select(LOGIT_FLOOR, s{{ v }}, visible{{ v }});
        var max{{ v }} = max(row_max{{ v }}, s{{ v }});
{% for w in [1, 2, 4, 8, 16, 32] if w < g.iter_keys %}
        max{{ v }} = max(max{{ v }}, subgroupShuffleXor(max{{ v }}, {{ w }}u));
{% endfor %}
        let scale{{ v }} = exp2(row_max{{ v }} - max{{ v }});
        let p{{ v }} = select(0.0, exp2(s{{ v }} - max{{ v }}), visible{{ v }});
        row_max{{ v }} = max{{ v }};
        row_sum{{ v }} = row_sum{{ v }} * scale{{ v }} + p{{ v }};
{% if v_side.row_scales %}
        // (What lies in a slot that is not visible may be NaN.)
        let pv{{ v }} = select(0.0, p{{ v }} * v_scale.x, visible{{ v }});
        row_minimum{{ v }} = row_minimum{{ v }} * scale{{ v }} + select(0.0, p{{ v }} * v_scale.y, visible{{ v }});
{% endif %}
{% endfor %}
{% if subgroups %}
{% for r in range(g.rows) %}
        let scale_row{{ r }} = {{ from_score("scale", r * g.iter_keys) }};
{% for t in range(g.iter_keys) %}
        let p{{ r }}_{{ t }} = {{ from_score(weight, r * g.iter_keys + t) }};
{% endfor %}
{% endfor %}
{% else %}
{% for v in range(g.vectors) %}
        if ({{ plus(v * g.lanes) }}lane < {{ g.scores }}u) {
            weights[{{ plus(v * g.lanes) }}lane] = vec4<f32>({{ weight }}{{ v }}, scale{{ v }}, 0.0, 0.0);
        }
{% endfor %}
        workgroupBarrier();
{% for r in range(g.rows) %}
        let weight{{ r }} = weights[{{ r }}u];
        let p{{ r }}_0 = weight{{ r }}.x;
        let scale_row{{ r }} = weight{{ r }}.y;
{% endfor %}
{% endif %}

{% if screens %}
        // All rows are of one token and see the same keys.
{% if subgroups %}
        let seen0 = select(0u, 1u, visible0);
{% for t in range(g.iter_keys) %}
        let is_seen{{ t }} = {{ from_score("seen", t) }} == 1u;
{% endfor %}
{% else %}
        let is_seen0 = visible0;
{% endif %}
{% endif %}
{% for j in range(g.v_rounds) %}
        {
{% for t in range(g.iter_keys) %}
{% if t % g.v_span == 0 %}
{% if t or j %}
{{ load_raw("v", t, j) }}
{% endif %}
{{- spread("v", t) if g.v_span > 1 }}
{% endif %}
{{- widen_part("v" ~ t, "v", t, j, v_format, "is_seen" ~ t if screens else "") }}
{%- endfor %}
{% for i in range(g.v_vecs) %}{% for r in range(g.rows) %}
            sum{{ r }}_{{ j }}_{{ i }} = sum{{ r }}_{{ j }}_{{ i }} * scale_row{{ r }}{% for t in range(g.iter_keys) %} + p{{ r }}_{{ t }} * v{{ t }}_{{ i }}{% endfor %};
{% endfor %}{% endfor %}
        }
{% endfor %}
    }

    // Finish the rows: partial states go out as they are, whole rows are divided by their sums.
{% for v in range(g.vectors) %}
{% for w in [1, 2, 4, 8, 16, 32] if w < g.iter_keys %}
    row_sum{{ v }} += subgroupShuffleXor(row_sum{{ v }}, {{ w }}u);
{% if v_side.row_scales %}
    row_minimum{{ v }} += subgroupShuffleXor(row_minimum{{ v }}, {{ w }}u);
{% endif %}
{% endfor %}
    let owner{{ v }} = score_key == 0u && item.row_start + ({{ plus(v * g.lanes) }}lane) / ITER_KEYS <= last_row{% if g.scores % g.lanes and loop.last %} && {{ plus(v * g.lanes) }}lane < {{ g.scores }}u{% endif %};
    var scale{{ v }} = 1.0;
    var inverse{{ v }} = 1.0;
    if (item.part_row == NO_PARTIAL) {
{% if sinks %}
        let joined = with_sink(row_max{{ v }}, row_sum{{ v }}, head_sink(score_head{{ v }}));
        row_max{{ v }} = joined.x;
        row_sum{{ v }} = joined.y;
        scale{{ v }} = joined.z;
{% endif %}
        inverse{{ v }} = inverse_sum(row_sum{{ v }});
{% if lse %}
        if (owner{{ v }}) {
            lse[(item.query_start + score_row{{ v }} / GROUP_SIZE) * NUM_Q_HEADS + kv_head * GROUP_SIZE + score_row{{ v }} % GROUP_SIZE] = natural_lse(row_max{{ v }}, row_sum{{ v }});
        }
{% endif %}
    } else if (owner{{ v }}) {
        partials[(item.part_row + kv_head * num_rows + score_row{{ v }}) * (VALUE_VEC4S + 1u) + VALUE_VEC4S] = vec4<f32>(row_max{{ v }}, row_sum{{ v }}, 0.0, 0.0);
    }
{% endfor %}
{% if not subgroups %}
    workgroupBarrier();
{% for v in range(g.vectors) %}
    if ({{ plus(v * g.lanes) }}lane < {{ g.scores }}u) {
        weights[{{ plus(v * g.lanes) }}lane] = vec4<f32>({{ "row_minimum%d"|format(v) if v_side.row_scales else "0.0" }}, scale{{ v }}, inverse{{ v }}, 0.0);
    }
{% endfor %}
    workgroupBarrier();
{% endif %}
{% for r in range(g.rows) %}
    {
{% if sinks %}
        let scale_row = {% if subgroups %}{{ from_score("scale", r * g.iter_keys) }}{% else %}weights[{{ r }}u].y{% endif %};
{% endif %}
        let inverse_row = {% if subgroups %}{{ from_score("inverse", r * g.iter_keys) }}{% else %}weights[{{ r }}u].z{% endif %};
{% if v_side.row_scales %}
        let minimum_row = {% if subgroups %}{{ from_score("row_minimum", r * g.iter_keys) }}{% else %}weights[{{ r }}u].x{% endif %};
{% endif %}
{% for j in range(g.v_rounds) %}
        if ({% if (j + 1) * g.lanes > g.v_loads %}lane < {{ g.v_loads - j * g.lanes }}u && {% endif %}{{ plus(r) }}item.row_start <= last_row) {
{% for i in range(g.v_vecs) %}
            let result{{ i }} = {{ "(sum%d_%d_%d + minimum_row)"|format(r, j, i) if v_side.row_scales else "sum%d_%d_%d"|format(r, j, i) }}{{ " * scale_row" if sinks }} * inverse_row;
{% endfor %}
            if (item.part_row == NO_PARTIAL) {
{% for i in range(g.v_vecs) %}
                store_out(out_begin(q_row{{ r }}) + {{ vec_idx("v", j, i) }}, result{{ i }});
{% endfor %}
            } else {
{% for i in range(g.v_vecs) %}
                partials[(item.part_row + kv_head * num_rows + row{{ r }}) * (VALUE_VEC4S + 1u) + {{ vec_idx("v", j, i) }}] = result{{ i }};
{% endfor %}
            }
        }
{% endfor %}
    }
{% endfor %}
}
