{% set float = "f32" %}
{% include "activate.wgsl" %}
