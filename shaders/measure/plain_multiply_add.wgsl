// plain_multiply_add: {{ count }} independent sums per invocation, in registers. {{ iterations }} iterations of {{ unroll }} multiply-adds of each.
@group(0) @binding(0) var<storage, read> factors: array<f32>;  // [2]
@group(0) @binding(1) var<storage, read_write> out: array<{{ element }}>;  // [workgroups * {{ lanes }}]

@compute @workgroup_size({{ lanes }})
fn plain_multiply_add(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let x = {{ element }}(factors[0]);
    let y = {{ element }}(factors[1]);
{% for i in range(count) %}
    var a{{ i }} = {{ element }}(f32(lane + {{ i }}u));
{% endfor %}
    for (var i = 0u; i < {{ iterations }}u; i++) {
{% for _ in range(unroll) %}
{% for i in range(count) %}
        a{{ i }} = fma(a{{ i }}, x, y);
{% endfor %}
{% endfor %}
    }
    out[workgroup.x * {{ lanes }}u + lane] = {% for i in range(count) %}{{ " + " if i }}a{{ i }}{% endfor %};
}
