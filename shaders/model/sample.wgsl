{#
sample: one token per row of logits. A workgroup does one row.

Logits become u32 keys in the same order, so that thresholds are found exactly: a search cuts the range of keys in five by four
probes, and counts the tokens (top-k) or adds up their mass (top-p) from each probe on. The smallest of the largest keys of many parts
of the row is a key from which on there are some hundred tokens; where the thresholds lie above it, these candidates are copied to
workgroup memory and the row isn't read again until the race. In that the kept tokens compete with Gumbel noise (Gumbel-max:
argmax of logit + noise is a draw from the softmax; Yellott 1977, Maddison et al. 2014).

GROUP lanes read next to one another and have their own range of the row: on CPU adapters a subgroup, on GPUs the workgroup.
Iterations per invocation: at most 34 * ITERS + 70 * log2(LANES) + 32, or 6 * ITERS + 29 * CANDIDATE_ITERS + the same.
Workgroup memory: 32 bytes per invocation, and the candidates.
#}
{% set quads = (vocab + 3) // 4 %}
const VOCAB: u32 = {{ vocab }}u;
const QUADS: u32 = {{ quads }}u;  // of four tokens
const LANES: u32 = {{ lanes }}u;
const GROUP: u32 = {{ group }}u;
const ITERS: u32 = {{ (quads + lanes - 1) // lanes }}u;
{% if not greedy %}
const CANDIDATES: u32 = {{ candidates }}u;  // most of them
const CANDIDATE_ITERS: u32 = {{ candidates // 4 // lanes }}u;
{% endif %}
const REQUEST_WORDS: u32 = 12u;
const NO_LOGIT: u32 = 0xff800000u;  // bits of -infinity
const ABSENT: u32 = 0x007fffffu;  // its key; those of finite logits are above
const BAD: u32 = 0x80000000u;
const MAX_F32: f32 = 3.4028234e38;

@group(0) @binding(0) var<storage, read> logits: array<{{ "vec4<u32>" if vocab % 4 == 0 else "u32" }}>;  // [rows, VOCAB], bits of f32
@group(0) @binding(1) var<storage, read> requests: array<u32>;  // [rows, REQUEST_WORDS], then sets of a bit per token
@group(0) @binding(2) var<storage, read_write> result: array<vec4<u32>>;  // [rows]: token, status, bits of the log probability, tokens kept

var<workgroup> counts: array<vec4<u32>, {{ lanes }}>;
var<workgroup> masses: array<vec4<f32>, {{ lanes }}>;
{% if not greedy %}
var<workgroup> candidates: array<u32, {{ candidates }}>;  // keys
{% endif %}

struct Request {
    row: u32,
    logprob: bool,
{% if edits %}
    allowed: u32,  // where the set of tokens is that may be drawn; 0: all
    history: u32,  // where the set of tokens is that have a penalty; 0: none
    penalty: f32,
    inverse_penalty: f32,
{% endif %}
{% if not greedy %}
    inverse_temperature: f32,
    top_k: u32,
    top_p: f32,
    log_min_p: f32,
{% endif %}
}

fn logit_bits(row: u32, quad: u32) -> vec4<u32> {
{% if vocab % 4 == 0 %}
    return select(vec4<u32>(NO_LOGIT), logits[row * QUADS + min(quad, QUADS - 1u)], quad < QUADS);
{% else %}
    let first = row * VOCAB;
    let token = quad * 4u + vec4<u32>(0u, 1u, 2u, 3u);
    let at = first + min(token, vec4<u32>(VOCAB - 1u));
    return select(vec4<u32>(NO_LOGIT), vec4<u32>(logits[at.x], logits[at.y], logits[at.z], logits[at.w]), token < vec4<u32>(VOCAB));
{% endif %}
}

{% if edits %}
// Which of four tokens are in the set whose bits start at a word of the upload.
fn in_set(start: u32, quad: u32) -> vec4<bool> {
    let word = requests[start + min(quad, QUADS - 1u) / 8u] >> (quad % 8u * 4u);
    return ((vec4<u32>(word) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u)) != vec4<u32>(0u);
}

{% endif %}
// Keys in the order of the logits, after the repetition penalty (Keskar et al. 2019), without tokens that may not be drawn.
fn to_keys(request: Request, quad: u32, logit_bits: vec4<u32>) -> vec4<u32> {
    var bits = logit_bits;
{% if edits %}
    if (request.allowed != 0u) {
        bits = select(vec4<u32>(NO_LOGIT), bits, in_set(request.allowed, quad));
    }
    if (request.history != 0u) {
        let seen = in_set(request.history, quad);
        let x = bitcast<vec4<f32>>(select(bits, vec4<u32>(0u), bits == vec4<u32>(NO_LOGIT)));
        let y = select(x * request.penalty, x * request.inverse_penalty, x > vec4<f32>(0.0));
        let finite = clamp(y, vec4<f32>(-MAX_F32), vec4<f32>(MAX_F32));
        bits = select(bits, bitcast<vec4<u32>>(finite), seen & (bits != vec4<u32>(NO_LOGIT)));
    }
{% endif %}
    bits = select(bits, vec4<u32>(0u), bits == vec4<u32>(0x80000000u));  // -0 equals 0
    return bits ^ (bitcast<vec4<u32>>(bitcast<vec4<i32>>(bits) >> vec4<u32>(31u)) | vec4<u32>(0x80000000u));
}

fn keys_of(request: Request, quad: u32) -> vec4<u32> {
    return to_keys(request, quad, logit_bits(request.row, quad));
}

// The logits of keys; the lowest finite one for absent tokens.
fn to_logits(keys: vec4<u32>) -> vec4<f32> {
    let present = max(keys, vec4<u32>(ABSENT + 1u));
    return bitcast<vec4<f32>>(select(~present, present ^ vec4<u32>(0x80000000u), present >= vec4<u32>(0x80000000u)));
}

// exp of the distance to the largest logit, 0 for absent tokens.
fn weights(keys: vec4<u32>, max_logit: f32, scale: f32) -> vec4<f32> {
    let z = max((to_logits(keys) - max_logit) * scale, vec4<f32>(-100.0));
    return select(vec4<f32>(0.0), exp(z), keys > vec4<u32>(ABSENT));
}

fn sum_counts(value: vec4<u32>, lane: u32) -> vec4<u32> {
    workgroupBarrier();
    counts[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            counts[lane] += counts[lane + half];
        }
    }
    return workgroupUniformLoad(&counts[0]);
}

fn sum_masses(value: vec4<f32>, lane: u32) -> vec4<f32> {
    workgroupBarrier();
    masses[lane] = value;
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            masses[lane] += masses[lane + half];
        }
    }
    return workgroupUniformLoad(&masses[0]);
}

// Natural logarithm of the token's probability, before temperature and filters.
fn log_probability(request: Request, token: u32, max_logit: f32, first_quad: u32, lane: u32) -> f32 {
    var mass = vec4<f32>(0.0);
    for (var i = 0u; i < ITERS; i++) {
        mass += weights(keys_of(request, first_quad + i * GROUP), max_logit, 1.0);
    }
    let total = sum_masses(mass, lane);
    let logit = to_logits(keys_of(request, token / 4u))[token % 4u];
    return (logit - max_logit) - log((total.x + total.y) + (total.z + total.w));
}

{% if not greedy %}
// Keys of a lane's part of the candidates, or if there are none of the row.
fn source_keys(request: Request, num_candidates: u32, i: u32, first_quad: u32, lane: u32) -> vec4<u32> {
    var keys = vec4<u32>(ABSENT);
    if (num_candidates == 0u) {
        keys = keys_of(request, first_quad + i * GROUP);
    } else {
        let at = i * LANES + lane + vec4<u32>(0u, CANDIDATES / 4u, CANDIDATES / 2u, CANDIDATES / 4u * 3u);
        let found = vec4<u32>(candidates[at.x], candidates[at.y], candidates[at.z], candidates[at.w]);
        keys = select(keys, found, at < vec4<u32>(num_candidates));
    }
    return keys;
}

// The tokens from a key on.
struct Tail {
    key: u32,
    count: u32,
}

// How many lanes' values come before this lane's.
fn sum_before(value: u32, lane: u32) -> u32 {
    workgroupBarrier();
    counts[lane].x = value;
    for (var offset = 1u; offset < LANES; offset *= 2u) {
        workgroupBarrier();
        var sum = counts[lane].x;
        if (lane >= offset) {
            sum += counts[lane - offset].x;
        }
        workgroupBarrier();
        counts[lane].x = sum;
    }
    return counts[lane].x - value;
}

// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
fn multiply_high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let mid_a = (a & 0xffffu) * (b >> 16u);
    let mid_b = (a >> 16u) * (b & 0xffffu);
    let carry = ((low >> 16u) + (mid_a & 0xffffu) + (mid_b & 0xffffu)) >> 16u;
    return (a >> 16u) * (b >> 16u) + (mid_a >> 16u) + (mid_b >> 16u) + carry;
}

fn philox_round(c: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    let high0 = multiply_high(0xd2511f53u, c.x);
    let high1 = multiply_high(0xcd9e8d57u, c.z);
    return vec4<u32>(high1 ^ c.y ^ key.x, 0xcd9e8d57u * c.z, high0 ^ c.w ^ key.y, 0xd2511f53u * c.x);
}

fn philox(counter: vec4<u32>, seed: vec2<u32>) -> vec4<u32> {
    let step = vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    var key = seed;
    var c = philox_round(counter, key);
{% for round in range(9) %}
    key += step;
    c = philox_round(c, key);
{% endfor %}
    return c;
}

// -log(-log(1 - v)) for v = (bits + 1/2) / 2^32. v and 1 - v are both computed from the bits, so that neither tail loses precision.
fn gumbel(bits: vec4<u32>) -> vec4<f32> {
    let v = (vec4<f32>(bits) + 0.5) * 2.3283064365386963e-10;
    let w = (vec4<f32>(~bits) + 0.5) * 2.3283064365386963e-10;
    let series = v * (1.0 + v * (0.5 + v * (0.3333333333 + v * 0.25)));
    return -log(select(-log(w), series, v < vec4<f32>(0.03125)));
}
{% endif %}

{# Opens a block for the few quads that need it. CPU adapters skip the body of a loop, but not that of an `if`. #}
{% macro rarely(condition) -%}
{% if profile_cpu %}
            for (var once = 0u; once < select(0u, 1u, {{ condition }}); once++) {
{%- else %}
            if ({{ condition }}) {
{%- endif %}
{% endmacro %}
@compute @workgroup_size(LANES)
fn sample(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let words = row * REQUEST_WORDS;
    let flags = requests[words];
    var request: Request;
    request.row = row;
    request.logprob = (flags & 2u) != 0u;
{% if edits %}
    request.allowed = requests[words + 11u];
    request.history = requests[words + 10u];
    request.penalty = bitcast<f32>(requests[words + 5u]);
    request.inverse_penalty = bitcast<f32>(requests[words + 6u]);
{% endif %}
{% if not greedy %}
    request.inverse_temperature = bitcast<f32>(requests[words + 1u]);
    request.top_k = requests[words + 2u];
    request.top_p = bitcast<f32>(requests[words + 3u]);
    request.log_min_p = bitcast<f32>(requests[words + 4u]);
{% endif %}
    let first_quad = lane / GROUP * (ITERS * GROUP) + lane % GROUP;

    // The largest key and its lowest token, whether there is NaN or +infinity, and how many logits are finite.
    var best_keys = vec4<u32>(0u);
    var best_quads = vec4<u32>(0u);
    var bad = vec4<bool>(false);
    var num_finite = vec4<u32>(0u);
    for (var i = 0u; i < ITERS; i++) {
        let quad = first_quad + i * GROUP;
        let bits = logit_bits(row, quad);
        bad = bad | (((bits & vec4<u32>(0x7fffffffu)) >= vec4<u32>(0x7f800000u)) & (bits != vec4<u32>(NO_LOGIT)));
        let keys = to_keys(request, quad, bits);
        let better = keys > best_keys;
        best_keys = select(best_keys, keys, better);
        best_quads = select(best_quads, vec4<u32>(quad), better);
        num_finite += select(vec4<u32>(0u), vec4<u32>(1u), keys > vec4<u32>(ABSENT));
    }
    let tokens = best_quads * 4u + vec4<u32>(0u, 1u, 2u, 3u);
    var best_key = max(max(best_keys.x, best_keys.y), max(best_keys.z, best_keys.w));
    let best_tokens = select(vec4<u32>(0xffffffffu), tokens, best_keys == vec4<u32>(best_key));
    var token = min(min(best_tokens.x, best_tokens.y), min(best_tokens.z, best_tokens.w));
    let lane_count = (num_finite.x + num_finite.y) + (num_finite.z + num_finite.w);
{# 128 parts of the row, if there are as many: the candidates are then some 128 ln(128) = 620 tokens. #}
{% if lanes >= 128 %}
    let part_key = best_key;
{% elif lanes == 64 %}
    let part_key = min(max(best_keys.x, best_keys.y), max(best_keys.z, best_keys.w));
{% else %}
    let part_key = min(min(best_keys.x, best_keys.y), min(best_keys.z, best_keys.w));
{% endif %}
    counts[lane] = vec4<u32>(best_key, token, part_key, lane_count | select(0u, BAD, any(bad)));
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            let a = counts[lane];
            let b = counts[lane + half];
            let take_b = b.x > a.x || (b.x == a.x && b.y < a.y);
            counts[lane] = vec4<u32>(select(a.xy, b.xy, take_b), {{ 'select(min(a.z, b.z), max(a.z, b.z), half == 128u)' if lanes == 256 else 'min(a.z, b.z)' }}, ((a.w + b.w) & ~BAD) | ((a.w | b.w) & BAD));
        }
    }
    let top = workgroupUniformLoad(&counts[0]);
    best_key = top.x;
    token = top.y;
    if (top.w >= BAD || best_key <= ABSENT) {
        if (lane == 0u) {
            result[row] = vec4<u32>(0xffffffffu, 2u, 0u, 0u);
        }
        return;
    }
    let max_logit = to_logits(vec4<u32>(best_key)).x;
    var num_kept = 1u;
{% if not greedy %}
    if ((flags & 1u) == 0u) {
        let num_all = top.w;
        let has_top_k = request.top_k < num_all;
        let has_top_p = request.top_p < 1.0;
        var low = Tail(ABSENT + 1u, num_all);  // tokens from this key on are kept
        if (has_top_k || has_top_p) {
            // What is searched: the row, or candidates.
            var num_searched = 0u;
            var iters = ITERS;
            var high = Tail(best_key + 1u, 0u);

            // Are the thresholds among the candidates, and do these fit?
            let candidate_key = max(top.z, ABSENT + 1u);
            var lane_n = vec4<u32>(0u);
            var all_mass = vec4<f32>(0.0);
            var mass = vec4<f32>(0.0);
            for (var i = 0u; i < ITERS; i++) {
                let keys = keys_of(request, first_quad + i * GROUP);
                let w = weights(keys, max_logit, request.inverse_temperature);
                let above = keys >= vec4<u32>(candidate_key);
                lane_n += select(vec4<u32>(0u), vec4<u32>(1u), above);
                mass += select(vec4<f32>(0.0), w, above);
                all_mass += w;
            }
            let lane_candidates = (lane_n.x + lane_n.y) + (lane_n.z + lane_n.w);
            let num_candidates = sum_counts(vec4<u32>(lane_candidates, 0u, 0u, 0u), lane).x;
            let lane_mass = (mass.x + mass.y) + (mass.z + mass.w);
            let lane_all = (all_mass.x + all_mass.y) + (all_mass.z + all_mass.w);
            let masses_now = sum_masses(vec4<f32>(lane_mass, lane_all, 0.0, 0.0), lane);
            let within = select(masses_now.x >= request.top_p * masses_now.y, num_candidates >= request.top_k, has_top_k);
            if (within) {
                low = Tail(candidate_key, num_candidates);
            } else {
                high = Tail(candidate_key, num_candidates);
            }
            if (within && num_candidates <= CANDIDATES) {
                var at = sum_before(lane_candidates, lane);
                for (var i = 0u; i < ITERS; i++) {
                    let keys = keys_of(request, first_quad + i * GROUP);
                    let above = keys >= vec4<u32>(candidate_key);
{{ rarely("any(above)") }}
{% for c in "xyzw" %}
                        if (above.{{ c }}) {
                            candidates[min(at, CANDIDATES - 1u)] = keys.{{ c }};
                            at += 1u;
                        }
{% endfor %}
                    }
                }
                workgroupBarrier();
                num_searched = num_candidates;
                iters = CANDIDATE_ITERS;
            }

            // top-k: the largest key from which on there are at least k tokens. top-p: the largest from which on the mass is at least p of all
            // that is left. That is known of `low`, and not of `high`.
            var enough_mass = request.top_p * masses_now.y;
            for (var filter_idx = 0u; filter_idx < 2u; filter_idx++) {
                let by_mass = filter_idx == 1u;
                let wanted = select(has_top_k, has_top_p, by_mass);
                // After top-k, the first round adds up what is left.
                let first_round = select(1u, 0u, by_mass && has_top_k);
                // 5^14 > 2^32
                for (var round = first_round; round < select(0u, 15u, wanted); round++) {
                    // With as many tokens as are needed, or with one between the two, which is the one that fills up the mass, the set is known.
                    let known = select(low.count == request.top_k, low.count - high.count <= 1u, by_mass);
                    if (round > 0u && (high.key - low.key <= 1u || known)) {
                        break;
                    }
                    let step = select(0u, (high.key - low.key + 4u) / 5u, round > 0u);
                    let probes = low.key + step * vec4<u32>(1u, 2u, 3u, 4u);
                    var n = vec4<u32>(0u);
                    mass = vec4<f32>(0.0);
                    for (var i = 0u; i < iters; i++) {
                        let keys = source_keys(request, num_searched, i, first_quad, lane);
                        let w = weights(keys, max_logit, request.inverse_temperature);
{% for c in "xyzw" %}
                        let above_{{ c }} = vec4<u32>(keys.{{ c }}) >= probes;
                        n += select(vec4<u32>(0u), vec4<u32>(1u), above_{{ c }});
                        mass += select(vec4<f32>(0.0), vec4<f32>(w.{{ c }}), above_{{ c }});
{% endfor %}
                    }
                    n = sum_counts(n, lane);
                    mass = sum_masses(mass, lane);
                    if (round == 0u) {
                        enough_mass = request.top_p * mass.x;
                    } else {
                        let enough = select(n >= vec4<u32>(request.top_k), mass >= vec4<f32>(enough_mass), vec4<bool>(by_mass));
{% for c in "xyzw" %}
                        if (enough.{{ c }}) {
                            low = Tail(probes.{{ c }}, n.{{ c }});
                        } else if (probes.{{ c }} < high.key) {
                            high = Tail(probes.{{ c }}, n.{{ c }});
                        }
{% endfor %}
                    }
                }
                if (wanted) {
                    high = Tail(best_key + 1u, 0u);
                }
            }
        }

        // min-p, and the race.
        let seed = vec2<u32>(requests[words + 7u], requests[words + 8u]);
        let draw_index = requests[words + 9u];
        var best_scores = vec4<f32>(-MAX_F32);
        var kept_counts = vec4<u32>(0u);
        best_quads = vec4<u32>(0u);
        for (var i = 0u; i < ITERS; i++) {
            let quad = first_quad + i * GROUP;
            let keys = keys_of(request, quad);
            // Distances may overflow, but no further than to the bounds here.
            let distances = max(to_logits(keys) - max_logit, vec4<f32>(-MAX_F32));
            let z = max(distances * request.inverse_temperature, vec4<f32>(-1e30));
            let kept = (keys >= vec4<u32>(low.key)) & (z >= vec4<f32>(request.log_min_p));
            kept_counts += select(vec4<u32>(0u), vec4<u32>(1u), kept);
{{ rarely("any(kept)") }}
                let scores = z + gumbel(philox(vec4<u32>(quad, draw_index, 0u, 0u), seed));
                let better = kept & (scores > best_scores);
                best_scores = select(best_scores, scores, better);
                best_quads = select(best_quads, vec4<u32>(quad), better);
            }
        }
        // Of equal scores the lowest token wins.
        let kept_tokens = best_quads * 4u + vec4<u32>(0u, 1u, 2u, 3u);
        let best_score = max(max(best_scores.x, best_scores.y), max(best_scores.z, best_scores.w));
        let winners = select(vec4<u32>(0xffffffffu), kept_tokens, best_scores == vec4<f32>(best_score));
        let winner = min(min(winners.x, winners.y), min(winners.z, winners.w));
        workgroupBarrier();
        masses[lane] = vec4<f32>(best_score, 0.0, 0.0, 0.0);
        counts[lane] = vec4<u32>(winner, (kept_counts.x + kept_counts.y) + (kept_counts.z + kept_counts.w), 0u, 0u);
        for (var half = LANES / 2u; half > 0u; half /= 2u) {
            workgroupBarrier();
            if (lane < half) {
                let a = counts[lane];
                let b = counts[lane + half];
                let score_a = masses[lane].x;
                let score_b = masses[lane + half].x;
                let take_b = score_b > score_a || (score_b == score_a && b.x < a.x);
                counts[lane] = vec4<u32>(select(a.x, b.x, take_b), a.y + b.y, 0u, 0u);
                masses[lane].x = select(score_a, score_b, take_b);
            }
        }
        let drawn = workgroupUniformLoad(&counts[0]);
        token = min(drawn.x, VOCAB - 1u);
        num_kept = drawn.y;
    }
{% endif %}

    var status = 1u;
    var log_probability_bits = 0u;
    if (request.logprob) {
        status = 5u;
        log_probability_bits = bitcast<u32>(log_probability(request, token, max_logit, first_quad, lane));
    }
    if (lane == 0u) {
        result[row] = vec4<u32>(token, status, log_probability_bits, num_kept);
    }
}
