{#
Where the linear kernels write. y is one matrix, or `regions`, one after another: matrices of the columns from `first_col` on, `width` wide, each
behind `num_rows * offset` elements.
#}
{% import "model/linear_tiles.wgsl" as tiles %}

{% macro shape(regions) -%}
    {%- if regions -%} regions of [rows, width]:{% for region in regions %} {{ region.width }}{% endfor %}
    {%- else -%} [rows, out_features] {%- endif -%}
{%- endmacro %}

{# Elements of y per row of x. #}
{% macro width(y_width) -%}
    {%- if y_width -%} {{ y_width }}u {%- else -%} params.out_features {%- endif -%}
{%- endmacro %}

{% macro place(regions) %}
// The element of y in this row and column.
fn y_at(row: u32, col: u32, num_rows: u32) -> u32 {
{% if regions %}
    // (first column, width, offset)
    var region = vec3<u32>(0u, {{ regions[0].width }}u, 0u);
{% for region in regions[1:] %}
    region = select(region, vec3<u32>({{ region.first_col }}u, {{ region.width }}u, {{ region.offset }}u), col >= {{ region.first_col }}u);
{% endfor %}
    return num_rows * region.z + row * region.y + col - region.x;
{% else %}
    return row * params.out_features + col;
{% endif %}
}
{% endmacro %}

{# What the kernels for many rows store at once: of 4 columns 4 outputs, or 2 behind gates. #}
{% macro vec_len(gated, out_aligned) -%}
    {{ (2 if gated else 4) if out_aligned else 1 }}
{%- endmacro %}
{% macro vec_type(gated, out_aligned) -%}
    {{ ("vec2<f32>" if gated else "vec4<f32>") if out_aligned else "f32" }}
{%- endmacro %}

{# Declares `offset`: the biases of 4 columns, of which the first is `out_col` of y; gate and up in alternation. #}
{% macro offset(gated) %}
    let last = params.last_row;
{% if gated %}
    let up_bias = params.out_features;
    let next_col = {{ tiles.bias_at() }}min(out_col + 1u, last);
    let own_col = {{ tiles.bias_at() }}min(out_col, last);
    let offset = vec4<f32>(bias[own_col], bias[up_bias + own_col], bias[next_col], bias[up_bias + next_col]);
{% else %}
    let offset = vec4<f32>({% for i in range(4) %}{{ ", " if i }}bias[{{ tiles.bias_at() }}min(out_col + {{ i }}u, last)]{% endfor %});
{% endif %}
{% endmacro %}

{# Makes outputs from `sums`, of 4 columns from `col` of the binding on, and writes them to `out_col` of a row of y. #}
{% macro store(row, bias, gated, activation, out_aligned) %}
{% set xyzw = ["x", "y", "z", "w"] %}
{% set len = 2 if gated else 4 %}
{% if bias %}
        sums += offset;
{% endif %}
{% if gated %}
{% if activation != "none" %}
        var value = vec2<f32>(gate(sums.x, sums.y), gate(sums.z, sums.w));
{% else %}
        var value = sums.xz * sums.yw;
{% endif %}
{% elif activation != "none" %}
        var value = vec4<f32>(activate(sums.x), activate(sums.y), activate(sums.z), activate(sums.w));
{% else %}
        var value = sums;
{% endif %}
        let at = y_at(y_row({{ row }}, num_rows), out_col, num_rows);
{% if out_aligned %}
        if (params.accumulate != 0u) {
            value += y[at / {{ len }}u];
        }
        y[at / {{ len }}u] = value;
{% else %}
{% for i in range(len) %}
        if (col + {{ 2 * i if gated else i }}u <= last_col) {
            if (params.accumulate != 0u) {
                value.{{ xyzw[i] }} += y[at + {{ i }}u];
            }
            y[at + {{ i }}u] = value.{{ xyzw[i] }};
        }
{% endfor %}
{% endif %}
{% endmacro %}
