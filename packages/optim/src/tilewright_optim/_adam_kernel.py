"""Adam and AdamW in Triton: one launch for any number of tensors, one pass over memory.

A program updates one chunk of one tensor, found through the tables of `_tables`. Per element it
reads p, g, m, v and writes p, m, v: 28 bytes where all are float32, 14 where all are bfloat16; with
exact masters and 8-bit averages 14 and the scales. The formulas are those of `functional`; what is
one number a tensor (bias corrections, from the step count) is computed in float64, the rest in
float32, or float64 for float64 parameters.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_kernels.authoring import Operator, accumulator, tl, triton
from tilewright_optim._blockwise import (
    BLOCK,
    decode_signed,
    decode_square,
    encode_signed,
    encode_square,
)
from tilewright_optim._layout import aligned
from tilewright_optim._norm_kernel import clip_factor
from tilewright_optim._rounding import (
    join_halves,
    random_keys,
    random_words,
    split_halves,
    stochastic_half,
)
from tilewright_optim._tables import PointerTables, addresses, element, triton_type

CHUNK = 1024
"""Elements a program updates, a multiple of BLOCK.

Two warps, so 16 elements a thread, and no loop: many small programs in flight hide the latency of
the table look-ups. On an H200 (503 M parameters, float32 / bfloat16) it reaches 98 % / 85 % of
copy_; 4 warps 97 % / 80 %, chunks of 2048 on 8 warps 96 % / 77 %, chunks of 16384 in a loop
87 % / 50 %, a persistent grid 85 % / 60 %.
"""

_NUM_WARPS = 2

OPERATORS = {True: Operator("adamw"), False: Operator("adam")}
"""By whether decay is decoupled."""


@triton.jit
def _adam_chunk(
    p, low, g, m, v, extra, v_scale, first, size, random1, random2,
    grad_scale, clip, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, DECOUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr, SCALED: tl.constexpr, CLIPPED: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update `size` ≤ CHUNK elements from `first`; with VECTOR, all are multiples of 16.

    p, low, g, m, v, v_scale are addresses; extra is that of max v or of m's scales.
    """
    QUANTIZED: tl.constexpr = tl.int8 == EXP_AVG
    HALF: tl.constexpr = tl.int16 if MASTER != "none" else PARAM
    p_ptr, g_ptr = p.to(tl.pointer_type(HALF)) + first, g.to(tl.pointer_type(GRAD)) + first
    m_ptr, v_ptr = m.to(tl.pointer_type(EXP_AVG)) + first, v.to(tl.pointer_type(EXP_AVG_SQ)) + first
    low_ptr = low.to(tl.pointer_type(tl.int16)) + first
    max_v_ptr = extra.to(tl.pointer_type(EXP_AVG_SQ)) + first
    if VECTOR:
        # Hints stay with operations of this function only, not with arguments or other calls.
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        low_ptr, max_v_ptr = tl.multiple_of(low_ptr, 16), tl.multiple_of(max_v_ptr, 16)
        size = size // 16 * 16
    if QUANTIZED:
        rows = tl.arange(0, CHUNK // BLOCK)[:, None]
        at = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
        has_scale = rows * BLOCK < size
        m_scale_ptr = element(extra, tl.float32, first // BLOCK) + rows
        v_scale_ptr = element(v_scale, tl.float32, first // BLOCK) + rows
    else:
        at = tl.arange(0, CHUNK)
    mask = at < size
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(ACC)
    if QUANTIZED:
        m_code, v_code = tl.load(m_ptr + at, mask=mask, other=0), tl.load(v_ptr + at, mask, other=0)
        m = decode_signed(m_code, tl.load(m_scale_ptr, mask=has_scale, other=0.0)).to(ACC)
        v = decode_square(v_code, tl.load(v_scale_ptr, mask=has_scale, other=0.0)).to(ACC)
    else:
        m = tl.load(m_ptr + at, mask=mask, other=0.0).to(ACC)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(ACC)
    if MASTER == "exact":
        high, low = tl.load(p_ptr + at, mask, other=0), tl.load(low_ptr + at, mask, other=0)
        p = join_halves(high, low)
    elif MASTER == "stochastic":
        p = join_halves(tl.load(p_ptr + at, mask=mask, other=0), tl.zeros_like(at).to(tl.int16))
    else:
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(ACC)
    if SCALED:
        g = g / grad_scale
    if CLIPPED:
        g = g * clip
    if MAXIMIZE:
        g = -g
    if not DECOUPLED:
        g += decay * p
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    random = at
    if QUANTIZED or MASTER == "stochastic":
        random = random_words(first.to(tl.uint32) + at.to(tl.uint32), random1, random2)
    if QUANTIZED:
        m_code, m_scale = encode_signed(m)
        v_code, v_scale = encode_square(v, random)
        tl.store(m_ptr + at, m_code, mask=mask)
        tl.store(v_ptr + at, v_code, mask=mask)
        tl.store(m_scale_ptr, m_scale, mask=has_scale)
        tl.store(v_scale_ptr, v_scale, mask=has_scale)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
    if AMSGRAD:
        v = tl.maximum(v, tl.load(max_v_ptr + at, mask=mask, other=0.0).to(ACC))
        tl.store(max_v_ptr + at, v, mask=mask)
    update = m / (tl.sqrt(v) * inv_correction2 + eps)
    if DECOUPLED:
        p = tl.where(update * p >= 0, decay * p, p) if CAUTIOUS else decay * p
    p = p - step_size * update
    if MASTER == "exact":
        high, low = split_halves(p)
        tl.store(p_ptr + at, high, mask=mask)
        tl.store(low_ptr + at, low, mask=mask)
    elif MASTER == "stochastic":
        tl.store(p_ptr + at, stochastic_half(p, random), mask=mask)
    else:
        tl.store(p_ptr + at, p, mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _adam_kernel(
    work_ptr, grads_ptr, num_tensors, grad_scale_ptr, found_inf_ptr, norm_ptr,
    lr_ptr, weight_decay_ptr,
    # pyrefly: ignore[not-a-type]
    step: tl.float64, lr: tl.float64, weight_decay: tl.float64, max_norm: tl.float64,
    # pyrefly: ignore[not-a-type]
    beta1: tl.float64, beta2: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    # pyrefly: ignore[not-a-type]
    eps: tl.float64,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, DECOUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr, CAPTURABLE: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update chunk program_id(0) of the work table.

    Its columns are p, m, v, step, then what there is of: max v or m's scales; v's scales; low
    halves; seeds. The step column holds addresses of step counts where CAPTURABLE, else what each
    tensor's count is ahead of `step`.
    """
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if tl.load(found_inf_ptr) != 0:
            return
    QUANTIZED: tl.constexpr = tl.int8 == EXP_AVG
    RANDOM: tl.constexpr = QUANTIZED or MASTER == "stochastic"
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
    extra, v_scale, low, seed = v, v, p, p
    if AMSGRAD or QUANTIZED:
        extra = tl.load(row_ptr + 4 * num_tensors)
    if AMSGRAD:
        bits |= extra
    if QUANTIZED:
        v_scale = tl.load(row_ptr + 5 * num_tensors)
    if MASTER == "exact":
        low = tl.load(row_ptr + (COLUMNS - (2 if RANDOM else 1)) * num_tensors)
        bits |= low
    if RANDOM:
        seed = tl.load(row_ptr + (COLUMNS - 1) * num_tensors)

    if CAPTURABLE:
        t = tl.load(element(count, tl.float32, 0)).to(tl.float64) + 1
    else:
        t = count.to(tl.float64) + step + 1
    # full() and not cast: the interpreter passes Python floats, which cast makes float32.
    rate = tl.full((), lr, tl.float64)
    if lr_ptr is not None:
        rate = tl.load(lr_ptr).to(tl.float64)
    decay_rate = tl.full((), weight_decay, tl.float64)
    if weight_decay_ptr is not None:
        decay_rate = tl.load(weight_decay_ptr).to(tl.float64)
    grad_scale, clip = 1.0, 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(ACC)
    if norm_ptr is not None:
        clip = clip_factor(tl.load(norm_ptr), grad_scale, max_norm).to(ACC)
    decay = (1 - rate * decay_rate if DECOUPLED else decay_rate).to(ACC)
    step_size = (rate / (1 - tl.exp(t * log_beta1))).to(ACC)
    inv_correction2 = (1 / tl.sqrt(1 - tl.exp(t * log_beta2))).to(ACC)
    weight1 = tl.full((), 1 - beta1, tl.float64).to(ACC)
    weight2 = tl.full((), 1 - beta2, tl.float64).to(ACC)
    beta2 = tl.full((), beta2, tl.float64).to(ACC)
    eps = tl.full((), eps, tl.float64).to(ACC)
    random1, random2 = seed, seed
    if RANDOM:
        random1, random2 = random_keys(seed, t.to(tl.int64))

    size = tl.minimum(size - first, CHUNK).to(tl.int32)
    # Vectors of 16 bytes need aligned addresses, and a size that no vector straddles.
    if bits % 16 == 0:
        _adam_chunk(
            p, low, g, m, v, extra, v_scale, first, size, random1, random2,
            grad_scale, clip, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
            PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, AMSGRAD, MAXIMIZE, DECOUPLED, CAUTIOUS,
            grad_scale_ptr is not None, norm_ptr is not None, True, ACC, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _adam_chunk(
            p, low, g, m, v, extra, v_scale, first, size, random1, random2,
            grad_scale, clip, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
            PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, AMSGRAD, MAXIMIZE, DECOUPLED, CAUTIOUS,
            grad_scale_ptr is not None, norm_ptr is not None, False, ACC, CHUNK, BLOCK,
        )  # fmt: skip


def adam_triton(
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
    """`adam_reference` in one launch, for tensors on one device and of one dtype a column.

    Arguments are as there, with at least one tensor that is not empty; lr, weight_decay,
    grad_scale, found_inf and total_norm on the parameters' device where they are tensors. `tables`
    are of this device, made with CHUNK, and kept by the caller from step to step. `capturable` says
    where the steps are: on the parameters' device in float32, else on the CPU; found_inf needs the
    former.
    """
    maxima = (max_exp_avg_sqs,) if amsgrad else ()
    lows = (master_lows,) if master_lows else ()
    read, written, copies = aligned(grads, (params, exp_avgs, exp_avg_sqs, *maxima, *lows))
    columns = [addresses(column) for column in written]
    places = columns[3 + len(maxima) :]
    scales = [addresses(column) for column in (exp_avg_scales, exp_avg_sq_scales) if column]
    ahead = [list(seeds)] if exp_avg_scales or stochastic else []
    if capturable:
        first, counts = 0.0, addresses(steps)
    else:
        values = [step.item() for step in steps]
        first, counts = values[0], [int(value - values[0]) for value in values]
    columns = [*columns[:3], counts, *columns[3 : 3 + len(maxima)], *scales, *places, *ahead]
    work, grad_addresses, num_chunks = tables.get(
        columns, list(map(Tensor.numel, params)), addresses(read)
    )
    master = "exact" if master_lows else "stochastic" if stochastic else "none"
    OPERATORS[decoupled].launch(
        _adam_kernel, (num_chunks,), work, grad_addresses, len(params),
        grad_scale, found_inf, total_norm, _pointer(lr), _pointer(weight_decay),
        first, _number(lr), _number(weight_decay), max_norm or 0.0,
        beta1, beta2, _log(beta1), _log(beta2), eps,
        PARAM=triton_type(params[0].dtype), GRAD=triton_type(grads[0].dtype),
        EXP_AVG=triton_type(exp_avgs[0].dtype), EXP_AVG_SQ=triton_type(exp_avg_sqs[0].dtype),
        MASTER=master, AMSGRAD=amsgrad, MAXIMIZE=maximize, DECOUPLED=decoupled, CAUTIOUS=cautious,
        CAPTURABLE=capturable, COLUMNS=len(columns), ACC=accumulator(params[0].dtype),
        CHUNK=CHUNK, BLOCK=BLOCK, num_warps=_NUM_WARPS,
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


def _pointer(number: float | Tensor) -> Tensor | None:
    return number if isinstance(number, Tensor) else None


def _number(number: float | Tensor) -> float:
    return 0.0 if isinstance(number, Tensor) else number


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
