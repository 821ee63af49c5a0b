{# What the CPU kernels have beside shared/attend_interface.wgsl. The includer has imported `kv`. #}
{% import "shared/kv_side.wgsl" as side %}
alias KElement = {{ geometry.k_type }};
alias VElement = {{ geometry.v_type }};
{% include "shared/attend_interface.wgsl" %}

// One subgroup, the whole workgroup.
const LANES: u32 = {{ geometry.lanes }}u;
const TILE_Q: u32 = {{ tile_q }}u;
const ITER_KEYS: u32 = {{ geometry.iter_keys }}u;

fn key_row(item: WorkItem, kv_head: u32, key: u32) -> u32 {
    return cache_row(table_entry(item, key), kv_head, key);
}
{{ kv.functions() }}
{% for s, type in [(k_side, geometry.k_type), (v_side, geometry.v_type)] if s.row_scales %}
{{ side.row_scale_function(s, type) }}
{% endfor %}
{% if k_side.channel_scales %}
{{ side.channel_function(k_side, geometry.k_type, num_kv_heads) }}
{% endif %}
