{# activate: the nonlinearity `activation` ("none": identity; "softcap": of the logits of a head) of a {{ float }}, f32 or vec4<f32>. #}
{% if activation == "none" %}
fn activate(x: {{ float }}) -> {{ float }} {
    return x;
}
{% elif activation == "gelu" %}
// x * Phi(x). The smaller tail of Phi is t * exp(-x*x / 2) * P(t) with t = 1 / (1 + 0.28 |x|): P interpolates it at the 9 Chebyshev nodes of
// |x| in [0, 14], in powers of t - 1/2, to 7.4e-8 of its value.
fn activate(x: {{ float }}) -> {{ float }} {
    let a = min(abs(x), {{ float }}(14.0));  // Phi(-14) is below the smallest f32
    let t = 1.0 / (1.0 + 0.28 * a);
    let s = t - 0.5;
    var p = {{ float }}(0.02174108901);
    p = p * s + 0.008524324469;
    p = p * s - 0.06234287225;
    p = p * s - 0.04807743669;
    p = p * s + 0.1020273704;
    p = p * s + 0.2826860826;
    p = p * s + 0.3656737553;
    p = p * s + 0.3205177204;
    p = p * s + 0.2089352523;
    let tail = select(t * exp(-0.5 * a * a) * p, {{ float }}(0.0), a > {{ float }}(13.0));
    return x * select(tail, 1.0 - tail, x > {{ float }}(0.0));
}
{% elif activation == "softcap" %}
// c tanh(x / c), with c = {{ softcap }}. tanh is 1 in f32 from 10 on, where some drivers overflow in it. NaN fails both comparisons and stays.
fn activate(x: {{ float }}) -> {{ float }} {
    let cap = {{ float }}({{ softcap }});
    let inside = abs(x) <= 10.0 * cap;
    return select(select(x, sign(x) * cap, abs(x) > 10.0 * cap), cap * tanh(x / cap), inside);
}
{% elif activation == "clamped_swiglu" %}
// x * sigmoid({{ settings.alpha }} x), of x up to {{ settings.limit }}. NaN fails all comparisons and stays. exp(88) is finite, exp(89) is not.
fn activate(x: {{ float }}) -> {{ float }} {
    let limit = {{ float }}({{ settings.limit }});
    let g = select(x, limit, x > limit);
    let z = {{ settings.alpha }} * g;
    let y = g / (1.0 + exp(clamp(-z, {{ float }}(-88.0), {{ float }}(88.0))));
    return select(y, {{ float }}(0.0), z < {{ float }}(-88.0));
}

fn gate(g: {{ float }}, up: {{ float }}) -> {{ float }} {
    let limit = {{ float }}({{ settings.limit }});
    return activate(g) * (select(select(up, limit, up > limit), -limit, up < -limit) + 1.0);
}
{% elif activation == "relu" %}
fn activate(x: {{ float }}) -> {{ float }} {
    return select(x, {{ float }}(0.0), x < {{ float }}(0.0));  // keeps NaN, which max would hide
}
{% else %}
// x * sigmoid(z). exp(88) is finite, exp(89) is not.
fn x_sigmoid(x: {{ float }}, z: {{ float }}) -> {{ float }} {
    let y = x / (1.0 + exp(clamp(-z, {{ float }}(-88.0), {{ float }}(88.0))));
    return select(y, {{ float }}(0.0), z < {{ float }}(-88.0));
}

fn activate(x: {{ float }}) -> {{ float }} {
{% if activation == "gelu_tanh" %}
    // 2u, with u = sqrt(2 / pi) (x + 0.044715 x^3). From |x| = 20 on the sigmoid is 0 or 1 in f32.
    let a = clamp(x, {{ float }}(-20.0), {{ float }}(20.0));
    return x_sigmoid(x, a * (1.5957691216057308 + 0.07135481627159994 * (a * a)));
{% else %}
    return x_sigmoid(x, x);
{% endif %}
}
{% endif %}
{% if activation != "clamped_swiglu" %}

// Of a gated MLP.
fn gate(g: {{ float }}, up: {{ float }}) -> {{ float }} {
    return activate(g) * up;
}
{% endif %}
