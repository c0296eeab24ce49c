"""AdamW in plain torch: the definition, the oracle of the kernel, and what runs on the CPU.

For each parameter p with gradient g, learning rate γ, decay λ and step t = 1, 2, …

    p ← (1 - γ λ) p
    m ← m + (1 - β₁)(g - m)                     v ← β₂ v + (1 - β₂) g²
    p ← p - γ / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

(Loshchilov & Hutter 2019, arXiv:1711.05101). With amsgrad (Reddi et al. 2018) the running maximum
of v stands in its place. Arithmetic is float32 (float64 for float64 parameters), rounded once when
a result is stored. So are torch's fused kernels; its others round bfloat16 at each operation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update parameters, states and steps in place, one tensor after the other.

    Args:
        params: any shapes and strides, float16, bfloat16, float32 or float64.
        grads: gradients of the same shapes; read only.
        exp_avgs: m, like params.
        exp_avg_sqs: v, like params.
        max_exp_avg_sqs: running maximum of v, like params; empty without amsgrad.
        steps: 0-d, the number of updates made so far, on the CPU or on the parameter's device. No
            device is synchronized for one on its parameter's device.
        lr: γ, a float or a tensor of one element.
        beta1: β₁.
        beta2: β₂.
        eps: ε.
        weight_decay: λ.
        amsgrad: divide by the running maximum of v.
        maximize: go up the gradient.
        grad_scale: 0-d, what gradients are divided by before use; None is 1.
        found_inf: 0-d, where the parameters and steps are; if it is not 0, nothing changes, not
            even the steps. None is 0.
    """
    proceed = None if found_inf is None else found_inf == 0
    if isinstance(lr, Tensor):
        lr = lr.double().reshape(())
    for i, param in enumerate(params):
        stored = [param, exp_avgs[i], exp_avg_sqs[i], *(max_exp_avg_sqs[i : i + 1])]
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        wide = [t.to(dtype, copy=proceed is not None) for t in stored]
        grad = grads[i].to(dtype)
        if grad_scale is not None:
            grad = grad / grad_scale
        step = steps[i].double() if steps[i].device.type != "cpu" else steps[i].item()
        _update(
            wide,
            -grad if maximize else grad,
            step + 1,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            amsgrad,
        )
        for kept, new in zip(stored, wide, strict=True):
            if proceed is not None:
                kept.copy_(torch.where(proceed, new, kept))
            elif new is not kept:
                kept.copy_(new)
        steps[i].add_(1 if proceed is None else proceed)


def _update(
    tensors: Sequence[Tensor],
    grad: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
) -> None:
    """The formulas above on [p, m, v] or [p, m, v, max v], all of the dtype of the arithmetic."""
    param, exp_avg, exp_avg_sq, *rest = tensors
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = torch.maximum(rest[0], exp_avg_sq, out=rest[0]) if amsgrad else exp_avg_sq
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    step_size = lr / (1 - beta1**step)
    if isinstance(step_size, Tensor):
        param.sub_(torch.div(exp_avg, denominator, out=denominator).mul_(step_size))
    else:
        param.addcdiv_(exp_avg, denominator, value=-step_size)
