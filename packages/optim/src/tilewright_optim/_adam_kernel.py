"""Adam and AdamW in Triton: one launch for any number of tensors, one pass over memory.

A program updates one chunk of one tensor, found through the tables of `_tables`. Per element it
reads p, g, m, v and writes p, m, v: 28 bytes where all are float32, 14 where all are bfloat16; with
exact masters and 8-bit averages 14 and the scales. The formulas are those of `functional`; what is
one number a tensor (bias corrections, from the step count) is computed to float32's precision, as
the rest is in float32; all is float64 for float64 parameters.
"""

import math

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
from tilewright_optim._plan import Launch
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

Four warps, so 8 elements a thread, and no loop: many small programs in flight hide the latency of
the table look-ups. On an H200 (503 M parameters, float32 / bfloat16) it reaches 99 % / 97 % of
copy_; 2 warps 97 % / 94 %, chunks of 2048 on 4 warps 96 % / 93 %.
"""

_NUM_WARPS = 4

_CODED_TILES = 4
"""Times CHUNK of 8-bit averages in a program: instructions are their limit, and what a program does
once, for each of its threads, is a quarter of those of one CHUNK."""

_CODED = {"maxnreg": 80}
"""Launch options of 8-bit averages. 2.01 ms for 503 M parameters; 2.41 with as many registers as
the compiler would take, 2.22 with one CHUNK a program."""

OPERATORS = {True: Operator("adamw"), False: Operator("adam")}
"""By whether decay is decoupled."""


@triton.jit
def _one_minus_power(exponent, ACC: tl.constexpr):
    """1 - exp(exponent) for one not above 0, without cancellation.

    In float64 throughout, it would take a fifth of the instructions of a chunk of 8-bit averages.
    """
    if tl.float64 == ACC:
        result = 1 - tl.exp(exponent)
    else:
        x = tl.maximum(exponent, -100.0).to(tl.float32)
        series = 1 + x * (1.0 / 8) * (1 + x * (1.0 / 9) * (1 + x * (1.0 / 10)))
        series = 1 + x * (1.0 / 5) * (1 + x * (1.0 / 6) * (1 + x * (1.0 / 7) * series))
        series = 1 + x * (1.0 / 2) * (1 + x * (1.0 / 3) * (1 + x * (1.0 / 4) * series))
        result = tl.where(x > -1, -x * series, 1 - tl.exp(x))
    return result


@triton.jit
def _corrections(before, rate, log_beta1, log_beta2, ACC: tl.constexpr):
    """What updates and roots are multiplied by at the step after `before`."""
    t = before.to(tl.float64) + 1
    step_size = rate.to(ACC) / _one_minus_power(t * log_beta1, ACC)
    return step_size, 1 / tl.sqrt(_one_minus_power(t * log_beta2, ACC))


@triton.jit
def _adam_chunk(
    p, low, g, m, v, extra, v_scale, first, size, random1, random2,
    grad_scale, clip, decay, weight1, beta2, weight2, step_size, inv_correction2, eps,
    count, rate, log_beta1, log_beta2,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, DECOUPLED: tl.constexpr,
    CAUTIOUS: tl.constexpr, SCALED: tl.constexpr, CLIPPED: tl.constexpr,
    COUNTS: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update `size` ≤ CHUNK elements from `first`; with VECTOR, all are multiples of 16.

    p, low, g, m, v, v_scale are addresses; extra is that of max v or of m's scales. With COUNTS the
    corrections are made here, from the count at its address: no element waits for it to be read.
    """
    QUANTIZED: tl.constexpr = tl.constexpr(tl.int8 == EXP_AVG)
    HALF: tl.constexpr = tl.constexpr(tl.int16 if MASTER != "none" else PARAM)
    p_ptr, g_ptr = element(p, HALF, first, VECTOR), element(g, GRAD, first, VECTOR)
    m_ptr, v_ptr = element(m, EXP_AVG, first, VECTOR), element(v, EXP_AVG_SQ, first, VECTOR)
    low_ptr = element(low, tl.int16, first, VECTOR)
    max_v_ptr = element(extra, EXP_AVG_SQ, first, VECTOR)
    if VECTOR:
        size = size // 16 * 16  # tells the compiler that it is one
    has_scale, m_scale_ptr, v_scale_ptr = None, None, None
    if QUANTIZED:
        rows = tl.arange(0, CHUNK // BLOCK)[:, None]
        at = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
        has_scale = rows * BLOCK < size
        m_scale_ptr = element(extra, tl.float32, first // BLOCK, False) + rows
        v_scale_ptr = element(v_scale, tl.float32, first // BLOCK, False) + rows
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
    if COUNTS:
        before = tl.load(element(count, tl.float32, 0, False))
        step_size, inv_correction2 = _corrections(before, rate, log_beta1, log_beta2, ACC)
    if SCALED:
        g = g / grad_scale
    if CLIPPED:
        g = g * clip
    if MAXIMIZE:
        g = -g
    if not DECOUPLED:
        g += decay * p
    # Which of two products is rounded must not depend on what else is compiled, or masters would
    # differ from float32 parameters in the last bit.
    m = tl.fma(weight1, g - m, m)
    v = tl.fma(weight2 * g, g, beta2 * v)
    random = at
    if QUANTIZED or MASTER == "stochastic":
        random = random_words(first.to(tl.uint32) + at.to(tl.uint32), random1, random2)
    if QUANTIZED:
        m_code, m_scale = encode_signed(m)
        v_code, v_scale = encode_square(v, tl.sqrt(v), random)
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
    root = tl.sqrt(v) * inv_correction2 + eps
    # Codes make instructions the limit, and err by more than a reciprocal root, which takes fewer.
    update = m * tl.rsqrt(root * root) if QUANTIZED else m / root
    if DECOUPLED:
        p = tl.where(update * p >= 0, decay * p, p) if CAUTIOUS else decay * p
    p = tl.fma(-step_size, update, p)
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
    CAUTIOUS: tl.constexpr, CAPTURABLE: tl.constexpr, COUNTS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update chunk program_id(0) of the work table.

    Its columns are p, m, v, step, then what there is of: max v; low halves; scales of m and of v;
    seeds. The step column holds addresses of step counts where CAPTURABLE, else what each
    tensor's count is ahead of `step`. With COUNTS each tensor is one chunk, whose program adds 1.
    """
    if found_inf_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if tl.load(found_inf_ptr) != 0:
            return
    QUANTIZED: tl.constexpr = tl.constexpr(tl.int8 == EXP_AVG)
    RANDOM: tl.constexpr = tl.constexpr(QUANTIZED or MASTER == "stochastic")
    if COUNTS:
        chunk = tl.program_id(0).to(tl.int64) << 32
    else:
        chunk = tl.load(work_ptr + (COLUMNS + 1) * num_tensors + tl.program_id(0))
    tensor, first = chunk >> 32, (chunk & 0xFFFFFFFF) * (CHUNK * TILES)
    row_ptr = work_ptr + tensor
    g = tl.load(grads_ptr + tensor)
    p = tl.load(row_ptr)
    m = tl.load(row_ptr + num_tensors)
    v = tl.load(row_ptr + 2 * num_tensors)
    count = tl.load(row_ptr + 3 * num_tensors)
    size = tl.load(row_ptr + COLUMNS * num_tensors)
    bits = p | g | m | v | size
    extra, v_scale, low, seed = v, v, p, p
    LOW: tl.constexpr = tl.constexpr(5 if AMSGRAD else 4)
    SCALE: tl.constexpr = tl.constexpr(LOW + 1 if MASTER == "exact" else LOW)
    if AMSGRAD:
        extra = tl.load(row_ptr + 4 * num_tensors)
        bits |= extra
    if MASTER == "exact":
        low = tl.load(row_ptr + LOW * num_tensors)
        bits |= low
    if QUANTIZED:
        extra = tl.load(row_ptr + SCALE * num_tensors)
        v_scale = tl.load(row_ptr + (SCALE + 1) * num_tensors)
    if RANDOM:
        seed = tl.load(row_ptr + (COLUMNS - 1) * num_tensors)

    if CAPTURABLE:
        before = tl.load(element(count, tl.float32, 0, False))
    else:
        before = count.to(tl.float64) + step
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
    weight1 = tl.full((), 1 - beta1, tl.float64).to(ACC)
    weight2 = tl.full((), 1 - beta2, tl.float64).to(ACC)
    beta2 = tl.full((), beta2, tl.float64).to(ACC)
    eps = tl.full((), eps, tl.float64).to(ACC)
    random1, random2 = seed, seed
    step_size, inv_correction2 = rate, rate
    if not COUNTS:
        step_size, inv_correction2 = _corrections(before, rate, log_beta1, log_beta2, ACC)
    if RANDOM:
        random1, random2 = random_keys(seed, before.to(tl.int64) + 1)

    size = tl.minimum(size - first, CHUNK * TILES).to(tl.int32)
    # Vectors of 16 bytes need aligned addresses, and a size that no vector straddles.
    if bits % 16 == 0:
        for i in range(TILES):
            _adam_chunk(
                p, low, g, m, v, extra, v_scale, first + i * CHUNK, size - i * CHUNK,
                random1, random2, grad_scale, clip, decay,
                weight1, beta2, weight2, step_size, inv_correction2, eps,
                count, rate, log_beta1, log_beta2,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, AMSGRAD, MAXIMIZE, DECOUPLED, CAUTIOUS,
                grad_scale_ptr is not None, norm_ptr is not None, COUNTS, True, ACC, CHUNK, BLOCK,
            )  # fmt: skip
    else:
        for i in range(TILES):
            _adam_chunk(
                p, low, g, m, v, extra, v_scale, first + i * CHUNK, size - i * CHUNK,
                random1, random2, grad_scale, clip, decay,
                weight1, beta2, weight2, step_size, inv_correction2, eps,
                count, rate, log_beta1, log_beta2,
                PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MASTER, AMSGRAD, MAXIMIZE, DECOUPLED, CAUTIOUS,
                grad_scale_ptr is not None, norm_ptr is not None, COUNTS, False, ACC, CHUNK, BLOCK,
            )  # fmt: skip
    if COUNTS:
        tl.debug_barrier()  # some warps may not have read it yet
        count_ptr = element(count, tl.float32, 0, False)
        tl.store(count_ptr, tl.load(count_ptr) + 1)


def chunk_size(exp_avg: torch.dtype) -> int:
    """Elements of a chunk in the tables, where averages have this dtype."""
    return CHUNK * _tiles(exp_avg)


def _tiles(exp_avg: torch.dtype) -> int:
    return _CODED_TILES if exp_avg == torch.int8 else 1


def adam_triton(
    launch: Launch,
    tables: PointerTables,
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
    stochastic: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    total_norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    """`adam_reference` in one launch, for tensors on one device and of one dtype a column.

    Args:
        launch: the tensors, at least one of them not empty. Their steps are on the parameters'
            device in float32 if it is capturable, else on the CPU; found_inf needs the former.
        tables: of this device, made with chunk_size, and kept by the caller from step to step.
        lr: as there; on the parameters' device where they are tensors, as the others that may be.
        beta1: as there, and so on.
        beta2: β₂.
        eps: ε.
        weight_decay: λ.
        amsgrad: divide by the running maximum of v.
        maximize: go up the gradient.
        decoupled: AdamW's decay.
        cautious: decay only where the update points the same way.
        stochastic: round params stochastically.
        grad_scale: what gradients are divided by.
        found_inf: where it is not 0, nothing changes.
        total_norm: of all gradients before the division.
        max_norm: what it is clipped to.
    """
    params, grads, m, v, maxima, lows, m_scales, v_scales, _, seeds = launch.columns
    places, grad_places, copies = launch.places, launch.grad_places, ()
    if not launch.contiguous:
        written = [column for column in (params, m, v, maxima, lows) if column]
        read, written, copies = aligned(grads, written)
        places = [*map(addresses, written), *(addresses(c) for c in (m_scales, v_scales) if c)]
        grad_places = addresses(read)
    first, counts = (0.0, launch.counts.places) if launch.capturable else launch.counts.read()
    random = [seeds] if m_scales or stochastic else []
    columns = [*places[:3], counts, *places[3:], *random]
    work, grad_table, num_chunks = tables.get(columns, launch.sizes, grad_places)
    counts_itself = launch.counts_itself(chunk_size(m[0].dtype))
    OPERATORS[decoupled].launch(
        _adam_kernel, (num_chunks,), work, grad_table, len(params),
        grad_scale, found_inf, total_norm, _pointer(lr), _pointer(weight_decay),
        first, _number(lr), _number(weight_decay), max_norm or 0.0,
        beta1, beta2, _log(beta1), _log(beta2), eps,
        PARAM=triton_type(params[0].dtype), GRAD=triton_type(grads[0].dtype),
        EXP_AVG=triton_type(m[0].dtype), EXP_AVG_SQ=triton_type(v[0].dtype),
        MASTER="exact" if lows else "stochastic" if stochastic else "none", AMSGRAD=amsgrad,
        MAXIMIZE=maximize, DECOUPLED=decoupled, CAUTIOUS=cautious, CAPTURABLE=launch.capturable,
        COUNTS=counts_itself, COLUMNS=len(columns), ACC=accumulator(params[0].dtype),
        CHUNK=CHUNK, TILES=_tiles(m[0].dtype), BLOCK=BLOCK, num_warps=_NUM_WARPS,
        **(_CODED if m[0].dtype == torch.int8 else {}),
    )  # fmt: skip
    for original, copy in copies:
        original.copy_(copy)
    torch.autograd.graph.increment_version(launch.columns.params)  # 0.04 µs each
    if counts_itself:
        launch.counts.advanced()
    else:
        launch.counts.advance(found_inf)


def _pointer(number: float | Tensor) -> Tensor | None:
    return number if isinstance(number, Tensor) else None


def _number(number: float | Tensor) -> float:
    return 0.0 if isinstance(number, Tensor) else number


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
