"""flash_attn_with_kvcache: norm, rotation, writes and attention in one launch, against torch."""

from typing import Any

import pytest
import torch

from tilewright_kernels import (
    attention_with_kvcache_reference,
    flash_attn_with_kvcache,
    use_backend,
)
from tilewright_kernels.flash_attention import with_kvcache
from tilewright_kernels.flash_attention.with_kvcache import Tile
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_deterministic,
    count_launches,
    no_synchronization,
    poisoned_memory,
    randn,
)

POSITIONS = 80


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    # 16 keys at a time, so that short caches are split among the interpreter's four programs.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(with_kvcache, "TILES", {n: {256: Tile(16, 2, 4)} for n in (2, 4, 8)})
        with_kvcache.tile_for.cache_clear()
        yield
        monkeypatch.undo()
        with_kvcache.tile_for.cache_clear()
    else:
        yield


def make(lengths, heads, width, dtype, device, *, rotary=None, capacity=None, norm=False):
    """Arguments, and options; what lies beyond each length is NaN."""
    query_heads, key_heads = heads
    batch = len(lengths)
    capacity = max(lengths) + 3 if capacity is None else capacity
    # As a joint projection leaves them: views that are not contiguous.
    qkv = randn(batch, 1, query_heads + 2 * key_heads, width, dtype=dtype, device=device)
    q, k, v = qkv.split([query_heads, key_heads, key_heads], dim=2)
    shape = (batch, capacity, key_heads, width)
    caches = [randn(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, length:] = torch.nan
    options: dict[str, Any] = {}
    rotary = width if rotary is None else rotary
    if rotary:
        angles = randn(POSITIONS, rotary // 2, dtype=torch.float32, device=device, seed=3)
        options |= {"cos": angles.cos(), "sin": angles.sin()}
    if norm:
        for seed, name in enumerate(("q_norm_weight", "k_norm_weight"), 4):
            options[name] = randn(width, dtype=dtype, device=device, seed=seed)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return [q, *caches, k, v, seqlens], options


def check(args, options):
    copies = [t.clone() for t in args]
    with use_backend("triton"), count_launches() as launches, poisoned_memory():
        out = flash_attn_with_kvcache(*args, **options)
    assert launches["flash_attn_with_kvcache"] == 1
    wide = [t.double() if t.is_floating_point() else t for t in copies]
    plain: dict[str, Any] = {
        name: x for name, x in options.items() if name not in ("counters", "prefetch_cache")
    }
    wide_options: dict[str, Any] = {
        name: x.double() if isinstance(x, torch.Tensor) else x for name, x in plain.items()
    }
    same = attention_with_kvcache_reference(*copies, **plain)
    oracle = attention_with_kvcache_reference(*wide, **wide_options)
    assert_as_accurate(out, same, oracle, scale=3.0)
    # The rows that are new, within a rounding; all others to the bit.
    for cache, expected, exact in zip(args[1:3], copies[1:3], wide[1:3], strict=True):
        written = ~expected.isnan()
        assert torch.equal(cache.isnan(), expected.isnan())
        assert_as_accurate(cache[written], expected[written], exact[written])
        for b, length in enumerate(args[5].tolist()):
            assert torch.equal(cache[b, :length], expected[b, :length])
    return out


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
def test_matches_float64(heads, attention_dtype, device):
    # Three splits, one of them or two empty for the shorter sequences; the first has no key at all.
    check(*make([0, 5, 39], heads, 16, attention_dtype, device))


@pytest.mark.parametrize("lengths", [[0], [1], [15], [16], [63]], ids=str)
def test_one_sequence_is_split(lengths, device):
    check(*make(lengths, (2, 1), 16, torch.float32, device))


@pytest.mark.parametrize("width", [8, 24, 80])
def test_head_dimensions(width, device):
    check(*make([7, 30], (2, 1), width, torch.float32, device))


@pytest.mark.parametrize("rotary", [0, 6])
def test_part_of_the_head_is_rotated(rotary, device):
    check(*make([7, 30], (2, 1), 12, torch.float32, device, rotary=rotary))


def test_norm_of_queries_and_keys(attention_dtype, device):
    check(*make([7, 30], (4, 2), 24, attention_dtype, device, norm=True))


@pytest.mark.parametrize(
    "option", [{"window_size": (20, 0)}, {"softcap": 2.0}, {"scale": 0.3}], ids=str
)
def test_options(option, device):
    args, options = make([7, 50], (4, 2), 16, torch.float32, device)
    check(args, options | option)


def test_window_of_the_own_key_alone(device):
    args, options = make([7, 50], (2, 2), 16, torch.float32, device)
    out = check(args, options | {"window_size": (0, 0)})
    torch.testing.assert_close(out, args[4])


def test_a_step_after_another_is_the_whole_attention(device):
    # Token by token from an empty cache: the caches that result are those of one look at all.
    args, options = make([0, 0], (2, 1), 16, torch.float32, device, capacity=20)
    q, k_cache, v_cache, k, v, seqlens = args
    for step in range(20):
        k, v = (randn(*t.shape, dtype=t.dtype, device=device, seed=step) for t in (k, v))
        check([q, k_cache, v_cache, k, v, seqlens], options)
        seqlens += 1
    assert k_cache.isfinite().all()


def test_a_full_cache_is_left_alone(device):
    args, options = make([12, 5], (2, 2), 16, torch.float32, device, capacity=12)
    args[5] += torch.tensor([3, 0], dtype=torch.int32, device=device)
    before = [t.clone() for t in args[1:3]]
    with use_backend("triton"):
        out = flash_attn_with_kvcache(*args, **options)
    for cache, former in zip(args[1:3], before, strict=True):
        assert torch.equal(cache[0], former[0])
    assert out.isfinite().all()


def test_positions_outside_the_tables_give_nan(device):
    args, options = make([7, 5], (2, 2), 16, torch.float32, device)
    options = {name: table[:7] for name, table in options.items()}
    with use_backend("triton"):
        out = flash_attn_with_kvcache(*args, **options)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_counters_are_zero_again_and_bits_repeat(device):
    args, options = make([63], (4, 2), 16, torch.float32, device)
    counters = torch.zeros(2, dtype=torch.int32, device=device)

    def run():
        return [flash_attn_with_kvcache(*args, counters=counters, **options)]

    with use_backend("triton"):
        check_deterministic(run)
        assert not counters.any()
        assert torch.equal(run()[0], flash_attn_with_kvcache(*args, **options))


def test_opcheck(device):
    args, options = make([7, 30], (2, 1), 16, torch.float32, device, capacity=40)
    for cache in args[1:3]:
        cache.nan_to_num_()  # what opcheck compares may not be NaN
    rest = (options["cos"], options["sin"], None, None, None, 1e-6, 0.25, 0.0, -1, False)
    operator = torch.ops.tilewright.attention_with_kvcache.default
    torch.library.opcheck(operator, (*args, *rest))


def test_compiles(device):
    args, options = make([7, 30], (2, 1), 16, torch.float32, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with use_backend("triton"), torch.no_grad(), count_launches() as launches:
        expected = flash_attn_with_kvcache(*args, **options)
        compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(*args, **options), expected)
    assert launches["flash_attn_with_kvcache"] == 2


def test_backend_torch_is_the_reference(device):
    args, options = make([7, 30], (2, 1), 16, torch.float32, device)
    copies = [t.clone() for t in args]
    with use_backend("torch"):
        out = flash_attn_with_kvcache(*args, **options)
    assert torch.equal(out, attention_with_kvcache_reference(*copies, **options))
    for a, b in zip(args, copies, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_bad_input(device):
    args, options = make([7, 30], (4, 2), 16, torch.float32, device)
    q, k_cache, v_cache, k, v, seqlens = args

    def refused(error, message, *args, **changes):
        with pytest.raises(error, match=message):
            flash_attn_with_kvcache(*args, **(options | changes))

    three = q.expand(2, 3, 4, 16)
    refused(ValueError, "q has 3 tokens a sequence", three, k_cache, v_cache, k, v, seqlens)
    refused(
        ValueError, r"k \(2, 1, 1, 16\)", q, k_cache, v_cache, k[:, :, :1], v[:, :, :1], seqlens
    )
    refused(ValueError, "query has 3 heads", q[:, :, :3], k_cache, v_cache, k, v, seqlens)
    refused(TypeError, "cache_seqlens is torch.int64", *args[:5], seqlens.long())
    refused(ValueError, r"cache_seqlens has shape \(1,\); give \[2\]", *args[:5], seqlens[:1])
    refused(TypeError, "k torch.float16", q, k_cache, v_cache, k.half(), v, seqlens)
    refused(ValueError, "one of cos and sin is missing", *args, sin=None)
    refused(ValueError, r"cos has shape \(80, 9\)", *args,
            cos=torch.ones(80, 9, device=device), sin=torch.ones(80, 9, device=device))  # fmt: skip
    refused(ValueError, r"q_norm_weight has shape \(8,\)", *args, q_norm_weight=q[0, 0, 0, :8])
    refused(ValueError, "softcap is -1", *args, softcap=-1.0)
    few = torch.zeros(3, dtype=torch.int32, device=device)
    refused(ValueError, r"counters has shape \(3,\); give 4", *args, counters=few)
    spread = k_cache.mT.contiguous().mT
    refused(ValueError, "k_cache is written in place", q, spread, v_cache, k, v, seqlens)
    refused(RuntimeError, "no gradient", q.clone().requires_grad_(), *args[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "width"),
    [
        ([300], (12, 12), 128),
        ([4095], (32, 8), 128),
        (list(range(1, 4000, 125)), (12, 12), 128),
        ([1000, 0, 77], (16, 8), 64),
        ([500, 501], (8, 1), 256),
    ],
    ids=str,
)
def test_matches_float64_at_real_sizes(lengths, heads, width, dtype):
    cuda = torch.device("cuda")
    args, options = make(lengths, heads, width, dtype, cuda)
    angles = torch.arange(4096, device=cuda)[:, None] * torch.rand(width // 2, device=cuda)
    check(args, options | {"cos": angles.cos(), "sin": angles.sin(), "prefetch_cache": True})


# So many key heads in all that no sequence is split on a Hopper; the tiles have 64 keys: none, one,
# a whole tile, more than are fetched ahead, a cache that the new key fills.
UNSPLIT = [0, 1, 63, 64, 65, 128, 200, 299, *range(7, 287, 10)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "norm", "rotary", "option"),
    [
        ((4, 4), False, 128, {}),
        ((12, 4), True, 128, {"scale": 0.05}),
        ((32, 4), False, 0, {"window_size": (70, 0)}),
        ((36, 4), False, 128, {}),
        ((4, 4), False, 64, {}),
        ((4, 4), False, 128, {"softcap": 5.0}),
    ],
    ids=str,
)
def test_many_sequences(heads, norm, rotary, option, dtype):
    cuda = torch.device("cuda")
    args, options = make(UNSPLIT, heads, 128, dtype, cuda, rotary=rotary, capacity=300, norm=norm)
    if rotary:  # as many positions as there are
        angles = randn(300, rotary // 2, dtype=torch.float32, device=cuda, seed=3)
        options |= {"cos": angles.cos(), "sin": angles.sin()}
    out = check(args, options | option | {"prefetch_cache": True})
    assert out.isfinite().all()


@pytest.mark.gpu
def test_one_graph_serves_every_length():
    cuda = torch.device("cuda")
    args, options = make([10, 200], (4, 2), 128, torch.bfloat16, cuda, capacity=256)
    options["counters"] = torch.zeros(4, dtype=torch.int32, device=cuda)
    angles = torch.rand(256, 64, device=cuda)
    options |= {"cos": angles.cos(), "sin": angles.sin()}
    start = [t.clone() for t in args]
    flash_attn_with_kvcache(*args, **options)
    with no_synchronization(), count_launches() as launches:
        flash_attn_with_kvcache(*args, **options)
    assert launches["flash_attn_with_kvcache"] == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(*args, **options)
        args[5] += 1
    for t, former in zip(args, start, strict=True):
        t.copy_(former)
    for _ in range(40):
        graph.replay()
        expected = flash_attn_with_kvcache(*start, **options)
        start[5] += 1
        assert torch.equal(out, expected)
    for t, expected in zip(args, start, strict=True):
        assert torch.equal(t.nan_to_num(), expected.nan_to_num())
