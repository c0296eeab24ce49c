"""Clipping by the global norm: one launch for the norm of all gradients, one for their scaling.

The arithmetic is torch.nn.utils.clip_grad_norm_'s: gradients are multiplied by
min(1, max_norm / (norm + 10⁻⁶)). `Adam` and `AdamW` do without the second launch, by max_grad_norm.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tilewright_optim._layout import lies_dense
from tilewright_optim._norm_kernel import NORM_DTYPES, OPERATOR, NormTables


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their norm, taken together, is at most max_norm.

    Nothing waits for the device, and gradients within the norm are not written. Their dtypes may
    differ. Norms other than the Euclidean are left to torch.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: the limit.
        norm_type: of the norm.
        error_if_nonfinite: raise where the norm is not finite, which waits for the device.
        foreach: torch's choice of implementation, where torch runs.

    Returns:
        The norm before, 0-d, on the device.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite is set; a gradient is sparse.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if norm_type != 2.0 or not _uses_triton(grads):
        return torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
    dense = [grad if lies_dense(grad) else grad.contiguous() for grad in grads]
    tables = _tables(grads[0].device)
    norm = tables.norm(dense)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the norm of the gradients is {norm.item()}, so they cannot be clipped; look for the "
            f"step that made it so, or give error_if_nonfinite=False"
        )
    tables.clip(dense, norm, max_norm)
    for grad, copy in zip(grads, dense, strict=True):
        if copy is not grad:
            grad.copy_(copy)
    torch.autograd.graph.increment_version(grads)
    return norm


def total_norm(grads: Sequence[Tensor], tables: NormTables | None = None) -> Tensor:
    """Euclidean norm of all elements, 0-d, on the device of the first gradient.

    Args:
        grads: at least one.
        tables: kept from call to call; None takes those of `clip_grad_norm_`.
    """
    if not _uses_triton(grads):
        return _total_norm_reference(grads)
    dense = [grad if lies_dense(grad) else grad.contiguous() for grad in grads]
    return (tables or _tables(grads[0].device)).norm(dense)


def _total_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """In plain torch, whose own rounds the norm of each gradient to its dtype."""
    dtypes = {grad.dtype for grad in grads}
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}:
        return get_total_norm(grads)
    return get_total_norm([get_total_norm([grad.float()]) for grad in grads])


@cache
def _tables(device: torch.device) -> NormTables:
    return NormTables(device)


def _uses_triton(grads: Sequence[Tensor]) -> bool:
    if not any(map(Tensor.numel, grads)):
        return False
    return OPERATOR.uses_triton(grads[0], _obstacle(grads))


def _obstacle(grads: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these gradients, or None if they can."""
    if len(set(map(Tensor.get_device, grads))) > 1:
        return "the gradients are on several devices"
    for grad in grads:
        if type(grad) is not Tensor and type(grad) is not torch.nn.Parameter:
            return f"a gradient is a {type(grad).__name__}, which may not lie at one address"
        if grad.layout is not torch.strided or grad.dtype not in NORM_DTYPES:
            return f"a gradient is {grad.dtype}, {grad.layout}"
    return None
