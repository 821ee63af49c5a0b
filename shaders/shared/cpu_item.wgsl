{# The start of a CPU attention kernel: the work item and its rows. Returns from surplus workgroups. #}
    let item_idx = workgroup.x + workgroup.z * params.grid_x;
    if (item_idx >= params.num_items) {
        return;
    }
    let item = read_item(item_idx, TILE_Q);
    let kv_head = workgroup.y;
    let num_rows = item.query_len * GROUP_SIZE;
    let last_row = min(item.row_start + TILE_Q, num_rows) - 1u;
