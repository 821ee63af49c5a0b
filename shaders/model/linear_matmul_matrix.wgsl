enable f16;
enable wgpu_cooperative_matrix;
{#
y = activate(x W^T + bias) for many rows of x, on GPUs with matrix units: a workgroup computes a tile of `rows` x `cols`, a subgroup a block of it,
from slices of SLICE inputs that lie in workgroup memory as halves. Matrices of `matrix` x `matrix` sums, in f32, stay with their subgroup until the
end, when they pass through workgroup memory, some rows at a time. While a slice is in use the next one is on its way to registers. With fewer
subgroups than blocks the workgroup goes over all inputs several times; with more, some only move data.

Halves end at 65504 and lose bits below 2^-14. So a row of x is multiplied by a power of two, and so is a row of W unless it is of halves already;
sums are multiplied by the inverses. The power takes the largest element of the first slice to 2^3 .. 2^4. If an element of another slice is beyond
halves then, 2^12 times as large or more, all is done once more with the powers that follow from whole rows. What is flushed to zero is below 2^-17
of the row's largest element.

With `norm` x is that of RMSNorm: it is multiplied by the weights before it becomes halves, and the sums, which are linear in it, by
1 / sqrt(mean square + eps) at the end, when all squares have been seen. If `gated`, the tile's columns are those of gate and up of half as many
columns of y in alternation.

Iterations per invocation: n = 2 * ceil(in_features / 32) + 24 (6 instead of 2 with matrices of 8), for each time over all inputs; where halves don't
suffice n + ceil(in_features / 32) more.
Workgroup memory: what the variables below say.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% import "model/linear_outputs.wgsl" as outputs %}
{% import "model/linear_tiles.wgsl" as tiles %}
{% set out_vec_len = outputs.vec_len(gated, out_aligned) | int %}
{% set quantised = format in ["int8", "int4"] %}
{% set w_type = {"f32": "vec4<u32>", "f16": "vec4<u32>", "int8": "vec2<u32>", "int4": "u32"}[format] %}
{% set scales_w = format != "f16" %}
{% set xyzw = ["x", "y", "z", "w"] %}
{# What an invocation brings of a slice: 4 inputs of some rows of x, and 8 of some rows of W; rows apart. #}
{% set x_loads = rows * 8 // workgroup_size %}
{% set x_stride = workgroup_size // 8 %}
{% set w_loads = cols * 4 // workgroup_size %}
{% set w_stride = workgroup_size // 4 %}
{# Matrices of a block, both ways; blocks of the tile. #}
{% set mats = block // matrix %}
{% set block_cols = cols // block %}
{% set num_blocks = rows // block * block_cols %}
{% include "model/linear_params.wgsl" %}

const ROWS: u32 = {{ rows }}u;
const COLS: u32 = {{ cols }}u;
const SLICE: u32 = {{ step }}u;
const BLOCK: u32 = {{ block }}u;
const BLOCK_COLS: u32 = {{ block_cols }}u;
const NUM_BLOCKS: u32 = {{ num_blocks }}u;
alias MatrixA = coop_mat{{ matrix }}x{{ matrix }}<f16, A>;
alias MatrixB = coop_mat{{ matrix }}x{{ matrix }}<f16, B>;
alias MatrixC = coop_mat{{ matrix }}x{{ matrix }}<f32, C>;
const LARGEST_HALF: f32 = 65504.0;

// [rows of W, row_packs] packs of packed weights; 8 weights at a time
@group(0) @binding(0) var<storage, read> w: array<{{ w_type }}>;
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<f32>" if aligned else "f32" }}>;
// {{ outputs.shape(regions) }}
@group(0) @binding(2) var<storage, read_write> y: array<{{ outputs.vec_type(gated, out_aligned) }}>;
{% include "model/linear_bindings.wgsl" %}

// [ROWS, HALF_ROW] of x, then [COLS, HALF_ROW] of W
var<workgroup> halves: array<f16, {{ (rows + cols) * half_row }}>;
const HALF_ROW: u32 = {{ half_row }}u;
const W_SLICE: u32 = {{ rows * half_row }}u;
// [{{ slab }}, SUM_ROW]
var<workgroup> sums_slab: array<f32, {{ slab * sum_row }}>;
const SUM_ROW: u32 = {{ sum_row }}u;
// The bits of the largest magnitude of each row of x{{ ", then of W" if scales_w }}, as far as it is known.
var<workgroup> largest: array<atomic<u32>, {{ rows + (cols if scales_w else 0) }}>;
// [0]: whether an element was beyond halves. (Four, so that no array is off 16 bytes.)
var<workgroup> overflows: array<atomic<u32>, 4>;
{% if norm %}
// 1 / sqrt(mean square + eps) of each row
var<workgroup> row_norms: array<f32, {{ rows }}>;
{% endif %}

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{% include "model/linear_x.wgsl" %}

{{ outputs.place(regions) }}

{{ tiles.functions() }}

fn store_halves(at: u32, v: vec4<f32>) {
    let h = vec4<f16>(v);
    halves[at] = h.x;
    halves[at + 1u] = h.y;
    halves[at + 2u] = h.z;
    halves[at + 3u] = h.w;
}

fn magnitude(v: vec4<f32>) -> f32 {
    let a = abs(v);
    return max(max(a.x, a.y), max(a.z, a.w));
}

// The exponent of a row's power of two. With its bounds the power is a normal number.
fn exponent_of(largest_bits: u32) -> i32 {
    return 130 - i32(clamp(largest_bits >> 23u, 3u, 254u));
}

fn power_of_two(exponent: i32) -> f32 {
    return bitcast<f32>(u32(exponent + 127) << 23u);
}

{# The slice of W from k on, and its 4 weights from e on. #}
{% macro load_w(k, declare) %}
{% for n in range(w_loads) %}
{% if format == "f32" %}
            {{ declare }}w_lo{{ n }} = w[w_row{{ n }} + {{ k }} / 4u + load_unit * 2u];
            {{ declare }}w_hi{{ n }} = w[w_row{{ n }} + {{ k }} / 4u + load_unit * 2u + 1u];
{% else %}
            {{ declare }}w_words{{ n }} = w[w_row{{ n }} + {{ k }} / 8u + load_unit];
{% endif %}
{% if quantised %}
            {{ declare }}w_scale{{ n }} = scales[w_col{{ n }} * params.row_groups + {{ k }} / {{ group_size }}u];
{% endif %}
{% endfor %}
{% endmacro %}
{% macro four_w(n, e) -%}
    vec4<f32>({% for i in range(4) %}{{ ", " if i }}{{ parts.unit_value(n, e + i) }}{% endfor %})
    {%- if quantised %} * {{ parts.scale_of("w_scale" ~ n) }} + {{ parts.min_of("w_scale" ~ n) }}{% endif %}
{%- endmacro %}
{# Adds the products of a block's matrices over the inputs from `at` of the slice on. #}
{% macro multiply(at) %}
{% for c in range(mats) %}
                        let b_{{ c }} = coopLoad<MatrixB>(&halves[W_SLICE + (block_col + {{ c * matrix }}u) * HALF_ROW + {{ at }}], HALF_ROW);
{% endfor %}
{% for r in range(mats) %}
                        let a_{{ r }} = coopLoadT<MatrixA>(&halves[(block_row + {{ r * matrix }}u) * HALF_ROW + {{ at }}], HALF_ROW);
{% for c in range(mats) %}
                        c_{{ r }}_{{ c }} = coopMultiplyAdd(a_{{ r }}, b_{{ c }}, c_{{ r }}_{{ c }});
{% endfor %}
{% endfor %}
{% endmacro %}
@compute @workgroup_size({{ workgroup_size }})
fn linear(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
) {
    let num_rows = arrayLength(&y){% if out_aligned %} * {{ out_vec_len }}u{% endif %} / {{ outputs.width(y_width) }};
{{ tiles.tile() }}
    // Columns of the tile: rows of this binding of W.
    let first_col = (workgroup.x + workgroup.z * grid.x) * COLS;
    let last_col = {{ "2u * (params.last_row - params.first_row) + 1u" if gated else "params.last_row - params.first_row" }};

    // What this invocation brings: 4 inputs of rows of x, and 8 of rows of W. Rows beyond the last one repeat it and are not stored.
    let load_row = lane / 8u;
    let load_k = lane % 8u * 4u;
{% for n in range(x_loads) %}
    let x_row{{ n }} = x_row(min(first_row + load_row + {{ n * x_stride }}u, end_row - 1u), num_rows) * params.in_features;
{% endfor %}
    let load_col = lane / 4u;
    let load_unit = lane % 4u;
{% for n in range(w_loads) %}
    let w_col{{ n }} = {{ "own_expert * (last_col + 1u) + " if experts }}min(first_col + load_col + {{ n * w_stride }}u, last_col);
    let w_row{{ n }} = w_col{{ n }} * params.row_packs * {{ {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] // 8 or 1 }}u;
{% endfor %}

    for (var i = lane; i < {{ rows + (cols if scales_w else 0) }}u; i += {{ workgroup_size }}u) {
        atomicStore(&largest[i], 0u);
    }
    if (lane == 0u) {
        atomicStore(&overflows[0], 0u);
    }
    workgroupBarrier();

    for (var first_block = 0u; first_block < NUM_BLOCKS; first_block += num_subgroups) {
        let block = first_block + subgroup;
        let block_row = block / BLOCK_COLS * BLOCK;
        let block_col = block % BLOCK_COLS * BLOCK;
{% for r in range(mats) %}
{% for c in range(mats) %}
        var c_{{ r }}_{{ c }} = MatrixC();
{% endfor %}
{% endfor %}
{% if norm %}
{% for n in range(x_loads) %}
        var squares{{ n }} = 0.0;
{% endfor %}
{% endif %}
        // (What the first slice says is all there is to say if there is no other.)
        let attempts = select(1u, 2u, params.in_features > SLICE);
        for (var attempt = 0u; attempt < attempts; attempt++) {
            // The largest elements: of the first slice, or of all.
            let scan_end = select(params.in_features, min(SLICE, params.in_features), attempt == 0u);
{% for n in range(x_loads) %}
            var x_max{{ n }} = 0.0;
{% endfor %}
{% for n in range(w_loads) if scales_w %}
            var w_max{{ n }} = 0.0;
{% endfor %}
            for (var k = 0u; k < scan_end; k += SLICE) {
{% for n in range(x_loads) %}
                x_max{{ n }} = max(x_max{{ n }}, magnitude(x_at(x_row{{ n }}, k + load_k){{ " * norm_at(k + load_k)" if norm }}));
{% endfor %}
{% if scales_w %}
{{ load_w("k", "let ") }}
{% for n in range(w_loads) %}
                w_max{{ n }} = max(w_max{{ n }}, max(magnitude({{ four_w(n, 0) }}), magnitude({{ four_w(n, 4) }})));
{% endfor %}
{% endif %}
            }
{% for n in range(x_loads) %}
            atomicMax(&largest[load_row + {{ n * x_stride }}u], bitcast<u32>(x_max{{ n }}));
{% endfor %}
{% for n in range(w_loads) if scales_w %}
            atomicMax(&largest[ROWS + load_col + {{ n * w_stride }}u], bitcast<u32>(w_max{{ n }}));
{% endfor %}
            workgroupBarrier();
{% for n in range(x_loads) %}
            let x_factor{{ n }} = power_of_two(exponent_of(atomicLoad(&largest[load_row + {{ n * x_stride }}u])));
{% endfor %}
{% for n in range(w_loads) if scales_w %}
            let w_factor{{ n }} = power_of_two(exponent_of(atomicLoad(&largest[ROWS + load_col + {{ n * w_stride }}u])));
{% endfor %}

{% for r in range(mats) %}
{% for c in range(mats) %}
            c_{{ r }}_{{ c }} = MatrixC();
{% endfor %}
{% endfor %}
            // The largest magnitudes after scaling.
            var seen = vec4<f32>();
{% for n in range(x_loads) %}
            var x{{ n }} = x_at(x_row{{ n }}, load_k);
{% endfor %}
{{ load_w("0u", "var ") }}
{% if norm %}
            var gain = norm_at(load_k);
{% for n in range(x_loads) %}
            squares{{ n }} = 0.0;
{% endfor %}
{% endif %}
            for (var k = 0u; k < params.in_features; k += SLICE) {
{% for n in range(x_loads) %}
                {
{% if norm %}
                    squares{{ n }} += dot(x{{ n }}, x{{ n }});
{% endif %}
                    let scaled = x{{ n }}{{ " * gain" if norm }} * x_factor{{ n }};
                    seen = max(seen, abs(scaled));
                    store_halves((load_row + {{ n * x_stride }}u) * HALF_ROW + load_k, scaled);
                }
{% endfor %}
{% for n in range(w_loads) %}
{% for e in [0, 4] %}
                {
                    let four = {{ "(" if scales_w }}{{ four_w(n, e) }}{{ ") * w_factor%d"|format(n) if scales_w }};
{% if scales_w %}
                    seen = max(seen, abs(four));
{% endif %}
                    store_halves(W_SLICE + (load_col + {{ n * w_stride }}u) * HALF_ROW + load_unit * 8u + {{ e }}u, four);
                }
{% endfor %}
{% endfor %}
                workgroupBarrier();
                // Beyond the last slice the first one is loaded again, to no use.
                let next = select(0u, k + SLICE, k + SLICE < params.in_features);
{% for n in range(x_loads) %}
                x{{ n }} = x_at(x_row{{ n }}, next + load_k);
{% endfor %}
{% if norm %}
                gain = norm_at(next + load_k);
{% endif %}
{{ load_w("next", "") }}
                // Once, or never. (A loop, because naga takes the condition of an `if` for one that may differ within a subgroup.)
                for (var b = block; b < NUM_BLOCKS; b += NUM_BLOCKS) {
{% if matrix < 16 %}
                    for (var i = 0u; i < SLICE; i += {{ matrix }}u) {
{{ multiply("i") }}
                    }
{% else %}
{% for i in range(0, step, matrix) %}
                    {
{{ multiply(i ~ "u") }}
                    }
{% endfor %}
{% endif %}
                }
                workgroupBarrier();
            }
            if (any(seen > vec4<f32>(LARGEST_HALF))) {
                atomicStore(&overflows[0], 1u);
            }
            workgroupBarrier();
            if (atomicLoad(&overflows[0]) == 0u) {
                break;
            }
        }
{% if norm %}
        // Eight invocations have the squares of a row.
{% for n in range(x_loads) %}
        sums_slab[(load_row + {{ n * x_stride }}u) * 8u + lane % 8u] = squares{{ n }};
{% endfor %}
        workgroupBarrier();
        if (lane < ROWS) {
            var squares = 0.0;
            for (var i = 0u; i < 8u; i++) {
                squares += sums_slab[lane * 8u + i];
            }
            row_norms[lane] = 1.0 / sqrt(squares / f32(params.in_features) + params.norm_eps);
        }
{% endif %}

        // Sums, some rows at a time.
{% for s in range(rows // slab) %}
{% set first = s * slab % block %}
        workgroupBarrier();
        for (var b = select(NUM_BLOCKS, block, block_row == {{ s * slab // block * block }}u); b < NUM_BLOCKS; b += NUM_BLOCKS) {
{% for r in range(first // matrix, (first + slab) // matrix) %}
{% for c in range(mats) %}
            coopStoreT(c_{{ r }}_{{ c }}, &sums_slab[{{ r * matrix - first }}u * SUM_ROW + block_col + {{ c * matrix }}u], SUM_ROW);
{% endfor %}
{% endfor %}
        }
        workgroupBarrier();
        for (var i = lane; i < {{ slab * cols // 4 }}u; i += {{ workgroup_size }}u) {
            let tile_row = {{ s * slab }}u + i / (COLS / 4u);
            let tile_col = i % (COLS / 4u) * 4u;
            let row = first_row + tile_row;
            let col = first_col + tile_col;
            // Blocks that were computed this time.
            let is_done = {{ s * slab // block * block_cols }}u + tile_col / BLOCK - first_block < num_subgroups;
            if (row < end_row && col <= last_col && is_done) {
                let at_slab = i / (COLS / 4u) * SUM_ROW + tile_col;
                var sums = vec4<f32>(sums_slab[at_slab], sums_slab[at_slab + 1u], sums_slab[at_slab + 2u], sums_slab[at_slab + 3u]);
                // By halves of the exponents' sum: it may be beyond f32 where the result is not.
                var exponents = vec4<i32>(-exponent_of(atomicLoad(&largest[tile_row])));
{% if scales_w %}
                exponents -= vec4<i32>({% for c in range(4) %}{{ ", " if c }}exponent_of(atomicLoad(&largest[ROWS + tile_col + {{ c }}u])){% endfor %});
{% endif %}
                let half = exponents >> vec4<u32>(1u);
                let rest = exponents - half;
                sums *= vec4<f32>({% for c in range(4) %}{{ ", " if c }}power_of_two(half.{{ xyzw[c] }}){% endfor %});
                sums *= vec4<f32>({% for c in range(4) %}{{ ", " if c }}power_of_two(rest.{{ xyzw[c] }}){% endfor %});
{% if norm %}
                sums *= row_norms[tile_row];
{% endif %}
                let out_col = params.first_row + {{ "col / 2u" if gated else "col" }};
{% if bias %}
{{ outputs.offset(gated) }}
{% endif %}
{{ outputs.store("row", bias, gated, activation, out_aligned) }}
            }
        }
{% endfor %}
    }
}
