"""`run`: measure one variant of one case and hand the result to pytest-benchmark.

Inputs are rotated: enough sets are made that their traffic is several times the L2 cache, so that
no call finds its inputs there because the call before left them. A device-to-device copy that moves
the same number of bytes is timed in turns with the variant; its speed is the ceiling that the
share refers to, at this size, on this device, at this moment.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from tilewright_bench.case import Case, Direction, Function, Variant
from tilewright_bench.clock import replay
from tilewright_bench.environment import default_device
from tilewright_bench.timer import Call, Samples, time_interleaved
from tilewright_kernels import use_backend

L2_MULTIPLE = 4
MAX_INPUT_SETS = 256
"""Sets of inputs: as many as move L2_MULTIPLE times the L2's size, MAX_INPUT_SETS at most."""

GPU_SECONDS = 0.25
"""Device time spent on a variant, and as much on the copy beside it."""

CPU_PROVIDERS = ("tilewright", "torch")
CPU_SECONDS = 0.02
"""A CPU run only shows that the benchmarks work: no compilers, no GPU packages, little time."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `extra_info` of a saved benchmark holds, beside the times in `stats`.

    Attributes:
        operator: the case's operator.
        case: shape and dtype, as in the benchmark's name.
        direction: "fwd", "bwd" or "fwd+bwd".
        provider: whose code ran.
        device: "cuda" or "cpu".
        clock: what measured the times: "cuda events" or "perf_counter" (the host's clock).
        bytes: least traffic of one call.
        flops: least floating-point operations of one call.
        gb_per_s: bytes / median time, in 10⁹ bytes a second.
        tflop_per_s: flops / median time, in 10¹² a second.
        copy_gb_per_s: the same for a copy that moves as many bytes, timed in the same seconds.
        share_of_copy: gb_per_s / copy_gb_per_s.
        host_us: microseconds until a call returns on the host (median); on a GPU the device works
            on meanwhile.
        peak_extra_bytes: device memory that one call needs beyond its inputs (and, backward, beyond
            what forward saved): results and temporaries together. None on a CPU.
        error: ‖result − float64 result‖ / ‖float64 result‖, the largest over results or gradients.
        input_sets: sets of inputs that calls rotated among.
    """

    operator: str
    case: str
    direction: Direction
    provider: str
    device: str
    clock: str
    bytes: int
    flops: int
    gb_per_s: float
    tflop_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    host_us: float
    peak_extra_bytes: int | None
    error: float
    input_sets: int


def run(benchmark: BenchmarkFixture, case: Case, variant: Variant) -> None:
    """Measure a variant of a case on the device at hand; the body of every bench_ function.

    The benchmark's statistics become device times, its `extra_info` a `Measurement`, its group the
    operator, case and direction, so that the providers of one case share a table. Under
    --benchmark-disable the variant runs once and is only compared with float64. A result that is
    wrong fails the benchmark in either case.

    Args:
        benchmark: pytest-benchmark's fixture.
        case: what to measure.
        variant: whose code, in which direction. Other providers than CPU_PROVIDERS are skipped on
            a CPU. tilewright runs its Triton kernels on a GPU and fails where it cannot.
    """
    device = default_device()
    if device.type == "cpu" and variant.provider not in CPU_PROVIDERS:
        pytest.skip(f"{variant.provider}: compared on a GPU only")
    function = variant.build()
    benchmark.group = f"{case.operator} {case} {variant.direction}"
    # Plain values: the parameters themselves would be saved as unreadable representations.
    benchmark.params = {
        "case": str(case),
        "direction": variant.direction,
        "provider": variant.provider,
    }
    backend = "triton" if device.type == "cuda" else "torch"
    with use_backend(backend), fresh_compilers(device, variant.direction):
        error = relative_error(function, case, variant.direction, device)
        if not error <= error_limit(case.dtype):
            pytest.fail(
                f"{variant} of {case.operator} {case}: error {error:.2g} against float64, more "
                f"than {error_limit(case.dtype):.2g}; the time of a wrong result means nothing"
            )
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)  # or pytest-benchmark warns of an unused fixture
            return
        measurement, samples = _measure(function, case, variant, device, error)
    benchmark.extra_info.update(dataclasses.asdict(measurement))
    replay(benchmark, samples.seconds)


def _measure(
    function: Function, case: Case, variant: Variant, device: torch.device, error: float
) -> tuple[Measurement, Samples]:
    work = case.work(variant.direction)
    sets = input_sets(work.bytes, device)
    calls = [
        directed(function, case.inputs(device, seed), variant.direction) for seed in range(sets)
    ]
    calls[0]()  # compiles and tunes, so that neither shows in the memory
    memory = peak_extra_bytes(calls[0], device)
    ours, copy = time_interleaved(
        [rotating(calls), rotating(copies(work.bytes, sets, device))],
        device,
        seconds=GPU_SECONDS if device.type == "cuda" else CPU_SECONDS,
    )
    return Measurement(
        operator=case.operator,
        case=str(case),
        direction=variant.direction,
        provider=variant.provider,
        device=device.type,
        clock=ours.clock,
        bytes=work.bytes,
        flops=work.flops,
        gb_per_s=work.bytes / ours.median / 1e9,
        tflop_per_s=work.flops / ours.median / 1e12,
        copy_gb_per_s=work.bytes / copy.median / 1e9,
        share_of_copy=copy.median / ours.median,
        host_us=ours.host_median * 1e6,
        peak_extra_bytes=memory,
        error=error,
        input_sets=sets,
    ), ours


def directed(function: Function, inputs: tuple[Any, ...], direction: Direction) -> Call:
    """A call without arguments that runs one direction on one set of inputs.

    Returns the results (fwd) or the gradients (bwd, fwd+bwd) of all inputs that require grad. For
    "bwd" the forward runs here, once, and its graph is kept.
    """
    if direction == "fwd":
        return lambda: function(*inputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not wanted:
        raise ValueError(f"no input requires grad, so there is no {direction} to time")
    results = _tensors(function(*inputs))
    grads = [_output_gradient(t) for t in results]
    if direction == "bwd":
        return lambda: torch.autograd.grad(results, wanted, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_tensors(function(*inputs)), wanted, grads)


def relative_error(
    function: Function, case: Case, direction: Direction, device: torch.device
) -> float:
    """‖ours − float64‖ / ‖float64‖, the largest over results (fwd) or gradients (else).

    NaN where a result holds one.
    """
    inputs = case.inputs(device, seed=0)
    wide = tuple(
        t.detach().double().requires_grad_(t.requires_grad)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in inputs
    )
    ours = _evaluate(function, inputs, direction)
    expected = _evaluate(case.reference, wide, direction)
    tiny = torch.finfo(torch.float64).tiny
    errors = [
        (a.double() - b).norm() / b.norm().clamp_min(tiny)
        for a, b in zip(ours, expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def error_limit(dtype: torch.dtype) -> float:
    """Largest relative error of a result that counts as right, TF32 products included."""
    return max(4 * torch.finfo(dtype).eps, 1e-3)


def input_sets(traffic: int, device: torch.device) -> int:
    """Sets of inputs to rotate among, so that their traffic [bytes] exceeds the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(1, math.ceil(L2_MULTIPLE * cache / traffic)), MAX_INPUT_SETS)


def rotating(calls: Iterable[Call]) -> Call:
    """One call that runs the given ones in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copies(traffic: int, sets: int, device: torch.device) -> list[Call]:
    """`sets` copies of random bytes, each of which moves `traffic` bytes, read and written."""
    generator = torch.Generator(device).manual_seed(0)
    size = max(1, traffic // 2)

    def copy() -> Call:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        source.random_(generator=generator)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy() for _ in range(sets)]


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call needs beyond what is held before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def fresh_compilers(device: torch.device, direction: Direction) -> Iterator[None]:
    """torch.compile with an empty cache, for backwards that run more than once; unused on a CPU."""
    if device.type != "cuda":
        yield
        return
    # Each shape is compiled on its own: no limit of recompilations, no shapes made dynamic.
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    # Compiled backwards take saved tensors as scratch unless told that the graph is kept.
    with torch._functorch.config.patch(donated_buffer=direction != "bwd"):
        yield


def _evaluate(
    function: Function, inputs: tuple[Any, ...], direction: Direction
) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in _tensors(directed(function, inputs, direction)()))


def _tensors(outcome: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outcome,) if isinstance(outcome, Tensor) else tuple(outcome)


def _output_gradient(result: Tensor) -> Tensor:
    """1 for a loss, as loss.backward() passes; else random, the same values in every dtype."""
    if result.dim() == 0:
        return torch.ones_like(result)
    generator = torch.Generator(result.device).manual_seed(1)
    # Drawn in bfloat16, which every dtype holds exactly: the float64 oracle gets the same values.
    values = torch.randn(
        result.shape, generator=generator, device=result.device, dtype=torch.bfloat16
    )
    return values.to(result.dtype)
