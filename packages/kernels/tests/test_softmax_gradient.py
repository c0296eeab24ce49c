"""The row kernel of the linear losses alone: padding, extremes, precision where p rounds to 1."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import _softmax_gradient
from tilewright_kernels._operator import Operator
from tilewright_kernels._softmax_gradient import Loss, Tile, softmax_gradient, tile_for

OP = Operator("softmax_gradient_test")


@pytest.fixture
def small_tiles(monkeypatch):
    # Of 8 float32 columns: a row of 21 has two whole ones and a part.
    monkeypatch.setattr(_softmax_gradient, "UNROLL", 2)
    monkeypatch.setattr(_softmax_gradient, "LEAST_THREADS", 1)


def run(logits, target, factor=None):
    """Losses, and what the logits become."""
    x = logits.clone(memory_format=torch.preserve_format)
    losses = torch.full_like(target, torch.nan, dtype=torch.float32)
    softmax_gradient(OP, x, target, factor, losses, None, Loss(-100))
    return losses, x


def test_tiles():
    # Few rows at a time where they are walked twice, several rows where they are narrow.
    assert tile_for(131072, 2, 2) == Tile(1, 1024, 4, 8, 32)
    assert tile_for(131072, 2, 1) == Tile(1, 256, 4, 8, 8)
    assert tile_for(131072, 2, 2, capped=True) == Tile(1, 1024, 1, 8, 32)
    assert tile_for(32768, 2, 2) == Tile(1, 256, 4, 8, 8)
    assert tile_for(130, 4, 2) == Tile(8, 16, 4, 4, 4)
    assert tile_for(1, 8, 2) == Tile(128, 1, 1, 1, 4)
    for width, itemsize in product((1, 3, 100, 5000, 50257, 262144), (2, 4, 8)):
        tile = tile_for(width, itemsize, 2)
        columns = tile.LANES * tile.UNROLL * tile.VEC
        assert tile.num_warps == tile.ROWS * tile.LANES // 32
        assert tile.ROWS == 1 or columns >= width


@pytest.mark.parametrize("width", [1, 8, 21])
def test_without_a_factor_logits_stay(width, device, small_tiles):
    x = torch.randn(2, width, device=device)
    target = torch.tensor([0, width - 1], device=device)
    losses, after = run(x, target)
    assert torch.equal(x, after)
    torch.testing.assert_close(losses, F.cross_entropy(x, target, reduction="none"))


# What pads a row is neither read as a logit nor kept; the next row's logits are.
@pytest.mark.parametrize("width", [5, 21])
def test_padding_is_no_logit(width, device, small_tiles):
    workspace = torch.full((4, 24), torch.nan, device=device)
    workspace[:3, :width] = torch.randn(3, width, device=device)
    workspace[3] = 7.0
    x = workspace[:3, :width]
    before = x.clone().requires_grad_()
    target, losses = (
        torch.tensor([0, -100, width - 1], device=device),
        torch.empty(3, device=device),
    )
    factor = torch.tensor([1.0, 2.0, 3.0], device=device)
    softmax_gradient(OP, x, target, factor, losses, None, Loss(-100))
    expected = F.cross_entropy(before, target, reduction="none")
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(x, *torch.autograd.grad(expected, before, factor))
    assert (workspace[3] == 7.0).all()


# numpy's word for a lane that holds nothing but NaN; a GPU has none for it.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_extreme_logits(device):
    inf, nan = torch.inf, torch.nan
    rows = [  # target, then logits: far apart, masked classes, a masked target, and no answer
        (0, [1e4, -1e4, 0.0]),
        (1, [1e4, -1e4, 0.0]),
        (2, [1e4, 1e4, 1e4]),
        (0, [3e38, -3e38, 0.0]),
        (1, [-inf, 1.0, 2.0]),
        (1, [-inf, 1.0, -inf]),
        (0, [-inf, 1.0, 2.0]),
        (1, [inf, 1.0, 2.0]),
        (0, [inf, 1.0, 2.0]),
        (0, [-inf, -inf, -inf]),
        (0, [nan, 1.0, 2.0]),
        (2, [nan, 1.0, 2.0]),
    ]
    target = torch.tensor([y for y, _ in rows], device=device)
    x = torch.tensor([logits for _, logits in rows], device=device)
    losses, _ = run(x, target, torch.ones(len(rows), device=device))
    torchs = F.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(losses, torchs, equal_nan=True)


def test_ignored_rows_are_not_read(device, small_tiles):
    x = torch.full((2, 21), torch.nan, device=device)
    losses, dx = run(x, torch.tensor([-100, -100], device=device), torch.ones(2, device=device))
    assert (losses == 0).all()
    assert (dx == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_sure_predictions_keep_their_precision(offset, device, small_tiles):
    # Each other class has probability 1e-30: 1 - p of float32 arithmetic would be 0, and is not
    # to be one rounding off either. Float64 loses it too, so the others are summed alone.
    x = torch.full((9, 9), offset - 69.0, device=device)
    x.diagonal().fill_(offset)
    losses, dx = run(x, torch.arange(9, device=device), torch.ones(9, device=device))
    others = 8 * torch.exp(torch.tensor(-69.0, dtype=torch.float64)).item()
    assert abs(losses.double() / others - 1).max() < 1e-5
    assert abs(dx.diagonal().double() / -others - 1).max() < 1e-5
    assert abs(dx.double().sum(1) / others).max() < 1e-5
