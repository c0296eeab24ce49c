"""How operators are tested: oracles, grids of shapes and strides, and proof that a kernel ran.

The rule of accuracy: an operator's error against float64 is at most twice the error of the same
formula in plain torch and the same dtype, plus a floor of about one rounding. It scales by itself
with shape, dtype and conditioning, where a fixed tolerance is either loose or flaky.

Public, because tests of other packages (and of other people's operators) need the same things.
Nothing here imports pytest.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tilewright_kernels import _backend
from tilewright_kernels._backend import use_backend
from tilewright_kernels._triton import INTERPRETED

ROW_SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),  # the smallest there is
    (5, 7),  # odd in both, one partial tile
    (2, 3, 64),  # three dimensions, a power of two
    (33, 129),  # several tiles of rows, one past a power of two
    (0, 16),  # no rows
)
"""[..., N] shapes for operators that work along rows, one a regime."""

FLOATING: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Every dtype that kernels compute with."""

_EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATING}


def floor(dtype: torch.dtype) -> float:
    """Error allowed for free, relative to the largest value.

    Half an ulp for the result's own rounding and as much again for a different order of summation;
    8 units for float32 and float64, where the order is all there is. The interpreter truncates
    where the GPU rounds to bfloat16: a whole ulp more there.
    """
    if dtype in (torch.float32, torch.float64):
        return 8 * _EPS[dtype]
    return _EPS[dtype] * (2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0)


def assert_as_accurate(
    actual: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    *,
    scale: float = 0.0,
    what: str = "result",
) -> None:
    """Assert that actual's error is at most twice that of plain torch, plus the floor.

    Args:
        actual: from the kernel.
        same_dtype: the same formula in plain torch from the same inputs in the same dtype.
        oracle: the same formula from float64 copies of the inputs.
        scale: size of the terms that the result is a sum of, where they may cancel: the floor of
            float32 and float64 is relative to it or to the largest value, whichever is larger.
        what: name for the message.

    Raises:
        AssertionError: too large an error, a NaN that the oracle does not have, another shape or
            another dtype than same_dtype.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {actual.shape}, oracle {oracle.shape}"
    assert actual.dtype == same_dtype.dtype, f"{what}: {actual.dtype}, torch {same_dtype.dtype}"
    if oracle.numel() == 0:
        return
    finite = oracle.isfinite()
    assert torch.equal(actual.isnan(), oracle.isnan()), f"{what}: NaNs differ from the oracle's"
    infinite = oracle.isinf()
    assert torch.equal(actual.double()[infinite], oracle[infinite]), f"{what}: infinities differ"
    if not finite.any():
        return
    ours = (actual.double() - oracle)[finite].abs().max().item()
    torchs = (same_dtype.double() - oracle)[finite].abs().max().item()
    largest = oracle[finite].abs().max().item()
    if actual.dtype in (torch.float32, torch.float64):
        largest = max(largest, scale)
    allowed = 2 * torchs + floor(actual.dtype) * largest
    assert ours <= allowed, (
        f"{what}: error {ours:.3g} against float64, allowed {allowed:.3g} (torch: {torchs:.3g})"
    )


def check_against_float64(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Any],
    *,
    operator: str,
    seed: int = 20170706,
) -> None:
    """Check values and all gradients of an operator by the rule of accuracy, and that it launched.

    Args:
        function: the public function; runs with backend triton.
        reference: plain torch, for both the same-dtype and the float64 evaluation.
        inputs: arguments of both; floating tensors that require grad get their gradient checked,
            floating tensors are the ones widened for the oracle.
        operator: whose kernels must have been launched.
        seed: of the random output gradients; not the inputs' own, since a gradient parallel to its
            input is just what normalizations remove.
    """

    def evaluate(f: Callable[..., Any], args: Sequence[Any], grads: list[Tensor] | None) -> Any:
        out = f(*args)
        outs = [out] if isinstance(out, Tensor) else list(out)
        outs = [o for o in outs if o.is_floating_point()]
        wrt = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if grads is None:
            generator = torch.Generator().manual_seed(seed)
            grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
        given = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
        return outs, torch.autograd.grad(outs, wrt, given) if wrt else (), grads

    def copies(widen: bool) -> list[Any]:
        return [
            a.detach().to(torch.float64 if widen else a.dtype).requires_grad_(a.requires_grad)
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in inputs
        ]

    empty = any(isinstance(a, Tensor) and a.numel() == 0 for a in inputs)
    with use_backend("triton"), count_launches() as launches:
        # The inputs themselves: copies would lose their strides.
        outs, grads, grad_outputs = evaluate(function, inputs, None)
    assert empty or launches[operator] > 0, f"{operator} launched no kernel"
    same = evaluate(reference, copies(widen=False), grad_outputs)
    wide = evaluate(reference, copies(widen=True), grad_outputs)
    for i, triple in enumerate(zip(outs, same[0], wide[0], strict=True)):
        assert_as_accurate(*triple, what=f"{operator} output {i}")
    scale = max((g.abs().max().item() for g in grad_outputs if g.numel()), default=0.0)
    for i, triple in enumerate(zip(grads, same[1], wide[1], strict=True)):
        assert_as_accurate(*triple, scale=scale, what=f"{operator} gradient {i}")


def check_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    operator: str,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    fast_mode: bool = False,
) -> None:
    """torch.autograd.gradcheck in float64 with backend triton: the kernels against differences.

    Args:
        function: the public function.
        inputs: float64 tensors; those that require grad are checked.
        operator: whose kernels must have been launched.
        rtol: a hundred times tighter than torch's default; central differences in float64 are
            good to about 1e-9.
        atol: likewise.
        fast_mode: compare one random projection of the Jacobian instead of every entry.
    """
    with use_backend("triton"), count_launches() as launches:
        assert torch.autograd.gradcheck(
            function, tuple(inputs), rtol=rtol, atol=atol, fast_mode=fast_mode
        )
    assert launches[operator] > 0, f"{operator} launched no kernel"


def check_compiles(function: Callable[..., Any], inputs: Sequence[Any], *, operator: str) -> None:
    """Compile with fullgraph=True and check that values, gradients and launches are eager's."""

    def run(f: Callable[..., Any]) -> tuple[list[Tensor], Counter[str]]:
        wrt = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
        with use_backend("triton"), count_launches() as launches:
            out = f(*inputs)
            outs = [out] if isinstance(out, Tensor) else list(out)
            grads = torch.autograd.grad([o.float().square().sum() for o in outs], wrt)
        return [*outs, *grads], launches

    torch._dynamo.reset()
    # Whether the graph is whole and the operator opaque does not depend on code generation, which
    # takes seconds a test on a CPU; on a GPU the whole compiler runs.
    on_gpu = any(isinstance(a, Tensor) and a.is_cuda for a in inputs)
    backend = "inductor" if on_gpu else "aot_eager"
    compiled, compiled_launches = run(torch.compile(function, fullgraph=True, backend=backend))
    eager, eager_launches = run(function)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)
    assert compiled_launches[operator] == eager_launches[operator] > 0


def check_deterministic(function: Callable[[], Sequence[Tensor]], runs: int = 2) -> None:
    """Assert that repeated calls give the same bits."""
    first = [t.clone() for t in function()]
    for _ in range(runs - 1):
        for a, b in zip(first, function(), strict=True):
            assert torch.equal(a, b), f"bits differ in {(a != b).sum()} of {a.numel()} elements"


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """Count kernel launches per operator; the counter is filled when the block ends."""
    before = {name: done.launches for name, done in _backend._operators.items()}
    counts: Counter[str] = Counter()
    yield counts
    for name, done in _backend._operators.items():
        counts[name] = done.launches - before.get(name, 0)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN (integers: the largest value), so an element nobody wrote shows."""
    former = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(former[0], warn_only=former[1])


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raise where the block makes the host wait for the device; checks nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings():
        # Once a process, torch says that the mode is a prototype.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def randn(*shape: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Tensor:
    """Normal numbers that are the same on every device, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def layouts(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one shape, filled alike, in every memory layout that callers bring along."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)
    yield "contiguous", values.clone()
    yield "transposed", values.transpose(0, -1).contiguous().transpose(0, -1)
    padded = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype, device=device)
    padded[..., 1 : shape[-1] + 1] = values
    yield "slice of wider rows", padded[..., 1 : shape[-1] + 1]
    spread = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype, device=device)
    spread[..., ::2] = values
    yield "every second column", spread[..., ::2]
    yield "expanded rows", values[:1].expand(*shape)
