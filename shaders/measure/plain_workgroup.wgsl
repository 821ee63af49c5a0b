// plain_workgroup: reads workgroup memory, each invocation another element each time. {{ iterations }} iterations of 4 loads per invocation.
const ELEMENTS: u32 = {{ elements }}u;  // a power of two

@group(0) @binding(0) var<storage, read> factors: array<f32>;  // [2]
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;  // [workgroups * {{ lanes }}]

var<workgroup> shared_rows: array<vec4<f32>, ELEMENTS>;

@compute @workgroup_size({{ lanes }})
fn plain_workgroup(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    for (var i = lane; i < ELEMENTS; i += {{ lanes }}u) {
        shared_rows[i] = vec4<f32>(factors[i % 2u]);
    }
    workgroupBarrier();
    var a: vec4<f32>;
    var b: vec4<f32>;
    var c: vec4<f32>;
    var d: vec4<f32>;
    var at = lane;
    for (var i = 0u; i < {{ iterations }}u; i++) {
        a += shared_rows[at % ELEMENTS];
        b += shared_rows[(at + {{ lanes }}u) % ELEMENTS];
        c += shared_rows[(at + {{ 2 * lanes }}u) % ELEMENTS];
        d += shared_rows[(at + {{ 3 * lanes }}u) % ELEMENTS];
        at += {{ 4 * lanes }}u;
    }
    out[workgroup.x * {{ lanes }}u + lane] = (a + b) + (c + d);
}
