{# The start of a CPU attention kernel: the work item, its rows and the keys to walk over. Returns from surplus workgroups. #}
    let item_idx = workgroup.x + workgroup.z * params.grid_x;
    if item_idx >= params.num_items {
        return;
    }
    let item = params.items_offset + ITEM_WORDS * item_idx;
    let kv_head = workgroup.y;
    let query_start = plan[item];
    let query_len = plan[item + 1u];
    let context_len = plan[item + 2u];
    let row_start = plan[item + 3u];
    let table_offset = plan[item + 6u];
    let part_row = plan[item + 7u];
    let num_rows = query_len * GROUP_SIZE;
    let last_row = min(row_start + TILE_Q, num_rows) - 1u;

    // The keys that some row of this tile can see.
    var kv_begin = plan[item + 4u];
    var kv_end = plan[item + 5u];
{% if causal %}
    kv_end = min(kv_end, context_len + last_row / GROUP_SIZE + 1u);
{% endif %}
{% if window %}
    let first_pos = context_len + row_start / GROUP_SIZE;
    kv_begin = max(kv_begin, first_pos + 1u - min(first_pos + 1u, params.window));
{% endif %}
    kv_end = select(0u, kv_end, kv_begin < kv_end);  // no iteration for an empty range
