"""Norm of many tensors in one launch, and their scaling in another, in Triton.

    norm = √Σ g²                    g ← g · min(1, max_norm / (norm + 10⁻⁶))

The first reads every element once. Programs walk chunks of the tables, each keeps a partial sum in
float32 (float64 for float64), and the last one to end adds the partial sums in a fixed order, so
the result repeats bit for bit. Dtypes may differ from tensor to tensor. The second reads and writes
nothing where the norm is within the limit, which the device alone knows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright_kernels.authoring import Operator, num_programs, tl, triton
from tilewright_optim._arguments import is_capturing
from tilewright_optim._tables import PointerTables, addresses, element, triton_type

CHUNK = 4096
"""Elements that a program loads at once: 32 a thread."""

_NUM_WARPS = 4
_PROGRAMS_PER_SM = 8

OPERATOR = Operator("clip_grad_norm_")

NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def clip_factor(norm, grad_scale, max_norm):
    """What gradients whose norm is norm / grad_scale are multiplied by; NaN of a norm that is."""
    limit = tl.full((), max_norm, tl.float64).to(norm.dtype)
    factor = limit / (norm / grad_scale + 1e-6)
    return tl.where(factor >= 1, 1.0, factor)


@triton.jit
def _squares(address, first, size, DTYPE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):
    """x² of a chunk; addresses are multiples of 16 in most tensors, and then loads are wide."""
    at = tl.arange(0, CHUNK)
    if (address | size) % 16 == 0:
        x_ptr = element(address, DTYPE, first, True)
        x = tl.load(x_ptr + at, mask=at < size // 16 * 16, other=0.0).to(ACC)
    else:
        x_ptr = element(address, DTYPE, first, False)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(ACC)
    return x * x


@triton.jit(do_not_specialize=["num_tensors", "num_chunks"])
def _norm_kernel(
    work_ptr, addresses_ptr, num_tensors, num_chunks, partial_ptr, count_ptr, norm_ptr,
    DTYPE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up chunks program_id(0), + num_programs(0), …; the columns are the dtypes' numbers.

    DTYPE is that of all tensors, or None if they differ.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((CHUNK,), ACC)
    for i in range(pid, num_chunks, programs):
        chunk = tl.load(work_ptr + 2 * num_tensors + i)
        tensor, first = chunk >> 32, (chunk & 0xFFFFFFFF) * CHUNK
        address = tl.load(addresses_ptr + tensor)
        size = tl.minimum(tl.load(work_ptr + num_tensors + tensor) - first, CHUNK)
        if DTYPE is not None:
            total += _squares(address, first, size, DTYPE, ACC, CHUNK)
        else:
            kind = tl.load(work_ptr + tensor)
            if kind == 0:
                total += _squares(address, first, size, tl.float32, ACC, CHUNK)
            elif kind == 1:
                total += _squares(address, first, size, tl.bfloat16, ACC, CHUNK)
            elif kind == 2:
                total += _squares(address, first, size, tl.float16, ACC, CHUNK)
            else:
                total += _squares(address, first, size, tl.float64, ACC, CHUNK)
    tl.store(partial_ptr + pid, tl.sum(total))
    # Releases the partial sum and acquires those of the programs before.
    if tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        at = tl.arange(0, BLOCK)
        partial = tl.load(partial_ptr + at, mask=at < programs, other=0.0, volatile=True)
        tl.store(norm_ptr, tl.sqrt(tl.sum(partial)))
        tl.store(count_ptr, 0)


@triton.jit
def _scale_chunk(
    address, first, size, factor, DTYPE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr
):
    at = tl.arange(0, CHUNK)
    if (address | size) % 16 == 0:
        x_ptr = element(address, DTYPE, first, True)
        x = tl.load(x_ptr + at, mask=at < size // 16 * 16).to(ACC)
        tl.store(x_ptr + at, x * factor, mask=at < size // 16 * 16)
    else:
        x_ptr = element(address, DTYPE, first, False)
        x = tl.load(x_ptr + at, mask=at < size).to(ACC)
        tl.store(x_ptr + at, x * factor, mask=at < size)


@triton.jit(do_not_specialize=["num_tensors"])
def _clip_kernel(
    work_ptr, addresses_ptr, num_tensors, norm_ptr,
    # pyrefly: ignore[not-a-type]
    max_norm: tl.float64,
    DTYPE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scale chunk program_id(0), if there is anything to scale."""
    factor = clip_factor(tl.load(norm_ptr), 1.0, max_norm).to(ACC)
    if factor == 1:
        return
    chunk = tl.load(work_ptr + 2 * num_tensors + tl.program_id(0))
    tensor, first = chunk >> 32, (chunk & 0xFFFFFFFF) * CHUNK
    address = tl.load(addresses_ptr + tensor)
    size = tl.minimum(tl.load(work_ptr + num_tensors + tensor) - first, CHUNK)
    if DTYPE is not None:
        _scale_chunk(address, first, size, factor, DTYPE, ACC, CHUNK)
    else:
        kind = tl.load(work_ptr + tensor)
        if kind == 0:
            _scale_chunk(address, first, size, factor, tl.float32, ACC, CHUNK)
        elif kind == 1:
            _scale_chunk(address, first, size, factor, tl.bfloat16, ACC, CHUNK)
        elif kind == 2:
            _scale_chunk(address, first, size, factor, tl.float16, ACC, CHUNK)
        else:
            _scale_chunk(address, first, size, factor, tl.float64, ACC, CHUNK)


class NormTables:
    """What norms of successive steps keep on one device; for one stream at a time.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._tables = PointerTables(device, CHUNK)
        self._device = device
        self._count: Tensor | None = None

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """√Σ x² over all elements, 0-d, float32, or float64 if all tensors are.

        Args:
            tensors: dense, on the device, of at least one element in all.
        """
        work, places, chunks, dtype = self._get(tensors)
        programs = min(chunks, num_programs(tensors[0].device, per_sm=_PROGRAMS_PER_SM))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        partial = torch.empty(programs + 1, dtype=wide, device=tensors[0].device)
        norm = partial[programs]
        OPERATOR.launch(
            _norm_kernel, (programs,), work, places, len(tensors), chunks, partial,
            self._counter(), norm, DTYPE=dtype and triton_type(dtype), ACC=triton_type(wide),
            CHUNK=CHUNK, BLOCK=next_power_of_2(programs), num_warps=_NUM_WARPS,
        )  # fmt: skip
        return norm

    def _counter(self) -> Tensor:
        """0 before and after each launch; of a graph's own, for graphs may be replayed at once."""
        if is_capturing(self._device):
            return torch.zeros((), dtype=torch.int32, device=self._device)
        if self._count is None:
            self._count = torch.zeros((), dtype=torch.int32, device=self._device)
        return self._count

    def clip(self, tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
        """Multiply the tensors, whose norm this is, by `clip_factor`."""
        work, places, chunks, dtype = self._get(tensors)
        OPERATOR.launch(
            _clip_kernel, (chunks,), work, places, len(tensors), norm, max_norm,
            DTYPE=dtype and triton_type(dtype), ACC=triton_type(norm.dtype), CHUNK=CHUNK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip

    def _get(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, int, torch.dtype | None]:
        """Both tables, the number of chunks, and the dtype if there is one."""
        dtypes = [tensor.dtype for tensor in tensors]
        columns = [list(map(NORM_DTYPES.index, dtypes))]
        sizes = list(map(Tensor.numel, tensors))
        tables = self._tables.get(columns, sizes, addresses(tensors))
        dtype = dtypes[0] if len(set(dtypes)) == 1 else None
        return tables.work, tables.grads, tables.num_chunks, dtype
