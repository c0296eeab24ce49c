"""Muon in plain torch: the definition, the oracle of the kernels, and what runs on the CPU.

For each matrix p [A, B] with gradient g, learning rate γ, decay λ and momentum μ

    M ← M + (1 - μ)(g - M)
    u = M + (1 - μ)(g - M) with Nesterov, else M
    p ← (1 - γ λ) p - γ s · NS(u)

(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). NS is `newton_schulz`; s makes
updates of all shapes comparable: √max(1, A / B), "original", or 0.2 √max(A, B), "match_rms_adamw",
which gives an update the root mean square of a typical AdamW step (Liu et al. 2025,
arXiv:2502.16982). Arithmetic is float32 (float64 for float64), rounded once when a result is
stored; torch.optim.Muon's Newton–Schulz is bfloat16 throughout.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tilewright_optim._coefficients import QUINTIC, Coefficients
from tilewright_optim._muon_matrices import matrices_of
from tilewright_optim._rounding import join_master, split_master
from tilewright_optim.newton_schulz import newton_schulz_reference

AdjustLr = Literal["original", "match_rms_adamw"]
ADJUSTMENTS: tuple[AdjustLr, ...] = ("original", "match_rms_adamw")

RMS = 0.2
"""Root mean square of a typical AdamW update, in units of the learning rate (Liu et al. 2025)."""


def lr_factor(adjust_lr_fn: AdjustLr | None, rows: int, cols: int) -> float:
    """s, what the learning rate of a matrix [rows, cols] is multiplied by; None is "original"."""
    if adjust_lr_fn == "match_rms_adamw":
        return RMS * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols))


def muon_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lows: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Coefficients = QUINTIC,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: AdjustLr | None = None,
    split_sizes: Sequence[int] | None = None,
    cautious: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ns_dtype: torch.dtype | None = None,
) -> None:
    """Update parameters and momentum in place, one matrix after the other.

    Args:
        params: [A, B], or [E, A, B] of E matrices; float16, bfloat16, float32 or float64.
        grads: of the same shapes; read only.
        momentum_buffers: M, of the same shapes.
        lows: the int16 halves of exact masters, of bfloat16 params; empty without them.
        lr: γ, a float or a tensor of one element.
        weight_decay: λ.
        momentum: μ.
        nesterov: whether u looks one step ahead.
        ns_coefficients: as in `newton_schulz`.
        eps: least norm that u is divided by.
        ns_steps: steps of Newton–Schulz.
        adjust_lr_fn: what s is; None is "original".
        split_sizes: rows of the matrices that each [A, B] is made of; None is one matrix.
        cautious: decay an element only where the update makes it smaller.
        grad_scale: 0-d, what gradients are divided by before use; None is 1.
        found_inf: 0-d; if it is not 0, nothing changes. None is 0.
        ns_dtype: of the arithmetic of Newton–Schulz; None is that of the rest.
    """
    rate = lr.double().reshape(()) if isinstance(lr, Tensor) else lr
    for i, (param, buffer) in enumerate(zip(params, momentum_buffers, strict=True)):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        grad = grads[i].to(dtype)
        if grad_scale is not None:
            grad = grad / grad_scale
        ahead = buffer.to(dtype).lerp(grad, 1 - momentum)
        u = ahead.lerp(grad, 1 - momentum) if nesterov else ahead
        master = join_master(param, lows[i]) if lows else param.to(dtype)
        new = torch.empty_like(master, memory_format=torch.contiguous_format)
        flat_u, flat_p = (t.contiguous().view(-1) for t in (u, master))
        for matrix in matrices_of(i, param.shape, split_sizes):
            shape = matrix.rows, matrix.cols
            span = slice(matrix.offset, matrix.offset + matrix.rows * matrix.cols)
            x = newton_schulz_reference(
                flat_u[span].view(shape),
                steps=ns_steps,
                coefficients=ns_coefficients,
                eps=eps,
                dtype=ns_dtype,
            ).to(dtype)
            p = flat_p[span].view(shape)
            decay = rate * weight_decay
            decayed = torch.where(x * p >= 0, p - decay * p, p) if cautious else p - decay * p
            new.view(-1)[span] = (decayed - rate * lr_factor(adjust_lr_fn, *shape) * x).view(-1)
        halves = split_master(new) if lows else (new,)
        _store(buffer, ahead, found_inf)
        for kept, value in zip((param, *lows[i : i + 1]), halves, strict=True):
            _store(kept, value, found_inf)


def _store(kept: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    value = value.to(kept.dtype)
    kept.copy_(value if found_inf is None else torch.where(found_inf == 0, value, kept))
