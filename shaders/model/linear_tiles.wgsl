{#
Which rows of x and y a workgroup of the linear kernels computes, and of which expert. Without `experts` tile t has the `ROWS` rows from t * ROWS on.

With `experts`, y has a row for each expert that a row of x is sent to (`per_row` of them, one after another), and `routes` is what sort_routes.wgsl
makes of them: the rows of y, those of an expert side by side; the number of tiles; and of each tile the expert and where its rows begin and end
among the sorted ones. Whatever the list holds, no row is beyond the last of y.
#}
{% macro functions() %}
{% if experts %}
// The row of y at a place among the sorted ones, and the row of x that it comes from.
fn y_row(place: u32, num_rows: u32) -> u32 {
    return min(routes[min(place, num_rows - 1u)], num_rows - 1u);
}

fn x_row(place: u32, num_rows: u32) -> u32 {
    return y_row(place, num_rows) / {{ per_row }}u;
}
{% else %}
fn y_row(row: u32, num_rows: u32) -> u32 {
    return row;
}

fn x_row(row: u32, num_rows: u32) -> u32 {
    return row;
}
{% endif %}
{% endmacro %}

{# Declares `first_row` and `end_row`, and `expert`, its number within this binding of W, and where its biases begin. #}
{% macro tile() %}
{% if experts %}
    let tile = num_rows + 1u + 3u * workgroup.y;
    if (workgroup.y >= routes[num_rows]) {
        return;
    }
    let expert = routes[tile];
    if (expert < params.first_expert || expert > params.last_expert) {
        return;
    }
    let own_expert = expert - params.first_expert;
{% if bias %}
    let first_bias = expert * {{ "2u * " if gated }}params.out_features;
{% endif %}
    let first_row = routes[tile + 1u];
    let end_row = min(routes[tile + 2u], num_rows);
{% else %}
    let first_row = workgroup.y * ROWS;
    let end_row = num_rows;
{% endif %}
{% endmacro %}

{# Index of a bias. #}
{% macro bias_at() -%}
    {%- if experts -%} first_bias + {% endif -%}
{%- endmacro %}
