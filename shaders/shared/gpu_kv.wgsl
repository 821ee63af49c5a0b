{#
  Formats of the KV cache for the GPU-shaped kernels. A cache row (one token of one KV head) is read in
  elements of up to 16 bytes; every element holds whole vec4s of dims. A new format is a new branch here.
#}

{#
  An element type of `dims` dims for the cache `name`, and a function for each vec4 of dims in it:
  {name}_dims_0, {name}_dims_4.
#}
{% macro kv_element(name, format, dims) %}
{% if format == "f32" %}
alias {{ name|upper }}Element = vec4<f32>;

fn {{ name }}_dims_0(element: {{ name|upper }}Element) -> vec4<f32> {
    return element;
}
{% elif format == "f16" %}
// {{ dims }} halves, two per word, the even dim in the low half.
alias {{ name|upper }}Element = vec{{ dims // 2 }}<u32>;

fn {{ name }}_dims_0(element: {{ name|upper }}Element) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(element.x), unpack2x16float(element.y));
}
{% if dims == 8 %}

fn {{ name }}_dims_4(element: {{ name|upper }}Element) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(element.z), unpack2x16float(element.w));
}
{% endif %}
{% endif %}
{% endmacro %}
