"""What this machine has: devices, cores, peak arithmetic, memory in use."""

import contextlib
import importlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tilewright_kernels import backend_report, check_environment, parse_backends, use_backend
from tilewright_train.errors import InputError

# Dense bf16 products with float32 accumulation, FLOP/s without sparsity, from NVIDIA's data
# sheets. A form factor with a lower clock has its own row, above the plain name.
_BF16_PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bB100\b", 1750e12),
    (r"\b(GH200|H200)\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H800)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
)


def choose_device(name: str | None) -> tuple[str, str]:
    """The kind of device to use and why.

    Args:
        name: «cpu», «cuda», «cuda:N», or None for the GPU where there is one.

    Raises:
        InputError: The device is not there; the message says what is.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        if count:
            return "cuda", f"{torch.cuda.get_device_name(0)} is there"
        return "cpu", "no CUDA device on this machine"
    there = "cpu" + "".join(f", cuda:{i}" for i in range(count))
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"device {name!r} is not supported: --device takes one of {there}")
    if name != "cpu" and int(match.group(1) or 0) >= count:
        raise InputError(f"device {name!r} is not there: --device takes one of {there}")
    return name, "asked for"


def choose_threads(local_processes: int) -> tuple[int, str]:
    """CPU threads for this process and why.

    Args:
        local_processes: Processes that share this host's cores.
    """
    if omp := os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads(), f"OMP_NUM_THREADS is {omp}"
    cores = available_cores()
    reason = f"{cores} cores" + (f", {local_processes} processes" if local_processes > 1 else "")
    return max(1, cores // local_processes), reason


@contextlib.contextmanager
def configured(
    *, threads: int, deterministic: bool, backend: str, device: str, tf32: bool = False
) -> Iterator[None]:
    """Threads, determinism and backends of a run; what was set before comes back afterwards.

    Args:
        threads: Of this process.
        deterministic: Only algorithms that give the same bits every time.
        tf32: Whether float32 products of GPUs read 10 bits of each mantissa.
        backend: As `backends` takes it.
        device: Where the run computes.

    Raises:
        ValueError: An unknown backend or operator, or Triton asked for where it cannot run.
    """
    former_threads = torch.get_num_threads()
    former_deterministic = torch.are_deterministic_algorithms_enabled()
    with backends(backend):
        _check_triton(device)
        try:
            torch.set_num_threads(threads)
            if deterministic:
                # cuBLAS reads this when its first handle is made.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            with _uninitialized_memory_as_it_is(), _tf32() if tf32 else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(former_threads)
            torch.use_deterministic_algorithms(former_deterministic)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 on the tensor cores, by the switch that torch and the kernels read."""
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


@contextlib.contextmanager
def _uninitialized_memory_as_it_is() -> Iterator[None]:
    """Deterministic mode would fill every new tensor, which costs a pass over memory for each.

    It helps to find reads of memory that nobody wrote; a run that makes none has the same bits.
    """
    module: Any = torch.utils.deterministic
    former = module.fill_uninitialized_memory
    module.fill_uninitialized_memory = False
    try:
        yield
    finally:
        module.fill_uninitialized_memory = former


def backends(text: str) -> use_backend:
    """Choose backends as TILEWRIGHT_BACKEND does: «triton», or «auto,rms_norm=torch».

    Raises:
        ValueError: An unknown backend or operator, here or in TILEWRIGHT_BACKEND.
    """
    parsed: Any = parse_backends(text)  # use_backend's literals are str here
    default, operators = parsed
    if operators or "=" in os.environ.get("TILEWRIGHT_BACKEND", ""):
        # An operator has a name once its package is imported. Else this waits: see `pretraining`.
        importlib.import_module("tilewright_optim")
        check_environment()
    return use_backend(default, **operators)


def _check_triton(device: str) -> None:
    """Triton was not asked for where it cannot run, by an option or the environment."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    asked = any(row.setting == "triton" for row in backend_report().values())
    if asked and device == "cpu" and not interpreted:
        raise InputError(
            "backend triton needs a CUDA device and this run is on the cpu: use --backend auto, or"
            " set TRITON_INTERPRET=1 to have the kernels interpreted, which is slow"
        )


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or «max»: no quota
        return cores


def peak_flops(device: torch.device, precision: str, tf32: bool = False) -> float | None:
    """Peak FLOP/s of the device for matrix products in `precision`, or None where not known.

    Products of 16 bits have one peak, those in tf32 half of it; without tf32 none is known.
    """
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return peak if peak is None or precision != "fp32" else peak / 2


def peak_of(name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that its driver gives it."""
    return next((peak for pattern, peak in _BF16_PEAKS if re.search(pattern, name)), None)


def supports_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 natively: compute capability 8.0 or more."""
    return device != "cpu" and torch.cuda.get_device_capability(device) >= (8, 0)


def peak_memory(device: torch.device) -> int:
    """Highest number of bytes in use so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(device: torch.device) -> str:
    """The device's name for people and records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
        match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else "CPU"
