{#
sort_routes: brings rows that go to the same expert together, and cuts them into tiles for the linear kernels (linear_tiles.wgsl). One workgroup
counts the rows of each expert, numbers their tiles, and gives each row its place. Rows of an expert come in any order, on which no result depends.

routes: the sorted rows, the number of tiles, and of each tile its expert and where its rows begin and end.

Iterations per invocation: 2 * ceil(rows / SIZE) + EXPERTS + the tiles of ceil(EXPERTS / SIZE) experts.
Workgroup memory: two numbers per expert.
#}
const EXPERTS: u32 = {{ experts }}u;
const SIZE: u32 = {{ workgroup_size }}u;

struct SortParams {
    // Rows of a tile.
    tile_rows: u32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;  // [rows], the expert of each
@group(0) @binding(1) var<storage, read_write> routes: array<u32>;
@group(0) @binding(2) var<uniform> params: SortParams;

// How many rows an expert has, and then where its next one goes.
var<workgroup> places: array<atomic<u32>, {{ experts }}>;
// Its first tile.
var<workgroup> tiles: array<u32, {{ experts }}>;

@compute @workgroup_size({{ workgroup_size }})
fn sort_routes(@builtin(local_invocation_index) lane: u32) {
    let num_rows = arrayLength(&ids);
    for (var e = lane; e < EXPERTS; e += SIZE) {
        atomicStore(&places[e], 0u);
    }
    workgroupBarrier();
    for (var row = lane; row < num_rows; row += SIZE) {
        atomicAdd(&places[min(ids[row], EXPERTS - 1u)], 1u);
    }
    workgroupBarrier();
    if (lane == 0u) {
        var place = 0u;
        var tile = 0u;
        for (var e = 0u; e < EXPERTS; e++) {
            let count = atomicLoad(&places[e]);
            atomicStore(&places[e], place);
            tiles[e] = tile;
            place += count;
            tile += (count + params.tile_rows - 1u) / params.tile_rows;
        }
        routes[num_rows] = tile;
    }
    workgroupBarrier();
    for (var e = lane; e < EXPERTS; e += SIZE) {
        let begin = atomicLoad(&places[e]);
        var end = num_rows;
        if (e + 1u < EXPERTS) {
            end = atomicLoad(&places[e + 1u]);
        }
        var at = num_rows + 1u + 3u * tiles[e];
        for (var place = begin; place < end; place += params.tile_rows) {
            routes[at] = e;
            routes[at + 1u] = place;
            routes[at + 2u] = min(place + params.tile_rows, end);
            at += 3u;
        }
    }
    workgroupBarrier();
    for (var row = lane; row < num_rows; row += SIZE) {
        routes[atomicAdd(&places[min(ids[row], EXPERTS - 1u)], 1u)] = row;
    }
}
