"""softmax over any dimension, with an optional causal mask.

    y = eᶻ / Σ eᶻ,  z = x - max(x)          dx = y · (dy - Σ y · dy)

Here are the definition and the public names; launches are in `_softmax`, kernels in
`_softmax_kernels`.
"""

import torch
from torch import Tensor

from tilewright_kernels import _softmax
from tilewright_kernels._operator import Operator

_OP = Operator("softmax")

_forward = _softmax.register(_OP, log=False)


def softmax_reference(
    input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None, causal: bool = False
) -> Tensor:
    """The definition in plain torch; arguments as `softmax`."""
    return _softmax.reference(torch.softmax, input, dim, dtype, causal)


def softmax(
    input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None, causal: bool = False
) -> Tensor:
    """eˣ along a dimension, divided by its sum.

    y = eᶻ / Σ eᶻ,  z = x - max(x)

    Args:
        input: in float16, bfloat16, float32 or float64; any shape and strides. It is copied only
            where no view [outer, N, inner] of it exists.
        dim: the dimension N that the sum runs over.
        dtype: of the result; input is cast to it first. The default is input's.
        causal: see only keys <= query in input [..., queries, keys]; dim must be the last. Aligned
            at the top left, as torch's is_causal: query 0 sees key 0, whatever the lengths, so no
            query sees nothing. Hidden keys are constants: y is 0 there, and a gradient that arrives
            there is not read.

    Returns:
        Like input, contiguous. A lane of nothing but -inf is NaN, as torch's. Differentiable once.

    Raises:
        ValueError: a dim that input does not have, or causal with another dim than the last.
        TypeError: input or dtype is not floating point.
    """
    x, dim, dtype = _softmax.checked(input, dim, dtype, causal)
    if not _OP.uses_triton(x):
        return softmax_reference(x, dim, dtype=dtype, causal=causal)
    return _forward(x, dim, dtype, causal)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` with `softmax` inside.

    Args:
        dim: as in `softmax`. torch's default, None, is deprecated there and chooses by the number
            of dimensions; here it is the last.
        causal: as in `softmax`.
    """

    causal = False

    def __init__(self, dim: int = -1, *, causal: bool = False) -> None:
        super().__init__(dim)
        self.causal = causal

    def forward(self, input: Tensor) -> Tensor:
        """Softmax of input, of the same shape."""
        return softmax(input, -1 if self.dim is None else self.dim, causal=self.causal)

    def extra_repr(self) -> str:
        """Arguments as repr shows them."""
        return f"dim={self.dim}, causal={self.causal}"
