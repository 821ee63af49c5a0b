// plain_copy: one buffer becomes another, what an append does at best. {{ iterations }} iterations per invocation.
@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;  // [workgroups * iterations * 2 * {{ lanes }}]
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;  // the same

@compute @workgroup_size({{ lanes }})
fn plain_copy(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var at = workgroup.x * {{ group_stride }}u + lane;
    for (var i = 0u; i < {{ iterations }}u; i++) {
        out[at] = source[at];
        out[at + {{ stride }}u] = source[at + {{ stride }}u];
        at += {{ 2 * stride }}u;
    }
}
