"""The sum of a vector, rung by rung: how many programs, and how they add up what each has found.

    sum_one_program    1 program                    131 of 132 multiprocessors look on
    sum_atomic         n / BLOCK programs           each adds its sum to one cell, in any order
    sum_tree           n / BLOCK, then fewer, … 1   each leaves its sum to the next launch
    sum_persistent     a few on each SM, then 1     each walks many blocks before it adds up

Floating-point addition is not associative, so an order of additions that changes from run to run
changes the last bits: `sum_atomic` does that, the others give the same bits every time (on one kind
of GPU: the number of programs of `sum_persistent` is a multiple of its multiprocessors).

All read n elements once. The gradient is dy everywhere: an expanded view, which moves nothing.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._launch import cdiv, num_programs
from tilewright_kernels._operator import Operator, accumulator, check_floating
from tilewright_kernels._triton import tl, triton

BLOCK, NUM_WARPS = 4096, 4
"""Elements that a program adds at once, 32 a thread: several loads of 16 bytes in flight each."""

PROGRAMS_PER_SM = 8
"""Of `sum_persistent`: as many as there is room for, at 64 registers a thread."""

_ONE_PROGRAM = Operator("sum_one_program")
_ATOMIC = Operator("sum_atomic")
_TREE = Operator("sum_tree")
_PERSISTENT = Operator("sum_persistent")


def sum_reference(x: Tensor) -> Tensor:
    """The definition in plain torch."""
    return x.sum()


@triton.jit
def _partial_sums_kernel(x_ptr, partial_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """partial[p] = the sum of every P-th block, from the p-th on, of P programs.

    With one program that is the sum; with one a block there is one turn of the loop.
    """
    # BLOCK sums side by side, each in a register: threads need not speak to each other until the
    # loop has ended, and lanes past the end add zeros.
    totals = tl.zeros([BLOCK], dtype=ACC)
    first = tl.program_id(0).to(tl.int64)
    for block in range(first, tl.cdiv(n, BLOCK), tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        totals += tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(ACC)
    # In a thread, then between the threads of a warp by shuffles, then between warps through
    # shared memory: always in the same order.
    tl.store(partial_ptr + tl.program_id(0), tl.sum(totals, axis=0))


@triton.jit
def _sum_atomic_kernel(x_ptr, total_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """total += the sum of one block."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(ACC)
    # Done by the L2 cache, where the cell lies. No program waits for it, but all of them queue
    # for one cell, and it is served one by one.
    tl.atomic_add(total_ptr, tl.sum(x, axis=0), sem="relaxed")


def _partial_sums(operator: Operator, x: Tensor, programs: int, dtype: torch.dtype) -> Tensor:
    """One sum a program: in `dtype` if it is the only one, else in the accumulation type."""
    partial_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(programs, dtype=dtype if programs == 1 else partial_dtype)
    operator.launch(
        _partial_sums_kernel, (programs,), x, partial, x.numel(),
        ACC=accumulator(x.dtype), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return partial


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _grad(ctx: Any, dy: Tensor) -> Tensor:
    return dy.expand(ctx.shape)


@_ONE_PROGRAM.function(fake=_fake, setup_context=_save, backward=_grad)
def sum_one_program_forward(x: Tensor) -> Tensor:
    """Launch a single program."""
    return _partial_sums(_ONE_PROGRAM, x.contiguous(), 1, x.dtype).view(())


@_ATOMIC.function(fake=_fake, setup_context=_save, backward=_grad)
def sum_atomic_forward(x: Tensor) -> Tensor:
    """Launch one program a block; the cell must be zero before."""
    _alert_not_deterministic()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.new_zeros((), dtype=dtype)
    _ATOMIC.launch(
        _sum_atomic_kernel, (cdiv(x.numel(), BLOCK),), x.contiguous(), total, x.numel(),
        ACC=accumulator(x.dtype), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return total.to(x.dtype)


@_TREE.function(fake=_fake, setup_context=_save, backward=_grad)
def sum_tree_forward(x: Tensor) -> Tensor:
    """Launch one program a block, and again over the sums, until one is left: log n launches."""
    sums, programs = x.contiguous(), 0
    while programs != 1:
        programs = max(1, cdiv(sums.numel(), BLOCK))
        sums = _partial_sums(_TREE, sums, programs, x.dtype)
    return sums.view(())


@_PERSISTENT.function(fake=_fake, setup_context=_save, backward=_grad)
def sum_persistent_forward(x: Tensor) -> Tensor:
    """Launch as many programs as fit on the device at once, then one over their sums."""
    programs = num_programs(x.device, per_sm=PROGRAMS_PER_SM)
    programs = max(1, min(cdiv(x.numel(), BLOCK), programs))
    sums = _partial_sums(_PERSISTENT, x.contiguous(), programs, x.dtype)
    if programs > 1:
        sums = _partial_sums(_PERSISTENT, sums, 1, x.dtype)
    return sums.view(())


def sum_one_program(x: Tensor) -> Tensor:
    """The sum of all elements, by one program.

    Args:
        x: of any shape, in float16, bfloat16, float32 or float64; contiguous, or copied to be so.

    Returns:
        A scalar of x's dtype, added up in float32 (float64 for float64). Differentiable once.
    """
    check_floating("x", x)
    return sum_one_program_forward(x) if _ONE_PROGRAM.uses_triton(x) else sum_reference(x)


def sum_atomic(x: Tensor) -> Tensor:
    """The sum of all elements, by atomic additions. Not deterministic: they come in any order.

    Raises:
        RuntimeError: torch.use_deterministic_algorithms is on; with warn_only it is a warning.
    """
    check_floating("x", x)
    return sum_atomic_forward(x) if _ATOMIC.uses_triton(x) else sum_reference(x)


def sum_tree(x: Tensor) -> Tensor:
    """The sum of all elements, by sums of sums, one launch a level; deterministic."""
    check_floating("x", x)
    return sum_tree_forward(x) if _TREE.uses_triton(x) else sum_reference(x)


def sum_persistent(x: Tensor) -> Tensor:
    """The sum of all elements, by programs that each walk many blocks; deterministic."""
    check_floating("x", x)
    return sum_persistent_forward(x) if _PERSISTENT.uses_triton(x) else sum_reference(x)


def _alert_not_deterministic() -> None:
    """What torch's own atomic sums do where the user has asked for determinism."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = "sum_atomic is not deterministic; sum_tree and sum_persistent are"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=3)
