"""What GPUs can do, for plans: memory, arithmetic and bandwidth, and how much of that is reached.

Peaks are NVIDIA's data sheets', without sparsity. What is reached of them was measured on an H200
(docs/bars.md): 8192³ bf16 products at 680 of 989 TFLOP/s, copies at 4.28 of 4.8 TB/s; other GPUs
are taken to reach the same shares.
"""

import re
from dataclasses import dataclass

import torch

from tilewright_train.errors import InputError, suggest

REACHED_FLOPS = 0.69
"""Of the peak of matrix products."""
REACHED_BANDWIDTH = 0.89
"""Of the peak of memory."""
NVLINK, NETWORK = 330e9, 40e9
"""Bus bandwidth of a rank, bytes/s: an all-reduce of 1 GB measured on two H200; a 400 Gbit/s
network card for each GPU at four fifths of its rate."""

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of GPU."""

    name: str
    """As a person writes it."""
    memory: int
    """Bytes that a process can allocate."""
    bf16: float
    """Peak FLOP/s of bf16 and fp16 products with float32 sums."""
    fp32: float
    """Peak FLOP/s of float32 products in float32."""
    bandwidth: float
    """Peak bytes/s of its memory."""

    def peak(self, precision: str, tf32: bool) -> float:
        """Peak FLOP/s of products in a precision; tf32's is half of bf16's."""
        if precision == "fp32":
            return self.bf16 / 2 if tf32 else self.fp32
        return self.bf16


def _gpu(name: str, gib: float, bf16: float, fp32: float, bandwidth: float) -> Accelerator:
    return Accelerator(
        name=name,
        memory=round(gib * _GIB),
        bf16=bf16 * 1e12,
        fp32=fp32 * 1e12,
        bandwidth=bandwidth * 1e12,
    )


# Memory is what torch reports as total, in GiB; a form factor with a lower clock has its own row.
ACCELERATORS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200", 178, 2250, 80, 8.0),
        _gpu("H200", 139.8, 989, 67, 4.8),
        _gpu("H100 NVL", 93.1, 835, 60, 3.9),
        _gpu("H100 PCIe", 79.2, 756, 51, 2.0),
        _gpu("H100", 79.2, 989, 67, 3.35),
        _gpu("A100 40GB", 39.4, 312, 19.5, 1.56),
        _gpu("A100", 79.2, 312, 19.5, 2.0),
        _gpu("L40S", 44.4, 362, 91.6, 0.864),
        _gpu("L4", 22.0, 121, 30.3, 0.3),
        _gpu("A10", 22.1, 125, 31.2, 0.6),
    )
}


def accelerator(name: str) -> Accelerator:
    """The GPU of that name.

    Raises:
        InputError: It is in no row of the table.
    """
    for known, gpu in ACCELERATORS.items():
        if known.lower() == name.lower():
            return gpu
    raise InputError(
        f"gpu {name!r} is not known{suggest(name.upper(), ACCELERATORS)}: choose one of"
        f" {', '.join(ACCELERATORS)}"
    )


def accelerator_here(device: torch.device) -> Accelerator | None:
    """The GPU at hand with its own memory, or None for a CPU or a GPU in no row of the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    for known, gpu in ACCELERATORS.items():
        if all(re.search(rf"\b{word}\b", name) for word in known.split()):
            return Accelerator(
                name=name, memory=memory, bf16=gpu.bf16, fp32=gpu.fp32, bandwidth=gpu.bandwidth
            )
    return None
