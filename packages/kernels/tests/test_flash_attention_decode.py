"""launch_decode: split keys joined again, against attention written out in float64."""

import math

import pytest
import torch

from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention import decode
from tilewright_kernels.flash_attention.decode import Tile, launch_decode, splits_for
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_deterministic,
    no_synchronization,
    poisoned_memory,
)

OPERATOR = Operator("scaled_dot_product_attention")


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    # 16 keys at a time, so that short caches are split.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(decode, "TILES", {n: {256: Tile(16, 2, 4)} for n in (2, 4, 8)})
        decode.tile_for.cache_clear()
        yield
        monkeypatch.undo()
        decode.tile_for.cache_clear()
    else:
        yield


def written_out(q, k, v, *, scale, softcap=0.0, window=-1):
    """One sequence, q [T, H, D] the newest tokens of k and v [N, K, D]; out and lse [H, T]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    s = scale * (q @ k.mT)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    place = k.shape[1] - q.shape[1] + torch.arange(q.shape[1], device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    seen = key <= place
    if window >= 0:
        seen &= key >= place - window
    s = s.masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1) if k.shape[1] else s.new_full(s.shape[:-1], -torch.inf)
    p = torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return (p @ v).transpose(0, 1), lse


def make(lengths, tokens, heads, width, dtype, device, *, width_v=None, capacity=None, size=1.0):
    """q, caches that hold NaN past each length, and the lengths on the device."""
    query_heads, key_heads = heads
    capacity = max(lengths) + 5 if capacity is None else capacity
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (len(lengths), tokens, query_heads, width),
        (len(lengths), capacity, key_heads, width),
        (len(lengths), capacity, key_heads, width_v or width),
    )
    q, k, v = (
        (size * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes
    )  # fmt: skip
    for sequence, length in enumerate(lengths):
        k[sequence, length:] = v[sequence, length:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)


def attend(q, k, v, lengths, *, scale, softcap=0.0, window=-1):
    batch, tokens, heads, _ = q.shape
    out = q.new_full((batch, tokens, heads, v.shape[-1]), torch.nan)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((batch, heads, tokens), torch.nan, dtype=dtype)
    launch_decode(OPERATOR, q, k, v, lengths, out, lse, scale=scale, softcap=softcap, window=window)
    return out, lse


def check(q, k, v, lengths, *, scale=0.25, **options):
    out, lse = attend(q, k, v, lengths, scale=scale, **options)
    for i, length in enumerate(lengths.tolist()):
        inputs = q[i], k[i, :length], v[i, :length]
        same = written_out(*inputs, scale=scale, **options)
        wide = written_out(*(x.double() for x in inputs), scale=scale, **options)
        assert_as_accurate(out[i], same[0], wide[0], what=f"out of sequence {i}")
        assert_as_accurate(lse[i], same[1].to(lse.dtype), wide[1], what=f"lse of sequence {i}")


@pytest.mark.parametrize("window", [-1, 0, 20])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_lengths(dtype, tokens, window, device):
    # Nothing, fewer keys than new tokens, a partial tile, several splits.
    check(*make((0, 2, 9, 70), tokens, (4, 2), 16, dtype, device), window=window)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (40, 1)], ids=str)
def test_heads(heads, device):
    # 40 heads of 3 tokens are two tiles of rows, the second partial.
    check(*make((33, 20), 3, heads, 16, torch.float16, device))


@pytest.mark.parametrize(("width", "width_v"), [(24, 40), (80, 80), (256, 128), (17, 3)])
def test_head_dimensions(width, width_v, device):
    check(*make((40,), 1, (4, 2), width, torch.float16, device, width_v=width_v))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, device):
    check(*make((40, 33), 2, (4, 2), 16, torch.float32, device, size=3.0), softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.3, 100.0])
def test_scales(scale, device):
    check(*make((40, 33), 1, (4, 2), 16, torch.float32, device), scale=scale)


def test_nothing_to_read(device):
    out, lse = attend(*make((0, 0), 2, (4, 2), 16, torch.float32, device, capacity=0), scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


def test_layouts(device):
    # One layer of a cache of all; heads outside of tokens.
    q, k, v, lengths = make((40, 33), 2, (4, 2), 16, torch.float16, device)
    layers = torch.stack([k, v, k])
    check(q, layers[0], layers[1], lengths)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check(q, k, v, lengths)


def test_new_lengths_need_no_new_launch(device):
    # What a replayed graph does: the same memory, other lengths.
    q, k, v, lengths = make((40, 40), 1, (4, 2), 16, torch.float16, device)
    for now in ([40, 1], [17, 40]):
        lengths.copy_(torch.tensor(now))
        check(q, k, v, lengths)


def test_bits_repeat(device):
    inputs = make((70, 40), 2, (4, 2), 16, torch.float16, device)
    with poisoned_memory():
        check_deterministic(lambda: attend(*inputs, scale=0.3))


@pytest.mark.parametrize(
    ("groups", "blocks", "programs", "splits"),
    [
        (8, 2048, 264, 33),  # one long sequence of 8 key heads: every program reads
        (256, 64, 264, 1),  # enough sequences
        (1000, 64, 264, 1),  # more than enough
        (1, 3, 264, 3),  # no more splits than blocks
        (1, 10**6, 10**6, decode.MAX_SPLITS),
    ],
)
def test_splits(groups, blocks, programs, splits):
    assert splits_for(groups, blocks, programs) == splits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_real_tiles(width, dtype):
    lengths = (3000, 1, 0, 1025, 77)
    inputs = make(lengths, 2, (16, 2), width, dtype, torch.device("cuda"))
    for options in ({}, {"window": 500}, {"softcap": 20.0}):
        check(*inputs, scale=1 / math.sqrt(width), **options)


@pytest.mark.gpu
def test_many_sequences_and_one_long_one():
    check(*make([100, 900] * 40, 1, (8, 4), 128, torch.bfloat16, torch.device("cuda")))
    check(*make((50000,), 1, (8, 1), 128, torch.bfloat16, torch.device("cuda")))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths():
    q, k, v, lengths = make((900, 900), 1, (8, 2), 128, torch.bfloat16, torch.device("cuda"))
    attend(q, k, v, lengths, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(q, k, v, lengths, scale=0.1)
    for now in ([900, 3], [0, 900], [512, 511]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        expected, _ = attend(q, k, v, lengths, scale=0.1)
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_the_host_does_not_wait():
    inputs = make((900, 30), 1, (8, 2), 128, torch.bfloat16, torch.device("cuda"))
    with no_synchronization():
        attend(*inputs, scale=0.1)
