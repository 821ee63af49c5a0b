{# Bindings of the linear kernels for GPUs behind w, x and y, whose types differ. #}
@group(0) @binding(3) var<uniform> params: LinearParams;
{% if quantised %}
// [rows of W, row_groups] words
@group(0) @binding(4) var<storage, read> scales: array<u32>;
{% endif %}
{% if bias %}
// [{{ "gate and up, " if gated }}out_features]
@group(0) @binding({{ 5 if quantised else 4 }}) var<storage, read> bias: array<f32>;
{% endif %}
{% if norm %}
// [in_features]
@group(0) @binding({{ 4 + quantised + bias }}) var<storage, read> norm_weight: array<{{ "vec4<f32>" if aligned else "f32" }}>;
{% endif %}
{% if experts %}
// See linear_tiles.wgsl.
@group(0) @binding({{ 4 + quantised + bias + norm }}) var<storage, read> routes: array<u32>;
{% endif %}
