"""Device functions that several kernels share, each beside its derivative.

Only tl arithmetic: libdevice does not run in the interpreter. All take float32 or float64 values
(kernels cast after loading) and return the same.
"""

from tilewright_kernels._triton import tl, triton


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_grad(x):
    """d sigmoid / dx = s · (1 - s)."""
    s = sigmoid(x)
    return s * (1.0 - s)


@triton.jit
def silu(x):
    """x · sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_grad(x):
    """d silu / dx = s · (1 + x · (1 - s)), s = sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def exp(x):
    """eˣ, 0 where it is below the smallest normal number, in two instructions.

    tl.exp keeps subnormal results, which takes it five: too many for a kernel that needs one a
    byte or two. exp is its own derivative.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to a few units in the last place everywhere.

    (1 - e) / (1 + e) with e = e⁻²ˣ of |x| cancels near zero, so below 1/2 the quotient is the Padé
    approximant [7/6] instead, whose error there is below the rounding of float64.
    """
    u = tl.abs(x)
    e = exp(-2.0 * u)
    v = u * u
    odd = u * (((v + 378.0) * v + 17325.0) * v + 135135.0)
    even = ((28.0 * v + 3150.0) * v + 62370.0) * v + 135135.0
    near = u < 0.5
    t = tl.where(near, odd, 1.0 - e) / tl.where(near, even, 1.0 + e)
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
