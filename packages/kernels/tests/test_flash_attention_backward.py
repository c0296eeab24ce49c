"""The backward of attention alone: both modes of the portable kernels, against float64."""

import pytest
import torch

from tilewright_kernels._triton import INTERPRETED
from tilewright_kernels.flash_attention import backward
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.testing import (
    MASKS,
    check,
    check_neighbours,
    gradients,
    make,
    make_packed,
    oracle,
)
from tilewright_kernels.testing import FLOATING, check_deterministic

# The interpreter multiplies the bits of bfloat16.
DOT_DTYPES = tuple(d for d in FLOATING if not (INTERPRETED and d == torch.bfloat16))
LENGTHS = (
    (1, 1),  # the smallest there is
    (1, 40),  # one query, several blocks of keys
    (39, 1),  # the other way round
    (33, 50),  # several partial blocks of both
    (48, 48),  # whole blocks
)
SEQUENCES = ((18, 33), (0, 5), (17, 0), (1, 1), (0, 0), (17, 34))


@pytest.fixture(params=[True, False], ids=["deterministic", "atomic"])
def deterministic(request, monkeypatch):
    monkeypatch.setattr(backward, "ADDS_PAY", {2: True, 4: True, 8: True})
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    # Several blocks of both in short sequences, a query block that is not a key block.
    tiles = {"all": (16, 32), "keys": (16, 32), "queries": (32, 16)}
    by_size = {
        kernel: {size: {256: backward.Tile(*tile, 2, 4)} for size in (2, 4, 8)}
        for kernel, tile in tiles.items()
    }
    monkeypatch.setattr(backward, "TILES", by_size)
    backward.tile_for.cache_clear()
    yield
    backward.tile_for.cache_clear()


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    # Kernels are compiled for each: all lengths in the type that has descriptors, then all types.
    [(n, torch.float16) for n in LENGTHS] + [((33, 50), d) for d in DOT_DTYPES[1:]],
    ids=str,
)
def test_matches_float64(lengths, dtype, deterministic, small_tiles, device):
    check(make(lengths, dtype=dtype, device=device, mask=MASKS["causal"]), deterministic)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", [(33, 50), (70, 37)], ids=str)
def test_masks(lengths, mask, deterministic, small_tiles, device):
    problem = make(lengths, (1, 1), dtype=torch.float16, device=device, batch=1, mask=mask)
    check(problem, deterministic)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=["grouped", "multi-query"])
def test_several_query_heads_share_a_key_head(heads, deterministic, small_tiles, device):
    problem = make((33, 50), heads, dtype=torch.float32, device=device, mask=MASKS["causal"])
    check(problem, deterministic)


@pytest.mark.parametrize(
    "widths",
    # Descriptors that fill columns up; no descriptors (rows of 40 bytes); v wider and narrower.
    [(24, 24), (20, 20), (16, 40), (40, 16)],
    ids=str,
)
def test_head_dimensions(widths, deterministic, small_tiles, device):
    problem = make((20, 35), (2, 1), widths, torch.float16, device, mask=MASKS["causal"])
    check(problem, deterministic)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_softcap(mask, deterministic, small_tiles, device):
    problem = make((33, 40), dtype=torch.float64, device=device, mask=MASKS[mask], softcap=0.8)
    check(problem, deterministic)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_dropout(packed, deterministic, small_tiles, device):
    options = {"dtype": torch.float32, "device": device, "mask": MASKS["causal"], "dropout_p": 0.3}
    problem = make_packed(((5, 33), (20, 40)), **options) if packed else make((33, 40), **options)
    check(problem, deterministic)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_sums_in_pieces(dropout_p, packed, deterministic, small_tiles, monkeypatch, device):
    tile = backward.Tile(32, 32, 1, 4, 16)
    monkeypatch.setattr(backward, "TILES", {key: {4: {256: tile}} for key in backward.TILES})
    backward.tile_for.cache_clear()
    options = {"dtype": torch.float32, "device": device, "mask": MASKS["causal"]}
    options["dropout_p"] = dropout_p
    if packed:
        problem = make_packed(((5, 33), (20, 40)), width=40, **options)
    else:
        problem = make((33, 50), (2, 1), (40, 24), **options)
    check(problem, deterministic)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_queries_that_see_nothing_have_no_gradient(softcap, deterministic, small_tiles, device):
    mask = Mask(causal=True, bottom_right=True)
    problem = make((50, 20), dtype=torch.float16, device=device, mask=mask, softcap=softcap)
    dq, _, _ = check(problem, deterministic)
    assert torch.equal(dq[:, :30], torch.zeros_like(dq[:, :30]))
    assert (dq[:, 30:] != 0).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits(sign, deterministic, small_tiles, device):
    # exp(s - lse) of keys past the end, whose score is 0, would be infinite where lse is -3000.
    problem = make((20, 37), (1, 1), dtype=torch.float32, device=device, batch=1)
    problem.q += 30
    problem.k.add_(20).mul_(sign)
    out, lse, expected = oracle(problem, torch.float64)
    # Scores are good to 2e-4 in float32 there, and so is p; dq is a sum of 20 · ds that cancels.
    for ours, true in zip(gradients(problem, out, lse, deterministic), expected, strict=True):
        assert (ours - true).norm() < 1e-2 * true.norm()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_packed_sequences(mask, deterministic, small_tiles, device):
    problem = make_packed(SEQUENCES, (1, 1), torch.float16, device, mask=mask)
    check(problem, deterministic)


def test_packed_sequences_through_pointers(deterministic, small_tiles, device):
    problem = make_packed(SEQUENCES, dtype=torch.float64, device=device, mask=MASKS["bottom right"])
    check(problem, deterministic)


def test_what_lies_after_packed_sequences_is_neither_read_nor_written(
    deterministic, small_tiles, device
):
    check_neighbours(((20, 33), (5, 3)), device, 16, deterministic)


@pytest.mark.parametrize("layout", ["heads first", "expanded dout", "slices of one tensor"])
def test_strides(layout, deterministic, small_tiles, device):
    problem = make((33, 33), dtype=torch.float16, device=device, mask=MASKS["causal"])
    if layout == "heads first":
        for name in ("q", "k", "v", "dout"):
            x = getattr(problem, name).transpose(1, 2).contiguous().transpose(1, 2)
            setattr(problem, name, x)
    elif layout == "expanded dout":
        problem.dout = problem.dout[:1, :1].expand_as(problem.dout)
    else:
        qkv = torch.stack((problem.q, problem.k, problem.v), dim=2)
        problem.q, problem.k, problem.v = qkv.unbind(2)
    check(problem, deterministic)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradient_of_the_log_sum_exp(packed, deterministic, small_tiles, device):
    options = {"dtype": torch.float64, "device": device, "mask": MASKS["causal"]}
    problem = make_packed(((5, 33), (20, 40)), **options) if packed else make((33, 40), **options)
    shape = (2, 25) if packed else (2, 2, 33)
    generator = torch.Generator().manual_seed(3)
    problem.dlse = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    check(problem, deterministic)


def test_no_keys(deterministic, device):
    problem = make((5, 0), device=device)
    dq, _, _ = check(problem, deterministic)
    assert torch.equal(dq, torch.zeros_like(dq))


def test_bits_repeat(device):
    problem = make((40, 40), (4, 2), dtype=torch.float16, device=device, mask=MASKS["causal"])
    out, lse, _ = oracle(problem, torch.float64)
    check_deterministic(lambda: gradients(problem, out, lse, True), runs=2 if INTERPRETED else 10)


@pytest.mark.skipif(not INTERPRETED, reason="test_matches_float64_at_real_widths has these tiles")
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "faster"])
@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
def test_full_size_tiles(dtype, deterministic):
    problem = make((150, 130), (1, 1), (64, 64), dtype, "cpu", 1, mask=MASKS["causal"])
    problem.scale = 0.125
    check(problem, deterministic)
