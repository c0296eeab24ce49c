"""Adam and AdamW in plain torch: the definition, the oracle of the kernel, what runs on the CPU.

For each parameter p with gradient g, learning rate γ, decay λ and step t = 1, 2, …

    g ← g + λ p                                  (Adam)    p ← (1 - γ λ) p    (AdamW)
    m ← m + (1 - β₁)(g - m)                     v ← β₂ v + (1 - β₂) g²
    p ← p - γ / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

(Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101). With amsgrad (Reddi
et al. 2018) the running maximum of v stands in its place. Cautious decay (Chen et al. 2025,
arXiv:2510.12402) shrinks p only where the update does too, where m p ≥ 0. Arithmetic is float32
(float64 for float64 parameters), rounded once when a result is stored. So are torch's fused
kernels; its others round bfloat16 at each operation. How masters and 8-bit averages are stored is
told in `_rounding` and `_blockwise`.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tilewright_optim._blockwise import (
    dequantize_signed,
    dequantize_square,
    quantize_signed,
    quantize_square,
)
from tilewright_optim._layout import like_in_memory
from tilewright_optim._rounding import join_master, random_bits, split_master, stochastic_round


def adam_reference(
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
    weight_decay: float | Tensor,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
    cautious: bool = False,
    master_lows: Sequence[Tensor] = (),
    stochastic: bool = False,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    seeds: Sequence[int] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    total_norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    """Update parameters, states and steps in place, one tensor after the other.

    Args:
        params: any shapes and strides, float16, bfloat16, float32 or float64.
        grads: gradients of the same shapes; read only.
        exp_avgs: m, like params, floating or int8 codes.
        exp_avg_sqs: v, like params, floating or uint8 codes.
        max_exp_avg_sqs: running maximum of v, like params; empty without amsgrad.
        steps: 0-d, the number of updates made so far, on the CPU or on the parameter's device. No
            device is synchronized for one on its parameter's device.
        lr: γ, a float or a tensor of one element.
        beta1: β₁.
        beta2: β₂.
        eps: ε.
        weight_decay: λ, a float or a tensor of one element.
        amsgrad: divide by the running maximum of v.
        maximize: go up the gradient.
        decoupled: AdamW's decay, not Adam's.
        cautious: decay only where the update points the same way; needs decoupled.
        master_lows: int16, the low halves of the masters of bfloat16 params; empty without.
        stochastic: round params, which are bfloat16, stochastically.
        exp_avg_scales: float32, the scales of blocks of m where it is int8; empty without.
        exp_avg_sq_scales: and of v.
        seeds: numbers of the tensors, for random bits; empty where there are none.
        grad_scale: 0-d, what gradients are divided by before use; None is 1.
        found_inf: 0-d, where the parameters and steps are; if it is not 0, nothing changes, not
            even the steps. None is 0.
        total_norm: 0-d, norm of all gradients before the division, to clip by; None does not clip.
        max_norm: what the norm after the division is clipped to.
    """
    proceed = None if found_inf is None else found_inf == 0
    lr, weight_decay = _as_scalar(lr), _as_scalar(weight_decay)
    for i, param in enumerate(params):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        wide = partial(_widened, dtype=dtype, copy=proceed is not None)
        p = join_master(param, master_lows[i]) if master_lows else wide(param)
        if exp_avg_scales:
            m = dequantize_signed(exp_avgs[i], exp_avg_scales[i]).to(dtype)
            v = dequantize_square(exp_avg_sqs[i], exp_avg_sq_scales[i]).to(dtype)
        else:
            m, v = wide(exp_avgs[i]), wide(exp_avg_sqs[i])
        maxima = [wide(max_exp_avg_sqs[i])] if amsgrad else []
        grad = grads[i].to(dtype)
        if grad_scale is not None:
            grad = grad / grad_scale
        if total_norm is not None:
            assert max_norm is not None
            grad = grad * clip_factor(total_norm, grad_scale, max_norm)
        if maximize:
            grad = -grad
        if not decoupled:
            grad = grad + (weight_decay * p).to(dtype)  # a 0-d p takes the decay's dtype
        step = steps[i].double() if steps[i].device.type != "cpu" else steps[i].item()
        decay = 1 - lr * weight_decay if decoupled else 1.0
        _update([p, m, v, *maxima], grad, step + 1, lr, beta1, beta2, eps, decay, cautious)

        results = [(max_exp_avg_sqs[i], maxima[0])] if amsgrad else []
        random = None
        if exp_avg_scales or stochastic:
            random = random_bits(param.numel(), seeds[i], steps[i].to(param.device) + 1)
        if exp_avg_scales:
            assert random is not None
            m_code, m_scale = quantize_signed(m)
            v_code, v_scale = quantize_square(v, random)
            results += [(exp_avgs[i], m_code), (exp_avg_scales[i], m_scale)]
            results += [(exp_avg_sqs[i], v_code), (exp_avg_sq_scales[i], v_scale)]
        else:
            results += [(exp_avgs[i], m), (exp_avg_sqs[i], v)]
        if master_lows:
            results += zip((param, master_lows[i]), split_master(p), strict=True)
        elif stochastic:
            assert random is not None
            results.append((param, stochastic_round(p, like_in_memory(random, p))))
        else:
            results.append((param, p))
        for kept, new in results:
            if proceed is not None:
                kept.copy_(torch.where(proceed, new.to(kept.dtype), kept))
            elif new is not kept:
                kept.copy_(new)
        steps[i].add_(1 if proceed is None else proceed)


adamw_reference = partial(adam_reference, decoupled=True)
"""`adam_reference` with decoupled decay."""


def clip_factor(total_norm: Tensor, grad_scale: Tensor | None, max_norm: float) -> Tensor:
    """What gradients of this norm, once divided by grad_scale, are multiplied by."""
    norm = total_norm if grad_scale is None else total_norm / grad_scale
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _update(
    tensors: Sequence[Tensor],
    grad: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float | Tensor,
    cautious: bool,
) -> None:
    """The formulas above on [p, m, v] or [p, m, v, max v], all of the dtype of the arithmetic."""
    param, exp_avg, exp_avg_sq, *maximum = tensors
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = torch.maximum(maximum[0], exp_avg_sq, out=maximum[0]) if maximum else exp_avg_sq
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    step_size = lr / (1 - beta1**step)
    if cautious:
        param.copy_(torch.where(exp_avg / denominator * param >= 0, decay * param, param))
    else:
        param.mul_(decay)
    if isinstance(step_size, Tensor):
        param.sub_(torch.div(exp_avg, denominator, out=denominator).mul_(step_size))
    else:
        param.addcdiv_(exp_avg, denominator, value=-step_size)


def _as_scalar(number: float | Tensor) -> float | Tensor:
    return number.double().reshape(()) if isinstance(number, Tensor) else number


def _widened(x: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    return x.to(dtype, copy=copy)
