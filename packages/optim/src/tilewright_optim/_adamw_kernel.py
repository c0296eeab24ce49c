"""AdamW in Triton: one launch for any number of tensors, one pass over memory.

A program updates one chunk of one tensor, found through the tables of `_tables`. Per element it
reads p, g, m, v and writes p, m, v: 28 bytes where all are float32, 14 where all are bfloat16, and
2 more accesses with amsgrad. The formulas are those of `functional`; what is one number a tensor
(bias corrections, from the step count) is computed in float64, the rest in float32, or float64 for
float64 parameters.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels.authoring import Operator, accumulator, tl, triton
from tilewright_optim._layout import aligned
from tilewright_optim._tables import PointerTables

CHUNK = 1024
"""Elements a program updates.

Two warps, so 16 elements a thread, and no loop: many small programs in flight hide the latency of
the table look-ups. On an H200 (503 M parameters, float32 / bfloat16) it reaches 98 % / 85 % of
copy_; 4 warps 97 % / 80 %, chunks of 2048 on 8 warps 96 % / 77 %, chunks of 16384 in a loop
87 % / 50 %, a persistent grid 85 % / 60 %.
"""

_NUM_WARPS = 2

OPERATOR = Operator("adamw")


@triton.jit
def _element(address, DTYPE: tl.constexpr, index):
    """Pointer to element `index` of the tensor at an address."""
    return address.to(tl.pointer_type(DTYPE)) + index  # pyrefly: ignore[bad-argument-type]


@triton.jit
def _adamw_chunk(
    p_ptr, g_ptr, m_ptr, v_ptr, max_v_ptr, size,
    grad_scale, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update `size` ≤ CHUNK elements; with VECTOR, pointers and size are multiples of 16."""
    if VECTOR:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        size = tl.multiple_of(size, 16)
        if AMSGRAD:
            max_v_ptr = tl.multiple_of(max_v_ptr, 16)
    at = tl.arange(0, CHUNK)
    mask = at < size
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(ACC)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(ACC)
    p = tl.load(p_ptr + at, mask=mask, other=0.0).to(ACC)
    if SCALED:
        g = g / grad_scale
    if MAXIMIZE:
        g = -g
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    if AMSGRAD:
        v = tl.maximum(v, tl.load(max_v_ptr + at, mask=mask, other=0.0).to(ACC))
        tl.store(max_v_ptr + at, v, mask=mask)
    p = decay * p - step_size * (m / (tl.sqrt(v) * inv_correction2 + eps))
    tl.store(p_ptr + at, p, mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _adamw_kernel(
    work_ptr, grads_ptr, num_tensors, grad_scale_ptr, found_inf_ptr, lr_ptr,
    # pyrefly: ignore[not-a-type]
    step: tl.float64, lr: tl.float64, beta1: tl.float64, beta2: tl.float64,
    # pyrefly: ignore[not-a-type]
    log_beta1: tl.float64, log_beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, CAPTURABLE: tl.constexpr,
    ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update chunk program_id(0) of the work table.

    Its columns are p, m, v, step and, with amsgrad, max v. The step column holds addresses of step
    counts where CAPTURABLE, else what each tensor's count is ahead of `step`.
    """
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if tl.load(found_inf_ptr) != 0:
            return
    COLUMNS: tl.constexpr = tl.constexpr(5 if AMSGRAD else 4)
    chunk = tl.load(work_ptr + (COLUMNS + 1) * num_tensors + tl.program_id(0))
    tensor, first = chunk >> 32, (chunk & 0xFFFFFFFF) * CHUNK
    row_ptr = work_ptr + tensor
    g = tl.load(grads_ptr + tensor)
    p = tl.load(row_ptr)
    m = tl.load(row_ptr + num_tensors)
    v = tl.load(row_ptr + 2 * num_tensors)
    count = tl.load(row_ptr + 3 * num_tensors)
    size = tl.load(row_ptr + COLUMNS * num_tensors)
    bits = p | g | m | v | size
    max_v_ptr = None
    if AMSGRAD:
        max_v = tl.load(row_ptr + 4 * num_tensors)
        bits |= max_v
        max_v_ptr = _element(max_v, EXP_AVG_SQ, first)

    if CAPTURABLE:
        t = tl.load(_element(count, tl.float32, 0)).to(tl.float64) + 1
    else:
        t = count.to(tl.float64) + step + 1
    # full() and not cast: the interpreter passes Python floats, which cast makes float32.
    rate = tl.full((), lr, tl.float64)
    if lr_ptr is not None:
        rate = tl.load(lr_ptr).to(tl.float64)
    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(ACC)
    decay = (1 - rate * weight_decay).to(ACC)
    step_size = (rate / (1 - tl.exp(t * log_beta1))).to(ACC)
    inv_correction2 = (1 / tl.sqrt(1 - tl.exp(t * log_beta2))).to(ACC)
    weight1 = tl.full((), 1 - beta1, tl.float64).to(ACC)
    weight2 = tl.full((), 1 - beta2, tl.float64).to(ACC)
    beta2 = tl.full((), beta2, tl.float64).to(ACC)
    eps = tl.full((), eps, tl.float64).to(ACC)

    p_ptr, g_ptr = _element(p, PARAM, first), _element(g, GRAD, first)
    m_ptr, v_ptr = _element(m, EXP_AVG, first), _element(v, EXP_AVG_SQ, first)
    size = tl.minimum(size - first, CHUNK).to(tl.int32)
    # Vectors of 16 bytes need aligned addresses, and a size that no vector straddles.
    if bits % 16 == 0:
        _adamw_chunk(
            p_ptr, g_ptr, m_ptr, v_ptr, max_v_ptr, size,
            grad_scale, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
            AMSGRAD, MAXIMIZE, grad_scale_ptr is not None, True, ACC, CHUNK,
        )  # fmt: skip
    else:
        _adamw_chunk(
            p_ptr, g_ptr, m_ptr, v_ptr, max_v_ptr, size,
            grad_scale, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
            AMSGRAD, MAXIMIZE, grad_scale_ptr is not None, False, ACC, CHUNK,
        )  # fmt: skip


def adamw_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    tables: PointerTables,
    capturable: bool,
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
    """`adamw_reference` in one launch, for tensors on one device and of one dtype a column.

    Arguments are as there, with at least one tensor that is not empty; lr, grad_scale and found_inf
    on the parameters' device where they are tensors. `tables` are of this device, made with CHUNK,
    and kept by the caller from step to step. `capturable` says where the steps are: on the
    parameters' device in float32, else on the CPU; found_inf needs the former.
    """
    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if amsgrad else (exp_avgs, exp_avg_sqs)
    read, written, copies = aligned(grads, (params, *states))
    columns = [_addresses(column) for column in written]
    if capturable:
        first, counts = 0.0, _addresses(steps)
    else:
        values = [step.item() for step in steps]
        first, counts = values[0], [int(value - values[0]) for value in values]
    columns.insert(3, counts)
    work, grad_addresses, num_chunks = tables.get(
        columns, list(map(Tensor.numel, params)), _addresses(read)
    )
    OPERATOR.launch(
        _adamw_kernel, (num_chunks,), work, grad_addresses, len(params),
        grad_scale, found_inf, lr if isinstance(lr, Tensor) else None,
        first, 0.0 if isinstance(lr, Tensor) else lr, beta1, beta2, _log(beta1), _log(beta2),
        eps, weight_decay,
        PARAM=_triton_type(params[0]), GRAD=_triton_type(grads[0]),
        EXP_AVG=_triton_type(exp_avgs[0]), EXP_AVG_SQ=_triton_type(exp_avg_sqs[0]),
        AMSGRAD=amsgrad, MAXIMIZE=maximize, CAPTURABLE=capturable,
        ACC=accumulator(params[0].dtype), CHUNK=CHUNK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    for original, copy in copies:
        original.copy_(copy)
    _count(list(steps), found_inf)


def _count(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Add 1 to every step, after the launch, all of whose programs read them.

    In the kernel it would need a counter of programs, which costs 5 to 15 % of the step. One tensor
    for all of them, because a Python number is five times as slow on the CPU.
    """
    done = torch.ones_like(steps[0]) if found_inf is None else (found_inf == 0).to(steps[0].dtype)
    torch._foreach_add_(steps, [done] * len(steps))


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _triton_type(tensor: Tensor) -> Any:
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
