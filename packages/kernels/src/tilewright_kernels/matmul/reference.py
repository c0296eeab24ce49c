"""matmul in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright_kernels.matmul.launches import Activation, Algorithm, Precision

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def matmul_reference(
    input: Tensor,
    other: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    algorithm: Algorithm | None = None,
    precision: Precision | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `matmul`.

    The product is torch's, in the operands' dtype, and what follows in float32. algorithm and
    precision change nothing here: torch chooses the one and has a switch for the other.
    """
    out_dtype = input.dtype if out_dtype is None else out_dtype
    wide = torch.promote_types(input.dtype, torch.float32)
    if out_dtype.itemsize > input.dtype.itemsize:
        input, other = input.to(out_dtype), other.to(out_dtype)
    y = torch.matmul(input, other)
    if bias is None and activation is None and residual is None and scale == 1.0:
        return y.to(out_dtype)
    y = y.to(torch.promote_types(y.dtype, wide)) * scale
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(out_dtype)
