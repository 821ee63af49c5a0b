{% set float = "f32" %}
{% include "model/activate.wgsl" %}
