"""Clipping by the global norm: one launch for the norm of all gradients, one for their scaling.

The arithmetic is torch.nn.utils.clip_grad_norm_'s: gradients are multiplied by
min(1, max_norm / (norm + 10⁻⁶)). `Adam` and `AdamW` do without the second launch, by max_grad_norm.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tilewright_optim._arguments import is_capturing, obstacle
from tilewright_optim._layout import lies_dense
from tilewright_optim._norm_kernel import NORM_DTYPES, OPERATOR, NormTables

_DTYPE_AND_LAYOUT = attrgetter("dtype", "layout")


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
    differ. Calls on several streams, and graphs that hold calls, may run at once. Norms other than
    the Euclidean are left to torch.

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
    dense = _dense(grads)
    tables = _tables_here(grads[0].device)
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
    return (tables or _tables_here(grads[0].device)).norm(_dense(grads))


class GradientNorms:
    """Norms of the gradients of an optimizer, step by step, and what they keep between steps."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, NormTables] = {}

    def of(self, params: Iterable[Tensor]) -> Tensor | None:
        """`total_norm` of the gradients that there are, or None if there is none."""
        grads = [param.grad for param in params if param.grad is not None]
        if not grads:
            return None
        device = grads[0].device
        if device not in self._tables:
            self._tables[device] = NormTables(device)
        return total_norm(grads, self._tables[device])


def _total_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """In plain torch, whose own rounds the norm of each gradient to its dtype."""
    dtypes = {grad.dtype for grad in grads}
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}:
        return get_total_norm(grads)
    return get_total_norm([get_total_norm([grad.float()]) for grad in grads])


def _dense(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, those with gaps in memory as copies."""
    if all(map(Tensor.is_contiguous, grads)):
        return grads
    return [grad if lies_dense(grad) else grad.contiguous() for grad in grads]


def _tables_here(device: torch.device) -> NormTables:
    """Those of the current stream, for streams may be at work at once; one for all captures.

    What a capture is given stays for good, 16 bytes a gradient and 8 more for each chunk that was
    sent: each replay copies from the host's part, and a graph does not tell when it is gone.
    """
    if device.type != "cuda" or is_capturing(device):
        return _tables(device, None)
    return _tables(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def _tables(device: torch.device, stream: int | None) -> NormTables:
    del stream  # a key
    return NormTables(device)


def _uses_triton(grads: Sequence[Tensor]) -> bool:
    if not any(map(Tensor.numel, grads)):
        return False
    return OPERATOR.uses_triton(grads[0], _obstacle(grads))


def _obstacle(grads: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these gradients, or None if they can."""
    if len(set(map(Tensor.get_device, grads))) > 1:
        return "the gradients are on several devices"
    for dtype, layout in set(map(_DTYPE_AND_LAYOUT, grads)):
        if layout is not torch.strided or dtype not in NORM_DTYPES:
            return f"a gradient is {dtype}, {layout}"
    return obstacle(grads, "gradient")
