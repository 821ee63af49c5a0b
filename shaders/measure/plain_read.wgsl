// plain_read: reads two buffers from end to end, what attention does with K and V and nothing else. {{ iterations }} iterations per invocation.
@group(0) @binding(0) var<storage, read> k: array<{{ element }}>;  // [workgroups * iterations * 2 * {{ lanes }}]
@group(0) @binding(1) var<storage, read> v: array<{{ element }}>;  // the same
@group(0) @binding(2) var<storage, read_write> out: array<u32>;  // [workgroups * {{ lanes }}]

@compute @workgroup_size({{ lanes }})
fn plain_read(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    var at = workgroup.x * {{ group_stride }}u + lane;
    var a: {{ element }};
    var b: {{ element }};
    var c: {{ element }};
    var d: {{ element }};
    for (var i = 0u; i < {{ iterations }}u; i++) {
        a = a {{ op }} k[at];
        b = b {{ op }} v[at];
        c = c {{ op }} k[at + {{ stride }}u];
        d = d {{ op }} v[at + {{ stride }}u];
        at += {{ 2 * stride }}u;
    }
    let sum = (a {{ op }} b) {{ op }} (c {{ op }} d);
    out[workgroup.x * {{ lanes }}u + lane] = {{ fold }};
}
