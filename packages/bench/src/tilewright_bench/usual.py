"""What most benchmarks have alike: random inputs, and plain torch and its compiler as peers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewright_bench.case import Case, Function, Variant
from tilewright_bench.rows import OURS

LIGER_MAX_WIDTH = 65536
"""Elements of a row that Liger-Kernel's row operators take at most."""


def normal_inputs(
    *sizes: tuple[int, ...], dtype: torch.dtype
) -> Callable[[torch.device, torch.Generator], tuple[Tensor, ...]]:
    """For `Case.make_inputs`: normally distributed tensors of these sizes, all differentiated."""

    def make_inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        options = {"device": device, "dtype": dtype, "generator": generator}
        return tuple(torch.randn(size, **options).requires_grad_() for size in sizes)

    return make_inputs


def usual_providers(
    ours: Function, eager: Function, **others: Callable[[], Function]
) -> dict[str, Callable[[], Function]]:
    """Providers by name, for `variants`.

    Args:
        ours: tilewright's function.
        eager: the same in plain torch; compiled with static shapes it is a provider of its own.
        others: name and what builds its function.
    """
    return {
        OURS: lambda: ours,
        "torch": lambda: eager,
        "compile": lambda: torch.compile(eager, dynamic=False),
        **others,
    }


def skip_rows_that_liger_refuses(case: Case, variant: Variant) -> None:
    """Skip Liger-Kernel where the width, the last size of the shape, is beyond LIGER_MAX_WIDTH."""
    if variant.provider == "liger" and case.shape[-1] > LIGER_MAX_WIDTH:
        pytest.skip(f"Liger refuses rows wider than {LIGER_MAX_WIDTH}")
