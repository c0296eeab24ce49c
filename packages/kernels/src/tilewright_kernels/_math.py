"""Device functions that several kernels share, each beside its derivative.

Only tl arithmetic: libdevice does not run in the interpreter. All take float32 or float64 values
(kernels cast after loading) and return the same.
"""

from tilewright_kernels._triton import tl, triton


@triton.jit
def exp(x):
    """eˣ, 0 where it is below the smallest normal number, in two instructions.

    tl.exp keeps subnormal results, which takes it five: too many for a kernel that needs one a
    byte or two. exp is its own derivative.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def logistic(x):
    """The logistic distribution at x: Λ(x) = 1 / (1 + e⁻ˣ), the sigmoid, and its density λ(x).

    With e = e^(-|x|) nothing overflows, and λ = Λ · (1 - Λ) = e / (1 + e)² does not cancel.
    """
    e = exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def silu(x):
    """x · Λ(x)."""
    distribution, _ = logistic(x)
    return x * distribution


@triton.jit
def silu_grad(x):
    """d silu / dx = Λ(x) + x · λ(x)."""
    distribution, density = logistic(x)
    return distribution + x * density


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def relu_grad(x):
    """d relu / dx = 1 where x > 0, else 0. The sign of relu(x) is enough: x may be either."""
    return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def relu_squared(x):
    """relu(x)²."""
    r = relu(x)
    return r * r


@triton.jit
def relu_squared_grad(x):
    """d relu² / dx = 2 · relu(x)."""
    return 2.0 * relu(x)


@triton.jit
def normal(x):
    """The standard normal distribution at x: Φ(x) = P(X <= x), and its density φ(x).

    tl.erf takes 30 instructions, more than a copy leaves room for. For float32, with a = |x|,

        Φ(-a) = e^(-a²/2) · t · P₅(t),  t = 1 / (1 + 0.28·a)

    shares its exponential with φ. The polynomial is a minimax fit of the absolute error, 9e-9 (a
    float32 near 1 is good to 3e-8); the relative error stays below 1e-3 to Φ(-9), where 1 + erf
    has lost every digit at -6. 1 / d as the reciprocal root of d² takes two instructions, division
    eight: 1.00 of the speed of a copy against 0.91 on an H200.
    """
    if x.dtype == tl.float64:
        density = 0.3989422804014327 * exp(-0.5 * x * x)
        return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x), density
    d = 1.0 + 0.28 * tl.abs(x)
    t = tl.rsqrt(d * d)
    p = 0.38987612 - 0.10580876 * t
    p = p * t - 0.23699687
    p = p * t + 0.26891288
    p = p * t + 0.06749567
    p = p * t + 0.11652095
    e = exp(-0.5 * x * x)
    tail = p * t * e
    return tl.where(x < 0.0, tail, 1.0 - tail), 0.3989422804014327 * e


@triton.jit
def gelu(x):
    """x · Φ(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    distribution, _ = normal(x)
    return x * distribution


@triton.jit
def gelu_grad(x):
    """d gelu / dx = Φ(x) + x · φ(x)."""
    distribution, density = normal(x)
    return distribution + x * density


@triton.jit
def gelu_tanh(x):
    """x · (1 + tanh u) / 2 = x · Λ(2u), u = √(2/π) · (x + 0.044715·x³)."""
    distribution, _ = logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return x * distribution


@triton.jit
def gelu_tanh_grad(x):
    """d gelu_tanh / dx = Λ(2u) + x · λ(2u) · d2u/dx."""
    distribution, density = logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return distribution + x * density * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to two units in the last place everywhere.

    1 - 2e / (1 + e) with e = e⁻²ˣ of |x| cancels near zero, so there it is x - x · r, where r is
    from the Padé approximant [7/6], whose error is below the rounding. So whatever error division
    and exponential have, half of it or less is left.
    """
    LIMIT: tl.constexpr = tl.constexpr(0.5 if x.dtype == tl.float64 else 1.0)
    u = tl.abs(x)
    e = exp(-2.0 * u)
    v = u * u
    odd = ((27.0 * v + 2772.0) * v + 45045.0) * v
    even = ((28.0 * v + 3150.0) * v + 62370.0) * v + 135135.0
    near = u < LIMIT
    r = tl.where(near, odd, 2.0 * e) / tl.where(near, even, 1.0 + e)
    t = tl.where(near, u - u * r, 1.0 - r)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_grad(x):
    """d tanh / dx = 4e / (1 + e)², e = e⁻²ˣ of |x|: 1 - tanh² without its cancellation."""
    e = exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def log1p(x):
    """log(1 + x), to a few units in the last place; its derivative is 1 / (1 + x).

    With u = 1 + x rounded it is log(u) · x / (u - 1): the quotient log(u) / (u - 1) hardly changes
    with u, so what u has lost is lost twice and cancels (Kahan). Not fit for fast-math.
    """
    u = 1.0 + x
    log = tl.log(u)
    mended = tl.where(u == 1.0, x, log * (x / (u - 1.0)))
    return tl.where(x > 1.0, log, mended)
