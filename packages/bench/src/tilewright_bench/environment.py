"""Where a run was made: the device, its driver and the versions, as saved runs record them."""

import platform
import shutil
import subprocess
from importlib import metadata
from typing import TypeVar

import torch

T = TypeVar("T")

PACKAGES = ("torch", "triton", "tilewright-kernels", "liger-kernel")
"""Distributions whose versions a figure may depend on."""

CPU_NOTE = "no CUDA device: tiny shapes on the host's clock; these figures say nothing about a GPU"


def default_device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_device(*, gpu: T, cpu: T) -> T:
    """The value for the device at hand: shapes that fill a GPU, or tiny ones for a CPU."""
    return gpu if torch.cuda.is_available() else cpu


def describe() -> dict[str, str | int | None]:
    """Device, driver and versions for pytest-benchmark's machine_info.

    Keys: gpu (None on a CPU), gpu_count, driver, cuda, python, and one for each of PACKAGES
    (None where it is not installed).
    """
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_count": torch.cuda.device_count(),
        "driver": _driver_version() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(distribution: str) -> str | None:
    if distribution == "torch":
        return torch.__version__  # with the local part (+cu130), which the metadata may lack
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """The NVIDIA driver's version; torch knows only the CUDA version that the driver supports."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0].strip() if answer.stdout.strip() else None
