"""The kernels in torch.library, with their gradient.

What is kept between forward and backward is q, k, v, out and lse, one number a row. Tensors are
[B, T, H, D] (packed: [N, H, D]) of any strides, so that both torch's order and that of a
projection's output are views.

Which kernels run is decided below, in `launch_forward` and `launch_backward`: the portable ones, or
those for one architecture that take what is given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention.backward import launch_backward
from tilewright_kernels.flash_attention.forward import launch_forward
from tilewright_kernels.flash_attention.masks import Mask


def register(operator: Operator, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `name`_forward and `name`_backward as launches of `operator`; return the forward.

    Both take sequences of one length, where cu_seqlens are None, and packed ones.
    """

    def forward_fake(
        q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
        max_seqlen_q: int, max_seqlen_k: int,
        mask: Sequence[int], scale: float, softcap: float, dropout_p: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        *batch, tokens, heads, _ = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        return _empty_like(q, v.shape[-1]), q.new_empty((*batch, heads, tokens), dtype=dtype)

    def backward_fake(
        dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, seed: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
        max_seqlen_q: int, max_seqlen_k: int,
        mask: Sequence[int], scale: float, softcap: float, dropout_p: float, deterministic: bool,
        wants_q: bool, wants_kv: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = zip((q, k, v), (wants_q, wants_kv, wants_kv), strict=True)
        dq, dk, dv = (_empty_like(x) if wants else x.new_empty(0) for x, wants in wanted)
        return dq, dk, dv

    def forward(
        q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
        max_seqlen_q: int, max_seqlen_k: int,
        mask: Sequence[int], scale: float, softcap: float, dropout_p: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Launch the forward: out [..., T, H, D_v] and lse [..., H, T]."""
        out, lse = forward_fake(
            q, k, v, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            mask, scale, softcap, dropout_p, deterministic,
        )  # fmt: skip
        if cu_seqlens_q is not None or k.numel() == 0:  # what no sequence reaches is not written
            out.zero_()
            lse.fill_(-torch.inf)
        if out.numel() > 0 and k.numel() > 0:
            q, k, v = dense(q, k, v)
            launch_forward(
                operator, q, k, v, out, lse,
                mask=Mask.of_ints(mask), scale=scale, softcap=softcap,
                dropout_p=dropout_p, seed=seed, cu_seqlens_q=_vector(cu_seqlens_q),
                cu_seqlens_k=_vector(cu_seqlens_k), max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
            )  # fmt: skip
        return out, lse

    def backward(
        dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, seed: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
        max_seqlen_q: int, max_seqlen_k: int,
        mask: Sequence[int], scale: float, softcap: float, dropout_p: float, deterministic: bool,
        wants_q: bool, wants_kv: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Launch the backward: gradients like q, k and v, without elements where not wanted."""
        grads = backward_fake(
            dout, dlse, q, k, v, out, lse, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, mask, scale, softcap, dropout_p, deterministic, wants_q, wants_kv,
        )  # fmt: skip
        if cu_seqlens_q is not None or out.numel() == 0 or k.numel() == 0:
            for grad in grads:
                grad.zero_()
        if out.numel() > 0 and k.numel() > 0:
            dout, q, k, v = dense(dout, q, k, v)
            dq, dk, dv = grads
            launch_backward(
                operator, dout, q, k, v, out, lse, dq if wants_q else None,
                dk if wants_kv else None, dv if wants_kv else None,
                mask=Mask.of_ints(mask), scale=scale, softcap=softcap,
                dropout_p=dropout_p, seed=seed, cu_seqlens_q=_vector(cu_seqlens_q),
                cu_seqlens_k=_vector(cu_seqlens_k), max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                deterministic=deterministic, dlse=dlse,
            )  # fmt: skip
        return grads

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, seed, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, seed, cu_seqlens_q, cu_seqlens_k)

    def grads(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 13
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        # dk and dv are one kernel's: whoever wants one gets both.
        q, k, v = ctx.needs_input_grad[:3]
        dq, dk, dv = registered_backward(dout, dlse, *saved, *ctx.options, q, k or v)
        return dq if q else None, dk if k else None, dv if v else None, *[None] * 10

    forward.__name__, backward.__name__ = f"{name}_forward", f"{name}_backward"
    registered_backward = operator.function(fake=backward_fake)(backward)
    return operator.function(fake=forward_fake, setup_context=save, backward=grads)(forward)


def _empty_like(x: Tensor, width: int | None = None) -> Tensor:
    """New memory for [..., T, H, width]: heads outside of tokens where x has them so."""
    shape = (*x.shape[:-1], x.shape[-1] if width is None else width)
    if x.dim() == 4 and x.stride(2) > x.stride(1):
        return x.new_empty((shape[0], shape[2], shape[1], shape[3])).transpose(1, 2)
    return x.new_empty(shape)


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied only where their last dimension has gaps."""
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _vector(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def scalars(
    mask: Mask, scale: float | None, softcap: float | None, dropout_p: float,
    deterministic: bool | None, head_dim: int,
) -> tuple[list[int], float, float, float, bool]:  # fmt: skip
    """The last arguments of registered functions, which take no None and no dataclass."""
    return (
        mask.as_ints(),
        float(max(head_dim, 1) ** -0.5 if scale is None else scale),
        float(softcap or 0.0),
        float(dropout_p),
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
    )


def draw_seed(dropout_p: float, q: Tensor) -> Tensor | None:
    """A seed on the device, from its generator: nothing waits, and a CUDA graph draws anew."""
    return torch.randint(2**63 - 1, (), device=q.device) if dropout_p > 0 else None
