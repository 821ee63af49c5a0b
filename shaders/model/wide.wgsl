{#
Rows as 64-bit words, on CPU adapters: a load or store there costs the same for 8 bytes as for 4. An element is 8 values: the low words of
its components are values 0, 2, 4, 6 and the high ones 1, 3, 5, 7.
#}
fn low(e: vec4<u64>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(e));
}

fn high(e: vec4<u64>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(e >> vec4<u32>(32u)));
}

fn join(low: vec4<f32>, high: vec4<f32>) -> vec4<u64> {
    return vec4<u64>(bitcast<vec4<u32>>(low)) | (vec4<u64>(bitcast<vec4<u32>>(high)) << vec4<u32>(32u));
}
