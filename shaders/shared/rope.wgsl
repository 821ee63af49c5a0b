{#
Rotary position embedding, four pairs of elements at a time. Included by append and rope after their bindings; reads `rope_table`.

A pair that belongs together is (i, i + ROTARY_DIM / 2) or (2i, 2i + 1), counted from ROTARY_START on; pairs from ROTARY_DIM / 2 on are those that stay as they are.
#}
const ROTARY_DIM: u32 = {{ rotary_dim }}u;
const ROTARY_START: u32 = {{ rotary_start }}u;  // the first of them in a row
const ROTARY_PAIRS: u32 = ROTARY_DIM / 2u;
const OFFSETS: vec4<u32> = vec4<u32>(0u, 1u, 2u, 3u);

struct Rotation { cos: vec4<f32>, sin: vec4<f32> }
struct Pairs { first: vec4<f32>, second: vec4<f32> }

// High words of the 64-bit products a * b.
fn high_product(a: vec4<u32>, b: u32) -> vec4<u32> {
    let low_half = vec4<u32>(0xffffu);
    let half = vec4<u32>(16u);
    let b_low = b & 0xffffu;
    let b_high = b >> 16u;
    let a_low = a & low_half;
    let a_high = a >> half;
    let middle = a_high * b_low + ((a_low * b_low) >> half);
    let carry = (a_low * b_high + (middle & low_half)) >> half;
    return a_high * b_high + (middle >> half) + carry;
}

// Cosine and sine of position * frequency. The angle is exact to 2^-31 of a revolution at every position: frequencies are revolutions per position
// in 0.64 fixed point, and whole revolutions wrap away. sin and cos of WGSL would be good to 2^-11 only.
fn rotation_of(position: u32, high: vec4<u32>, low: vec4<u32>) -> Rotation {
    let revolutions = high * position + high_product(low, position);  // in 2^-32
    let quadrant = (revolutions + vec4<u32>(0x20000000u)) >> vec4<u32>(30u);
    let rest = bitcast<vec4<i32>>(revolutions - (quadrant << vec4<u32>(30u)));
    // In quarters of a revolution, -1/2 to 1/2. Both parts convert exactly, so the only rounding is that of their sum.
    let x = (vec4<f32>(rest & vec4<i32>(-256)) + vec4<f32>(rest & vec4<i32>(255))) * 9.313225746154785e-10;  // 2^-30
    let z = x * x;
    // Taylor series of sin and cos of x * pi / 2: the coefficients are (pi / 2)^n / n!. What is left out is below 2e-9 and 2e-10.
    var s = -0.0046817541 + z * 0.00016044118;
    s = 1.5707963268 + z * (-0.64596409751 + z * (0.07969262625 + z * s));
    s *= x;
    var c = 0.00091926027 + z * -0.000025202042;
    c = 1.0 + z * (-1.2337005501 + z * (0.25366950790 + z * (-0.020863480763 + z * c)));
    let is_odd = (quadrant & vec4<u32>(1u)) == vec4<u32>(1u);
    let cos_sign = ((quadrant + vec4<u32>(1u)) & vec4<u32>(2u)) == vec4<u32>(2u);
    let sin_sign = (quadrant & vec4<u32>(2u)) == vec4<u32>(2u);
    let cos_size = select(c, s, is_odd);
    let sin_size = select(s, c, is_odd);
    return Rotation(select(cos_size, -cos_size, cos_sign), select(sin_size, -sin_size, sin_sign));
}

// Rotates the pairs `pairs`, and leaves those from ROTARY_PAIRS on as they are.
fn rotate_pairs(first: vec4<f32>, second: vec4<f32>, pairs: vec4<u32>, position: u32) -> Pairs {
    let at = min(pairs, vec4<u32>(ROTARY_PAIRS - 1u));
    let a = rope_table[at.x];
    let b = rope_table[at.y];
    let c = rope_table[at.z];
    let d = rope_table[at.w];
    let rotation = rotation_of(position, vec4<u32>(a.x, b.x, c.x, d.x), vec4<u32>(a.y, b.y, c.y, d.y));
    let scale = bitcast<f32>(rope_table[ROTARY_PAIRS].x);
    let cosine = rotation.cos * scale;
    let sine = rotation.sin * scale;
    let is_rotated = pairs < vec4<u32>(ROTARY_PAIRS);
    return Pairs(
        select(first, first * cosine - second * sine, is_rotated),
        select(second, second * cosine + first * sine, is_rotated));
}
