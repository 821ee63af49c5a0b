{#
Where the linear kernels write. y is one matrix, or `regions`, one after another: matrices of the columns from `first_col` on, `width` wide, each
behind `num_rows * offset` elements.
#}

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
