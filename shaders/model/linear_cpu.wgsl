{#
y = activate(x W^T + bias), for CPU adapters: lane i of the workgroup's one subgroup owns column i of each of COLS blocks of LANES columns, and
ROWS rows of them.

With `norm` x is that of RMSNorm: it is multiplied by the weights as it is loaded, and the sums, which are linear in it, by 1 / sqrt(mean square + eps)
at the end, when all squares have been seen.

W is read from a texture: llvmpipe compiles a storage load to a loop over lanes with bounds checks, a texture load to straight vector code
some 5 times as fast per byte. For a few rows x comes from its storage buffer; for more it is worth a dispatch to move it to a texture first
(`staged`, linear_stage.wgsl). Either way lanes load different parts of the rows' next STEP inputs, and share them by subgroupBroadcast, which costs
next to nothing on values in registers. Without subgroups every lane loads all of x itself.

step: inputs per iteration, a multiple of a pack's. unit: f32 of x per load. row_block: rows that are summed at a time, so that some 8 sums are in
registers and the others spilled.
Iterations per invocation: ceil(in_features / step) + rows, and with scales up to ceil(in_features / 32) + ceil(in_features / 128) more.
Workgroup memory: none.
#}
{% import "model/linear_parts.wgsl" as parts %}
{% import "model/linear_outputs.wgsl" as outputs %}
{% import "model/linear_tiles.wgsl" as tiles %}
{% set per_pack = {"f32": 4, "f16": 8, "int8": 16, "int4": 32}[format] %}
{% set packs = step // per_pack %}
{% set quantised = format in ["int8", "int4"] %}
{# Each level of loops masks all sums: that costs more than loading the scales again once there are many. #}
{% set nested = quantised and rows < 8 %}
{% set row_units = step // unit %}
{% set loads = (rows * row_units + lanes - 1) // lanes %}
{# Columns of y: two blocks of W, gate and up, make one if `gated`. #}
{% set out_cols = cols // 2 if gated else cols %}
{% set x_type = {1: "f32", 4: "vec2<u64>" if int64 else "vec4<f32>", 8: "vec4<u64>"}[unit] %}
{% set xyzw = ["x", "y", "z", "w"] %}
{% include "model/linear_params.wgsl" %}

const LANES: u32 = {{ lanes }}u;
const ROWS: u32 = {{ rows }}u;
const COLS: u32 = {{ out_cols }}u;
const STEP: u32 = {{ step }}u;
// Texels of a row of the textures: 2048.
const TEXTURE_SHIFT: u32 = 11u;
const TEXTURE_MASK: u32 = 2047u;

// [blocks of LANES rows of W, row_packs, LANES] packs of packed weights
@group(0) @binding(0) var w: texture_2d<u32>;
{% if staged %}
// [rows, in_features padded to 32] as texels of 4
@group(0) @binding(1) var x: texture_2d<u32>;
{% else %}
// [rows, in_features]
@group(0) @binding(1) var<storage, read> x: array<{{ x_type }}>;
{% endif %}
// {{ outputs.shape(regions) }}
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
// [blocks of LANES rows of W, row_groups / 4, LANES] texels of 4 words
@group(0) @binding(4) var scales: texture_2d<u32>;
{% endif %}
{% if bias %}
// [{{ "gate and up, " if gated }}out_features]
@group(0) @binding({{ 5 if quantised else 4 }}) var<storage, read> bias: array<f32>;
{% endif %}
{% if norm %}
// [in_features]
@group(0) @binding({{ 4 + quantised + bias }}) var<storage, read> norm_weight: array<{{ x_type }}>;
{% endif %}
{% if experts %}
// See linear_tiles.wgsl.
@group(0) @binding({{ 4 + quantised + bias + norm }}) var<storage, read> routes: array<u32>;
{% endif %}

{% if activation != "none" %}
{% include "model/linear_activation.wgsl" %}
{% endif %}

{{ outputs.place(regions) }}

{{ tiles.functions() }}

@compute @workgroup_size({{ lanes }})
fn linear(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let num_rows = arrayLength(&y) / {{ outputs.width(y_width) }};
{{ tiles.tile() }}
    // Blocks beyond the last one repeat it and are not stored.
    let first_block = (workgroup.x + workgroup.z * grid.x) * COLS;
    let last_block = (params.last_row - params.first_row) / LANES;
{% set own = "own_expert * %s(last_block + 1u) + "|format("2u * " if gated else "") if experts else "" %}
{% for c in range(cols) %}
{% if gated %}
    let block{{ c }} = {{ own }}2u * min(first_block + {{ c // 2 }}u, last_block) + {{ c % 2 }}u;
{% else %}
    let block{{ c }} = {{ own }}min(first_block + {{ c }}u, last_block);
{% endif %}
    var texel{{ c }} = block{{ c }} * params.row_packs * LANES + lane;
{% if quantised %}
    {{ "var" if nested else "let" }} scale_texel{{ c }} = block{{ c }} * (params.row_groups / 4u) * LANES + lane;
{% endif %}
{% for r in range(rows) %}
    var acc{{ c }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
{% if staged %}
    // What this lane loads of x: texels of the rows, one row after another; rows beyond the last one repeat it.
    let row_texels = (params.in_features + 31u) / 32u * 8u;
{% if subgroups %}
{% for j in range(loads) %}
    let unit{{ j }} = min({{ j * lanes }}u + lane, {{ rows * row_units - 1 }}u);
    var x_texel{{ j }} = x_row(min(first_row + unit{{ j }} / {{ row_units }}u, end_row - 1u), num_rows) * row_texels + unit{{ j }} % {{ row_units }}u;
{% endfor %}
{% else %}
{% for r in range(rows) %}
    var x_texel{{ r }} = x_row(min(first_row + {{ r }}u, end_row - 1u), num_rows) * row_texels;
{% endfor %}
{% endif %}
{% elif subgroups %}
    // What this lane loads of x: units of the rows, one row after another; rows beyond the last one repeat it.
{% for j in range(loads) %}
    let unit{{ j }} = min({{ j * lanes }}u + lane, {{ rows * row_units - 1 }}u);
    let x_k{{ j }} = unit{{ j }} % {{ row_units }}u * {{ unit }}u;
    let x_row{{ j }} = x_row(min(first_row + unit{{ j }} / {{ row_units }}u, end_row - 1u), num_rows) * params.in_features;
{% if norm %}
    var squares{{ j }} = 0.0;
{% endif %}
{% endfor %}
{% endif %}

{% if nested %}
    // A texel has the scales of four groups.
    for (var texel_k = 0u; texel_k < params.in_features; texel_k += {{ 4 * group_size }}u) {
{% for c in range(cols) %}
    var scale_words{{ c }} = textureLoad(scales, vec2<u32>(scale_texel{{ c }} & TEXTURE_MASK, scale_texel{{ c }} >> TEXTURE_SHIFT), 0);
    scale_texel{{ c }} += LANES;
{% endfor %}
    let texel_end = min(texel_k + {{ 4 * group_size }}u, params.in_features);
    for (var group_k = texel_k; group_k < texel_end; group_k += {{ group_size }}u) {
{% for c in range(cols) %}
    let scale{{ c }} = {{ parts.scale_of("scale_words" ~ c ~ ".x") }};
    let zero{{ c }} = {{ parts.min_of("scale_words" ~ c ~ ".x") }};
    scale_words{{ c }} = scale_words{{ c }}.yzww;
{% endfor %}
{% if group_size > step %}
    let group_end = min(group_k + {{ group_size }}u, params.in_features);
    for (var k = group_k; k < group_end; k += STEP) {
{% else %}
    let k = group_k;
    {
{% endif %}
{% else %}
    for (var k = 0u; k < params.in_features; k += STEP) {
{% endif %}
{% macro value_of(x, e) -%}
    {%- if unit == 1 -%}{{ x }}
    {%- elif int64 -%}bitcast<f32>(u32({{ x }}.{{ xyzw[e // 2] }}{% if e % 2 %} >> 32u{% endif %}))
    {%- else -%}{{ x }}.{{ xyzw[e] }}
    {%- endif -%}
{%- endmacro %}
{% if staged and subgroups %}
{% for j in range(loads) %}
        let x{{ j }} = bitcast<vec4<f32>>(textureLoad(x, vec2<u32>(x_texel{{ j }} & TEXTURE_MASK, x_texel{{ j }} >> TEXTURE_SHIFT), 0));
        x_texel{{ j }} += {{ row_units }}u;
{% for e in range(4) %}
        let x{{ j }}_{{ e }} = x{{ j }}.{{ xyzw[e] }};
{% endfor %}
{% if quantised %}
        let x{{ j }}_sum = x{{ j }}.x + x{{ j }}.y + x{{ j }}.z + x{{ j }}.w;
{% endif %}
{% endfor %}
{% elif staged %}
{% for r in range(rows) %}
{% for u in range(row_units) %}
        let x{{ r }}_{{ u }} = bitcast<vec4<f32>>(textureLoad(x, vec2<u32>(x_texel{{ r }} & TEXTURE_MASK, x_texel{{ r }} >> TEXTURE_SHIFT), 0));
        x_texel{{ r }} += 1u;
{% endfor %}
{% endfor %}
{% elif subgroups %}
{% for j in range(loads) %}
        // Beyond the row's end are other rows, or nothing.
        var x{{ j }} = {{ x_type }}();
{% if norm %}
        var g{{ j }} = {{ x_type }}();
{% endif %}
        if (k + x_k{{ j }} < params.in_features) {
            x{{ j }} = x[(x_row{{ j }} + k + x_k{{ j }}){% if unit > 1 %} / {{ unit }}u{% endif %}];
{% if norm %}
            g{{ j }} = norm_weight[(k + x_k{{ j }}){% if unit > 1 %} / {{ unit }}u{% endif %}];
{% endif %}
        }
{% for e in range(unit) %}
{% if norm %}
        let raw{{ j }}_{{ e }} = {{ value_of("x" ~ j, e) }};
        let x{{ j }}_{{ e }} = raw{{ j }}_{{ e }} * {{ value_of("g" ~ j, e) }};
{% else %}
        let x{{ j }}_{{ e }} = {{ value_of("x" ~ j, e) }};
{% endif %}
{% endfor %}
{% if norm %}
        squares{{ j }} += {% for e in range(unit) %}{{ " + " if e }}raw{{ j }}_{{ e }} * raw{{ j }}_{{ e }}{% endfor %};
{% endif %}
{% if quantised %}
        let x{{ j }}_sum = {% for e in range(unit) %}{{ " + " if e }}x{{ j }}_{{ e }}{% endfor %};
{% endif %}
{% endfor %}
{% endif %}
{% for c in range(cols) %}
{% for i in range(packs) %}
{% if i %}
        let at{{ c }}_{{ i }} = texel{{ c }} + {{ i * lanes }}u;
        let w{{ c }}_{{ i }} = textureLoad(w, vec2<u32>(at{{ c }}_{{ i }} & TEXTURE_MASK, at{{ c }}_{{ i }} >> TEXTURE_SHIFT), 0);
{% else %}
        let w{{ c }}_{{ i }} = textureLoad(w, vec2<u32>(texel{{ c }} & TEXTURE_MASK, texel{{ c }} >> TEXTURE_SHIFT), 0);
{% endif %}
{% endfor %}
        texel{{ c }} += {{ packs * lanes }}u;
{% endfor %}
{% for c in range(cols) if quantised and not nested %}
        let scale_at{{ c }} = scale_texel{{ c }} + k / {{ 4 * group_size }}u * LANES;
        let scale_words{{ c }} = textureLoad(scales, vec2<u32>(scale_at{{ c }} & TEXTURE_MASK, scale_at{{ c }} >> TEXTURE_SHIFT), 0);
        let scale_word{{ c }} = scale_words{{ c }}[k / {{ group_size }}u % 4u];
        let scale{{ c }} = {{ parts.scale_of("scale_word" ~ c) }};
        let zero{{ c }} = {{ parts.min_of("scale_word" ~ c) }};
{% endfor %}
{% set sum = "part" if quantised else "acc" %}
{% for first in range(0, rows, row_block) %}
        {
{% for r in range(first, first + row_block) if quantised %}
{% for c in range(cols) %}
            var part{{ c }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
{% for e in range(step) %}
{% for r in range(first, first + row_block) %}
{% set u = r * row_units + e // unit %}
{% if subgroups %}
            let b{{ r }}_{{ e }} = subgroupBroadcast(x{{ u // lanes }}_{{ e % unit }}, {{ u % lanes }}u);
{% else %}
            let b{{ r }}_{{ e }} = x{{ r }}_{{ e // unit }}.{{ xyzw[e % unit] }};
{% endif %}
{% for c in range(cols) %}
            {{ sum }}{{ c }}_{{ r }} = fma({{ parts.widen("w" ~ c ~ "_" ~ e // per_pack, e % per_pack) }}, b{{ r }}_{{ e }}, {{ sum }}{{ c }}_{{ r }});
{% endfor %}
{% endfor %}
{% endfor %}
{% for r in range(first, first + row_block) if quantised %}
{% if quantised %}
{% if subgroups %}
            let sum{{ r }} = {% for p in range(row_units) %}{% set u = r * row_units + p %}{{ " + " if p }}subgroupBroadcast(x{{ u // lanes }}_sum, {{ u % lanes }}u){% endfor %};
{% else %}
            let sum{{ r }} = {% for e in range(step) %}{{ " + " if e }}x{{ r }}_{{ e // unit }}.{{ xyzw[e % unit] }}{% endfor %};
{% endif %}
{% endif %}
{% for c in range(cols) %}
            acc{{ c }}_{{ r }} = fma(scale{{ c }}, part{{ c }}_{{ r }}, acc{{ c }}_{{ r }});
{% if quantised %}
            acc{{ c }}_{{ r }} = fma(zero{{ c }}, sum{{ r }}, acc{{ c }}_{{ r }});
{% endif %}
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
{% if nested %}
    }
    }
{% endif %}

{% if norm %}
    // Units of a row are spread over lanes and loads; lanes beyond the last unit have repeated it.
{% for r in range(rows) %}
    let squares_of_row{{ r }} = subgroupAdd(
    {%- for j in range(loads) %}{{ " + " if j }}select(0.0, squares{{ j }}, ({{ j * lanes }}u + lane) / {{ row_units }}u == {{ r }}u){% endfor %});
    var norm{{ r }} = 1.0 / sqrt(squares_of_row{{ r }} / f32(params.in_features) + params.norm_eps);
{% endfor %}

{% endif %}
    // A store compiles to much code, so they are in a loop that shifts the rows.
    let end = min(ROWS, end_row - min(first_row, end_row));
    for (var r = 0u; r < end; r++) {
{% for o in range(out_cols) %}
        {
            let col = params.first_row + (first_block + {{ o }}u) * LANES + lane;
            if (col <= params.last_row) {
{% set c = 2 * o if gated else o %}
                var value = acc{{ c }}_0{% if norm %} * norm0{% endif %}{% if bias %} + bias[{{ tiles.bias_at() }}col]{% endif %};
{% if gated %}
                let up = acc{{ c + 1 }}_0{% if norm %} * norm0{% endif %}{% if bias %} + bias[{{ tiles.bias_at() }}params.out_features + col]{% endif %};
                value = {{ "gate(value, up)" if activation != "none" else "value * up" }};
{% elif activation != "none" %}
                value = activate(value);
{% endif %}
                let at = y_at(y_row(first_row + r, num_rows), col, num_rows);
                if (params.accumulate != 0u) {
                    value += y[at];
                }
                y[at] = value;
            }
        }
{% endfor %}
{% for r in range(rows - 1) %}
{% for c in range(cols) %}
        acc{{ c }}_{{ r }} = acc{{ c }}_{{ r + 1 }};
{% endfor %}
{% if norm %}
        norm{{ r }} = norm{{ r + 1 }};
{% endif %}
{% endfor %}
    }
}
