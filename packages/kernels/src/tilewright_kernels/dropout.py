"""Dropout without a stored mask (Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html).

    y = m · x / (1 - p)          m = 1 with probability 1 - p, else 0, for each element
    dx = m · dy / (1 - p)

m is a function of a seed and of the element's place alone, so backward computes it anew: the same
kernel, applied to dy. Element i takes word i mod 4 of Philox4x32-10 (Salmon et al. 2011,
doi:10.1145/2063384.2063405) at counter i div 4 under the seed as its key, and is kept where that
word, of 32 random bits, is below K = round((1 - p) · 2³²). The scale is 2³² / K: for the
probability that K makes of p, the expectation of y is x.

Forward and backward each read one tensor and write one. `dropout_add` adds a residual in the same
pass: two reads, one write; its backward is that of dropout, and dy itself for the residual.
"""

from operator import index
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels._elementwise import as_walked, load, store, tiles
from tilewright_kernels._launch import cdiv
from tilewright_kernels._operator import Operator, accumulator, check_floating, check_same_device
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.activations import check_not_inplace

_DROPOUT, _DROPOUT_ADD = Operator("dropout"), Operator("dropout_add")

_CPU = torch.device("cpu")

BLOCK = 2048
"""Elements of a program."""

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox_reference(seed: Tensor, counters: Tensor) -> Tensor:
    """Philox4x32-10 in plain torch.

    Args:
        seed: 0-d int64, whose 64 bits are the key.
        counters: [N] int64, not negative.

    Returns:
        [N, 4] int64: four words of 32 random bits a counter.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = counters & _WORD, counters >> 32
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(_ROUNDS):
        # int64 products of 32-bit words wrap where uint64 would not, and hold the same bits.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (b >> 32 & _WORD) ^ c1 ^ k0, (a >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_reference(
    input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """The definition in plain torch, bit for bit the kernel's mask; arguments as `dropout`."""
    _check_seed(seed, input)
    if not training or _keeps_all(p):
        return input
    seed, kept = _as_seed(seed, input).to(input.device), kept_words(p)
    counters = torch.arange(cdiv(input.numel(), 4), device=input.device)
    words = philox_reference(seed, counters).view(-1)[: input.numel()].view(input.shape)
    x = input if input.dtype == torch.float64 else input.float()
    return (x * (words < kept) * _scale(kept)).to(input.dtype).contiguous()


def dropout_add_reference(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The definition in plain torch; arguments as `dropout_add`."""
    x = input if input.dtype == torch.float64 else input.float()
    return (dropout_reference(x, p, training, seed=seed) + residual).to(input.dtype).contiguous()


def kept_words(p: float) -> int:
    """How many of 2³² equally likely words keep an element."""
    return round((1 - p) * 2**32)


def _keeps_all(p: float) -> bool:
    return kept_words(p) == 2**32


def _scale(kept: int) -> float:
    return 2**32 / max(kept, 1)


@triton.jit
def philox(seed, counter):
    """Four words of 32 random bits for each uint64 counter: Philox4x32-10 with the seed as key.

    `tl.randint4x` gives the same words, but takes two multiplications for the halves of a product:
    dropout runs at 0.94 of the copy speed with it, at 0.98 with this (H200, bfloat16).
    """
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["seed", "kept"])
def _dropout_kernel(
    x_ptr, residual_ptr, y_ptr,
    seed_ptr, seed: tl.uint64, kept,  # pyrefly: ignore[not-a-type]
    x_row_stride, residual_row_stride, num_rows, n_cols,
    ACC: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = m · x / (1 - p) [+ residual] for a tile of ROWS x BLOCK_N, a counter every four columns.

    Where n_cols is no multiple of four, rows start within a counter: their tiles are aligned to the
    counters, and the first begins up to three columns before the row.
    """
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if FLAT:
        tile_row, tile_col = tl.program_id(0) * 0, tl.program_id(0)
    else:
        col_tiles = tl.cdiv(n_cols + 3 * (n_cols % 4 != 0), BLOCK_N)
        tile_row, tile_col = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    rows = (tile_row.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    start = tile_col.to(tl.int64) * BLOCK_N
    row_counter = rows * n_cols // 4
    counters = row_counter + (start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    before = rows * n_cols - 4 * row_counter
    cols = start + tl.arange(0, BLOCK_N)[None, :] - before
    mask = (rows < num_rows) & (cols >= 0) & (cols < n_cols)
    full = ((tile_row + 1) * ROWS <= num_rows) & (start + BLOCK_N <= n_cols)
    if not FLAT:
        full &= n_cols % 4 == 0

    x = load(x_ptr + rows * x_row_stride + cols, mask, full)
    w0, w1, w2, w3 = philox(seed, counters.to(tl.uint64))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, BLOCK_N)
    kept = kept.to(tl.uint32)
    scale = 4294967296.0 / tl.maximum(kept, 1).to(ACC)
    y = x.to(ACC) * tl.where(words < kept, scale, 0.0)
    if residual_ptr is not None:
        residual = load(residual_ptr + rows * residual_row_stride + cols, mask, full)
        y += residual.to(ACC)
    store(y_ptr + rows * n_cols + cols, y, mask, full)


def _launch(
    operator: Operator, x: Tensor, residual: Tensor | None, seed: Tensor, kept: int
) -> Tensor:
    """A new tensor from the kernel. A seed on the host is passed as a number: nothing waits."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    if residual is None:
        (x,) = as_walked(x)
    else:
        x, residual = as_walked(x, residual)
    num_rows, n_cols = x.shape
    before = 0 if num_rows == 1 or n_cols % 4 == 0 else 3
    # 32 elements a thread where x is large: 1.01 of the copy speed on an H200, bfloat16; with 16:
    # 0.98, with 8: 0.86.
    grid, tile = tiles(num_rows, max(4, before + n_cols), elements=BLOCK, elements_per_thread=16)
    operator.launch(
        _dropout_kernel, grid, x, residual, y,
        seed if seed.is_cuda else None, 0 if seed.is_cuda else int(seed) % 2**64, kept,
        x.stride(0), 0 if residual is None else residual.stride(0), num_rows, n_cols,
        ACC=accumulator(x.dtype), **tile._asdict(),
    )  # fmt: skip
    return y


def _fake(x: Tensor, seed: Tensor, kept: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, seed, ctx.kept = inputs
    ctx.save_for_backward(seed)


def _grads(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return dropout_forward(dy, *ctx.saved_tensors, ctx.kept), None, None


@_DROPOUT.function(fake=_fake, setup_context=_save, backward=_grads)
def dropout_forward(x: Tensor, seed: Tensor, kept: int) -> Tensor:
    """Launch y = m · x / (1 - p), which is also its own backward."""
    return _launch(_DROPOUT, x, None, seed, kept)


@_DROPOUT_ADD.function(fake=_fake)
def dropout_add_backward(dy: Tensor, seed: Tensor, kept: int) -> Tensor:
    """Launch the gradient of input; that of residual is dy."""
    return _launch(_DROPOUT_ADD, dy, None, seed, kept)


def _add_fake(x: Tensor, residual: Tensor, seed: Tensor, kept: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_grads(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
    dx = None
    if ctx.needs_input_grad[0]:
        dx = dropout_add_backward(dy, *ctx.saved_tensors, ctx.kept)
    return dx, dy, None, None


@_DROPOUT_ADD.function(fake=_add_fake, setup_context=_save, backward=_add_grads)
def dropout_add_forward(x: Tensor, residual: Tensor, seed: Tensor, kept: int) -> Tensor:
    """Launch y = m · x / (1 - p) + residual."""
    return _launch(_DROPOUT_ADD, x, residual, seed, kept)


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    One seed gives one mask, whatever the device, the backend, the strides or the launch; elements
    count in the order of the shape. Nothing but the seed is kept for backward.

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.
        p: probability of a zero; 2⁻³³ and below drop nothing.
        training: without it, or where p drops nothing, input itself is the result.
        seed: the mask's, or None to draw one from torch's default generator, so that
            torch.manual_seed makes it reproducible: from the CPU's, at no cost for the device; from
            the device's under torch.compile and in a CUDA graph, so that each replay draws anew. A
            0-d int64 tensor on input's device is read by the kernel: change it between replays.

    Returns:
        Like input, contiguous unless it is input itself. Differentiable once.

    Raises:
        ValueError: p is no probability, seed does not fit in 64 bits or is not such a tensor.
        TypeError: input is not floating point, seed is neither an integer nor a tensor.
    """
    check_floating("input", input)
    check_probability(p)
    _check_seed(seed, input)
    if not training or _keeps_all(p):
        return input
    seed = _as_seed(seed, input)
    if not _DROPOUT.uses_triton(input):
        return dropout_reference(input, p, seed=seed)
    return dropout_forward(input, seed, kept_words(p))


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """dropout(input) + residual in one pass, as at the end of a transformer's block.

    Args:
        input: any shape, in float16, bfloat16, float32 or float64.
        residual: of input's shape and dtype.
        p: as for `dropout`, which masks input alone.
        training: without it, or where p drops nothing, the result is input + residual.
        seed: as for `dropout`.

    Returns:
        Like input, contiguous. Differentiable once.

    Raises:
        ValueError: shapes that differ, tensors on different devices; or as for `dropout`.
        TypeError: dtypes that differ or are not floating point; or as for `dropout`.
    """
    check_floating("input", input)
    check_probability(p)
    _check_residual(input, residual)
    _check_seed(seed, input)
    if not training or _keeps_all(p):
        return (input + residual).contiguous()
    seed = _as_seed(seed, input)
    if not _DROPOUT_ADD.uses_triton(input):
        return dropout_add_reference(input, residual, p, seed=seed)
    return dropout_add_forward(input, residual, seed, kept_words(p))


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` with `dropout` inside: same arguments, but never in place."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_not_inplace(inplace)
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same; in training, with a new mask at each call."""
        return dropout(input, self.p, self.training)


def _as_seed(seed: int | Tensor | None, input: Tensor) -> Tensor:
    """The seed as a 0-d int64 tensor, on the CPU or on input's device."""
    if seed is None:
        recorded = torch.compiler.is_compiling() or (
            input.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        return torch.randint(2**63 - 1, (), device=input.device if recorded else "cpu")
    return seed if isinstance(seed, Tensor) else torch.tensor(index(seed), device="cpu")


def _check_seed(seed: int | Tensor | None, input: Tensor) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seed is {seed!r}; give an integer, a 0-d int64 tensor or None")
        if not -(2**63) <= index(seed) < 2**63:
            raise ValueError(f"seed is {seed}; it must fit in 64 bits, for example seed % 2**63")
    elif seed.dtype != torch.int64 or seed.dim() > 0 or seed.device not in (_CPU, input.device):
        raise ValueError(
            f"seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; it must be 0-d "
            f"int64 on {input.device}, as from torch.tensor(0, device={str(input.device)!r})"
        )


def check_probability(p: float) -> None:
    """Raise unless p is between 0 and 1."""
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it is the probability of a zero, between 0 and 1")


def _check_residual(input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and residual {tuple(residual.shape)}; they must "
            f"be equal, for example residual.expand_as(input)"
        )
    if residual.dtype != input.dtype:
        raise TypeError(
            f"input is {input.dtype} and residual {residual.dtype}; they must be equal, for "
            f"example residual.to({input.dtype})"
        )
    check_same_device(input=input, residual=residual)
