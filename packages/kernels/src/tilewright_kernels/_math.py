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
def tanh(x):
    """Hyperbolic tangent as 2 · sigmoid(2x) - 1, exact at both ends: e^∞ only ever divides."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def tanh_grad(x):
    """d tanh / dx = 1 - tanh²."""
    t = tanh(x)
    return 1.0 - t * t
