"""Buckets as memory: every dtype and memory order keeps its shape in them."""

from typing import Any

import torch
from torch import nn

from tilewright_dist import DistributedDataParallel
from tilewright_dist.testing import run_ranks

TINY_MB = 1e-6  # below every tensor: one bucket each


def odd_parameters(rank):
    """Average of mixed dtypes and memory orders, a scalar and an empty tensor."""
    module: Any = nn.Module()
    module.image = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    module.transposed = nn.Parameter(torch.zeros(3, 2).t())
    module.sixteen_bits = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    module.scalar = nn.Parameter(torch.zeros((), dtype=torch.float64))
    module.empty = nn.Parameter(torch.zeros(0, 2))
    module.complex = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    wrapper = DistributedDataParallel(module, bucket_cap_mb=TINY_MB)
    for _ in range(2):
        wrapper.zero_grad()
        loss = (module.complex.real * (rank + 1)).sum()
        for parameter in module.parameters():
            if not parameter.is_complex():
                factors = torch.arange(parameter.numel()).view(parameter.shape) + rank
                loss = loss + (parameter * factors).sum().float()
        loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert gradients["image"].is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad.stride() == p.stride() for p in module.parameters())
    return gradients


def test_dtypes_and_memory_orders():
    for gradients in run_ranks(odd_parameters):
        for name, gradient in gradients.items():
            expected = torch.arange(gradient.numel()).view(gradient.shape) + 0.5
            if name == "complex":
                expected = torch.full((3,), 1.5, dtype=torch.complex64)
            assert torch.equal(gradient, expected.to(gradient.dtype)), name
