"""How the backward of attention is tested alone: problems, the oracle, and the rule of accuracy.

The oracle is autograd through attention written out, in float64. It shares the mask and dropout's
random words with the kernels, and nothing else.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention.backward import launch_backward
from tilewright_kernels.flash_attention.masks import Mask, keep_reference
from tilewright_kernels.testing import assert_as_accurate

OPERATOR = Operator("attention_backward_alone")

MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "bottom right": Mask(causal=True, bottom_right=True),
    "window": Mask(left=20, right=7),
    "causal window": Mask(causal=True, bottom_right=True, left=17),
}


@dataclass
class Problem:
    """Inputs of attention [B, T, H, D], or packed [N, H, D], and what masks it."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Mask = MASKS["full"]
    softcap: float = 0.0
    dropout_p: float = 0.0
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    dlse: Tensor | None = None
    scale: float = 0.3
    seed: int = 7

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest sequences."""
        if self.cu_q is None or self.cu_k is None:
            return self.q.shape[-3], self.k.shape[-3]
        return int(self.cu_q.diff().max()), int(self.cu_k.diff().max())


def make(
    lengths: tuple[int, int], heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", batch: int = 2,
    **options: Any,
) -> Problem:  # fmt: skip
    """Normal numbers: lengths and heads of queries and keys, widths of keys and values."""
    (len_q, len_k), (h, kv), (d, d_v) = lengths, heads, widths
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, *shape, generator=generator).to(device, dtype)
        for shape in ((len_q, h, d), (len_k, kv, d), (len_k, kv, d_v), (len_q, h, d_v))
    )
    return Problem(q, k, v, dout, **options)


def make_packed(
    lengths: Sequence[tuple[int, int]], heads: tuple[int, int] = (2, 1),
    dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", padding: int = 0,
    width: int = 16, **options: Any,
) -> Problem:  # fmt: skip
    """Sequences of given (queries, keys) in one row, and rows of NaN after them."""
    generator = torch.Generator().manual_seed(1)
    all_q, all_k = (sum(n) for n in zip(*lengths, strict=True))
    tensors = []
    for length, num_heads in ((all_q, heads[0]), (all_k, heads[1]), (all_k, heads[1])):
        x = torch.randn(length, num_heads, width, generator=generator)
        tensors.append(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=torch.nan))
    tensors.append(torch.randn(all_q + padding, heads[0], width, generator=generator))
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in zip(*lengths, strict=True)
    )
    q, k, v, dout = (x.to(device, dtype) for x in tensors)
    return Problem(q, k, v, dout, cu_q=cu_q, cu_k=cu_k, **options)


def attention(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, batch: int = 0
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of dense attention [B, T, H, D], the formula in q's dtype."""
    (len_q, heads), (len_k, kv_heads) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    s = problem.scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if problem.softcap:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    seen = problem.mask.visible(len_q, len_k, q.device)
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.where(seen.any(-1), s.logsumexp(-1), -math.inf)
    p = torch.where(seen, (s - torch.where(seen.any(-1), lse, 0.0)[..., None]).exp(), 0.0)
    if problem.dropout_p:
        head = torch.arange(len(q) * heads, device=q.device).view(len(q), heads, 1, 1)
        kept = keep_reference(
            torch.tensor(problem.seed, device=q.device), head + batch * heads,
            torch.arange(len_q, device=q.device)[:, None], torch.arange(len_k, device=q.device),
            problem.longest[0], problem.longest[1], problem.dropout_p,
        )  # fmt: skip
        p = torch.where(kept, p / (1 - problem.dropout_p), 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def oracle(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output, log-sum-exp and gradients by autograd, all computed in dtype."""
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (problem.q, problem.k, problem.v))
    if problem.cu_q is None or problem.cu_k is None:
        out, lse = attention(q, k, v, problem)
    else:
        out, lse = torch.zeros_like(problem.dout, dtype=dtype), q.new_zeros(q.shape[1], len(q))
        bounds = zip(
            itertools.pairwise(problem.cu_q.tolist()), itertools.pairwise(problem.cu_k.tolist()),
            strict=True,
        )  # fmt: skip
        for batch, ((q0, q1), (k0, k1)) in enumerate(bounds):
            o, e = attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], problem, batch)
            out = out.index_copy(0, torch.arange(q0, q1, device=q.device), o[0])
            lse = lse.index_copy(1, torch.arange(q0, q1, device=q.device), e[0])
    outs, grads = [out], [problem.dout.to(dtype)]
    if problem.dlse is not None:
        outs.append(lse)
        grads.append(problem.dlse.to(dtype))
    # In this thread: cuBLAS warns in one that has no CUDA context yet, such as autograd's own.
    with torch.autograd.set_multithreading_enabled(False):
        return out.detach(), lse.detach(), torch.autograd.grad(outs, (q, k, v), grads)


def gradients(problem: Problem, out: Tensor, lse: Tensor, deterministic: bool) -> list[Tensor]:
    """dq, dk and dv by the kernels; memory that they should write holds NaN before."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    grads = [torch.full_like(x, torch.nan) for x in (problem.q, problem.k, problem.v)]
    longest = problem.longest if problem.cu_q is not None else (0, 0)
    launches = OPERATOR._done.launches
    launch_backward(
        OPERATOR, problem.dout, problem.q, problem.k, problem.v, out.to(problem.q.dtype),
        lse.to(wide), *grads, mask=problem.mask, scale=problem.scale, softcap=problem.softcap,
        dropout_p=problem.dropout_p, seed=torch.tensor(problem.seed, device=problem.q.device),
        cu_seqlens_q=problem.cu_q, cu_seqlens_k=problem.cu_k, max_seqlen_q=longest[0],
        max_seqlen_k=longest[1], deterministic=deterministic, dlse=problem.dlse,
    )  # fmt: skip
    assert OPERATOR._done.launches > launches
    return grads


def check(problem: Problem, deterministic: bool) -> list[Tensor]:
    """Gradients within twice the error of the same formula in the inputs' dtype."""
    out, lse, expected = oracle(problem, torch.float64)
    same = oracle(problem, problem.q.dtype)[2]
    ours = gradients(problem, out, lse, deterministic)
    scale = problem.dout.abs().max().item()
    for name, a, b, c in zip(("dq", "dk", "dv"), ours, same, expected, strict=True):
        if c.numel() and c.abs().max() < 1e-13 * scale:
            # A key alone has p = 1 whatever its score: what is left is the rounding of dp - delta.
            assert a.abs().max() <= 64 * torch.finfo(a.dtype).eps * scale, name
        else:
            assert_as_accurate(a, b, c, scale=scale, what=name)
    return ours


def check_neighbours(
    lengths: Sequence[tuple[int, int]], device: torch.device | str, width: int, deterministic: bool
) -> None:
    """Rows after packed sequences, which are NaN, change no gradient and get none."""
    problem = make_packed(lengths, dtype=torch.float16, device=device, padding=20, width=width)
    num_q, num_k = (sum(n) for n in zip(*lengths, strict=True))
    used = {"q": num_q, "k": num_k, "v": num_k}
    trimmed = replace(
        problem, dout=problem.dout[:num_q], **{n: getattr(problem, n)[:r] for n, r in used.items()}
    )
    out, lse, _ = oracle(trimmed, torch.float64)
    expected = gradients(trimmed, out, lse, deterministic)
    out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, 20), value=torch.nan)
    lse = torch.nn.functional.pad(lse, (0, 20), value=torch.nan)
    ours = gradients(problem, out, lse, deterministic)
    for a, b, rows in zip(ours, expected, used.values(), strict=True):
        torch.testing.assert_close(a[:rows], b)
        assert a[rows:].isnan().all()
