"""column_sum: against float64 and itself."""

import pytest
import torch

from tilewright_kernels._column_sum import BLOCK_N, BLOCK_P, column_sum
from tilewright_kernels._operator import Operator
from tilewright_kernels.testing import check_deterministic, count_launches, poisoned_memory

OP = Operator("test_column_sum")


# One partial and one column; ragged in both; several steps along P and several programs.
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, BLOCK_N + 3), (2 * BLOCK_P + 1, 2 * BLOCK_N)], ids=str
)
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
def test_matches_float64(shape, accumulator, device):
    partial = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, accumulator)
    out = torch.full((shape[1],), torch.nan, dtype=accumulator, device=device)
    with count_launches() as launches:
        column_sum(OP, partial, out)
    expected = partial.double().sum(0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert launches["test_column_sum"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_rounded_once(dtype, device):
    # 2049 = 2048 + 1 is no float16 and no bfloat16: sums in either would stop at 2048 or 256.
    partial = torch.ones(4096, 2, device=device)
    out = torch.empty(2, dtype=dtype, device=device)
    column_sum(OP, partial, out)
    assert out.tolist() == [4096.0, 4096.0]


def test_bits_repeat(device):
    partial = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(device)

    def run():
        out = torch.empty(40, device=device)
        column_sum(OP, partial, out)
        return [out]

    with poisoned_memory():
        check_deterministic(run)
