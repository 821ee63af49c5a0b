{# Parameters of decode, prefill and merge: one dispatch of a plan. #}
struct AttendParams {
    items_offset: u32,   // first item, in words of plan
    num_items: u32,
    grid_x: u32,         // item_idx = workgroup_id.x + workgroup_id.z * grid_x
    head_offset: u32,    // num_q_heads ALiBi slopes, then num_q_heads sinks, all times log2(e), in words of plan
    qk_scale: f32,       // takes q . k to log2 units; with a soft cap to units of the cap
    softcap_log2e: f32,
    window: u32,         // newest visible keys, the query's own position included
    num_blocks: u32,     // of the pool
    reserved: vec4<u32>,
}
