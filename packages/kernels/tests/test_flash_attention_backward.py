"""The backward of attention alone: both modes against autograd through float64 attention."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import INTERPRETED, tl, triton
from tilewright_kernels.flash_attention import (
    backward,
    backward_problem,
    backward_tiles,
    tiles,
)
from tilewright_kernels.flash_attention.masks import Mask, keep_reference
from tilewright_kernels.testing import FLOATING, assert_as_accurate, check_deterministic

OPERATOR = Operator("attention_backward_alone")

# The interpreter multiplies the bits of bfloat16.
DOT_DTYPES = tuple(d for d in FLOATING if not (INTERPRETED and d == torch.bfloat16))
LENGTHS = (
    (1, 1),  # the smallest there is
    (1, 40),  # one query, several blocks of keys
    (39, 1),  # the other way round
    (33, 50),  # several partial blocks of both
    (48, 48),  # whole blocks
)
FULL = Mask()
MASKS = {
    "full": FULL,
    "causal": Mask(causal=True),
    "bottom right": Mask(causal=True, bottom_right=True),
    "window": Mask(left=20, right=7),
    "causal window": Mask(causal=True, bottom_right=True, left=17),
}


@dataclass
class Problem:
    """Inputs of attention, dense or packed, and what masks it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    mask: Mask = FULL
    softcap: float = 0.0
    dropout_p: float = 0.0
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    scale: float = 0.3
    seed: int = 7

    @property
    def longest(self):
        if self.cu_q is None or self.cu_k is None:
            return self.q.shape[-3], self.k.shape[-3]
        return self.cu_q.diff().max().item(), self.cu_k.diff().max().item()


def make(
    lengths, heads=(2, 2), widths=(16, 16), dtype=torch.float64, device="cpu", batch=2, **options
):
    (len_q, len_k), (h, kv), (d, d_v) = lengths, heads, widths
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, *shape, generator=generator).to(device, dtype)
        for shape in ((len_q, h, d), (len_k, kv, d), (len_k, kv, d_v), (len_q, h, d_v))
    )
    return Problem(q, k, v, dout, **options)


def attention(q, k, v, problem, batch=0):
    """Output and log-sum-exp of dense attention [B, T, H, D], the formula in q's dtype."""
    (len_q, heads), (len_k, kv_heads) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    s = problem.scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if problem.softcap:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    seen = problem.mask.visible(len_q, len_k, q.device)
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.where(seen.any(-1), s.logsumexp(-1), -math.inf)
    p = torch.where(seen, (s - torch.where(seen.any(-1), lse, 0.0)[..., None]).exp(), 0.0)
    if problem.dropout_p:
        head = torch.arange(len(q) * heads, device=q.device).view(len(q), heads, 1, 1)
        kept = keep_reference(
            torch.tensor(problem.seed, device=q.device), head + batch * heads,
            torch.arange(len_q, device=q.device)[:, None], torch.arange(len_k, device=q.device),
            problem.longest[0], problem.longest[1], problem.dropout_p,
        )  # fmt: skip
        p = torch.where(kept, p / (1 - problem.dropout_p), 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def oracle(problem, dtype):
    """Output, log-sum-exp and gradients by autograd, all computed in dtype."""
    q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in (problem.q, problem.k, problem.v))
    if problem.cu_q is None or problem.cu_k is None:
        out, lse = attention(q, k, v, problem)
    else:
        out, lse = torch.zeros_like(problem.dout, dtype=dtype), q.new_zeros(q.shape[1], len(q))
        bounds = zip(
            itertools.pairwise(problem.cu_q.tolist()), itertools.pairwise(problem.cu_k.tolist()),
            strict=True,
        )  # fmt: skip
        for batch, ((q0, q1), (k0, k1)) in enumerate(bounds):
            o, e = attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], problem, batch)
            out = out.index_copy(0, torch.arange(q0, q1, device=q.device), o[0])
            lse = lse.index_copy(1, torch.arange(q0, q1, device=q.device), e[0])
    outs, grads = [out], [problem.dout.to(dtype)]
    if problem.dlse is not None:
        outs.append(lse)
        grads.append(problem.dlse.to(dtype))
    # In this thread: cuBLAS warns in one that has no CUDA context yet, such as autograd's own.
    with torch.autograd.set_multithreading_enabled(False):
        return out.detach(), lse.detach(), torch.autograd.grad(outs, (q, k, v), grads)


def gradients(problem, out, lse, deterministic):
    """dq, dk and dv by the kernels; memory that they should write holds NaN before."""
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    grads = [torch.full_like(x, torch.nan) for x in (problem.q, problem.k, problem.v)]
    longest = problem.longest if problem.cu_q is not None else (0, 0)
    launches = OPERATOR._done.launches
    backward.launch_backward(
        OPERATOR, problem.dout, problem.q, problem.k, problem.v, out.to(problem.q.dtype),
        lse.to(wide), *grads, mask=problem.mask, scale=problem.scale, softcap=problem.softcap,
        dropout_p=problem.dropout_p, seed=torch.tensor(problem.seed, device=problem.q.device),
        cu_seqlens_q=problem.cu_q, cu_seqlens_k=problem.cu_k, max_seqlen_q=longest[0],
        max_seqlen_k=longest[1], deterministic=deterministic, dlse=problem.dlse,
    )  # fmt: skip
    assert OPERATOR._done.launches > launches
    return grads


def check(problem, deterministic):
    """Gradients within twice the error of the same formula in the inputs' dtype."""
    out, lse, expected = oracle(problem, torch.float64)
    same = oracle(problem, problem.q.dtype)[2]
    ours = gradients(problem, out, lse, deterministic)
    scale = problem.dout.abs().max().item()
    for name, a, b, c in zip(("dq", "dk", "dv"), ours, same, expected, strict=True):
        if c.numel() and c.abs().max() < 1e-13 * scale:
            # A key alone has p = 1 whatever its score: what is left is the rounding of dp - delta.
            assert a.abs().max() <= 64 * torch.finfo(a.dtype).eps * scale, name
        else:
            assert_as_accurate(a, b, c, scale=scale, what=name)
    return ours


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
    options = {"mask": MASKS["causal"], "dropout_p": 0.3}
    make_one = make_packed if packed else make
    lengths = ((5, 33), (20, 40)) if packed else (33, 40)
    check(make_one(lengths, dtype=torch.float32, device=device, **options), deterministic)


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


def make_packed(
    lengths, heads=(2, 1), dtype=torch.float64, device="cpu", padding=0, width=16, **options
):
    """Sequences of given (queries, keys) in one row, and rows of NaN after them."""
    generator = torch.Generator().manual_seed(1)
    all_q, all_k = (sum(n) for n in zip(*lengths, strict=True))
    tensors = []
    for length, num_heads in ((all_q, heads[0]), (all_k, heads[1]), (all_k, heads[1])):
        x = torch.randn(length, num_heads, width, generator=generator)
        tensors.append(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=torch.nan))
    tensors.append(torch.randn(all_q + padding, heads[0], width, generator=generator))
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in zip(*lengths, strict=True)
    )
    q, k, v, dout = (x.to(device, dtype) for x in tensors)
    return Problem(q, k, v, dout, cu_q=cu_q, cu_k=cu_k, **options)


SEQUENCES = ((18, 33), (0, 5), (17, 0), (1, 1), (0, 0), (17, 34))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_packed_sequences(mask, deterministic, small_tiles, device):
    problem = make_packed(SEQUENCES, (1, 1), torch.float16, device, mask=mask)
    check(problem, deterministic)


def test_packed_sequences_through_pointers(deterministic, small_tiles, device):
    problem = make_packed(SEQUENCES, dtype=torch.float64, device=device, mask=MASKS["bottom right"])
    check(problem, deterministic)


def check_neighbours(lengths, device, width, deterministic):
    problem = make_packed(lengths, dtype=torch.float16, device=device, padding=20, width=width)
    num_q, num_k = (sum(n) for n in zip(*lengths, strict=True))
    used = {"q": num_q, "k": num_k, "v": num_k}
    trimmed = replace(
        problem, dout=problem.dout[:num_q], **{n: getattr(problem, n)[:r] for n, r in used.items()}
    )
    out, lse, _ = oracle(trimmed, torch.float64)
    expected = gradients(trimmed, out, lse, deterministic)
    out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, 20), value=torch.nan)
    lse = torch.nn.functional.pad(lse, (0, 20), value=torch.nan)
    ours = gradients(problem, out, lse, deterministic)
    for a, b, rows in zip(ours, expected, used.values(), strict=True):
        torch.testing.assert_close(a[:rows], b)
        assert a[rows:].isnan().all()


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


def test_adds_only_where_that_pays(monkeypatch, device):
    kernels: list[str] = []
    launch = OPERATOR.launch

    def record(kernel, *args, **meta):
        kernels.append(kernel.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(OPERATOR, "launch", record)
    for dtype, expected in (
        (torch.float16, ["queries", "keys"]),
        (torch.float32, ["rows", "keys", "finish"]),
    ):
        problem = make((20, 20), dtype=dtype, device=device)
        out, lse, _ = oracle(problem, torch.float64)
        gradients(problem, out, lse, False)
        assert kernels == [f"attention_backward_{name}_kernel" for name in expected]
        kernels.clear()


def test_scratch_memory_of_short_sequences_is_short(monkeypatch, device):
    # Sequences of one token: 16 rows each and not 128, beside 100 tokens.
    sizes: list[int] = []
    monkeypatch.setattr(
        OPERATOR,
        "launch",
        lambda kernel, *args, **_: sizes.extend(
            x.numel() for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.float32
        ),
    )
    problem = make_packed([(1, 1)] * 100, dtype=torch.float32, device=device)
    out, lse, _ = oracle(problem, torch.float64)
    grads = [torch.empty_like(x) for x in (problem.q, problem.k, problem.v)]
    backward.launch_backward(
        OPERATOR, problem.dout, problem.q, problem.k, problem.v, out.float(), lse.float(), *grads,
        mask=problem.mask, scale=1.0, softcap=0.0, dropout_p=0.0, seed=None,
        cu_seqlens_q=problem.cu_q, cu_seqlens_k=problem.cu_k, max_seqlen_q=1, max_seqlen_k=1,
        deterministic=False,
    )  # fmt: skip
    assert max(sizes) <= 2 * 16 * 2 * 16 * 110


@triton.jit
def rows_kernel(out_ptr, batch, head, heads, first, rows, PACKED: tl.constexpr):
    tl.store(out_ptr, backward_tiles.scratch_row(batch, head, heads, first, rows, PACKED, 128))


@pytest.mark.parametrize(
    ("place", "packed", "expected"),
    [
        # The last of 2¹⁸ sequences of 64 queries, in the last head; that of 2²⁴ sequences of one.
        (
            (2**18 - 1, 63, 64, 64 * (2**18 - 1), 3 * 2**24 + 128),
            True,
            63 * (3 * 2**24 + 128) + 3 * 2**24 - 256,
        ),
        ((2**24 - 1, 0, 1, 2**24 - 1, 129 * 2**24 + 128), True, 129 * 2**24 - 256),
        ((2**10, 31, 32, 0, 2**16), False, (2**15 + 31) * 2**16),
    ],
    ids=["packed", "many", "dense"],
)
def test_scratch_rows_beyond_int32(place, packed, expected, device):
    out = torch.zeros(1, dtype=torch.int64, device=device)
    rows_kernel[(1,)](out, *place, PACKED=packed)
    assert out.item() == expected > 2**31


def test_scratch_memory_beyond_int32_is_for_the_portable_kernels(monkeypatch):
    kernels: list[str] = []
    monkeypatch.setattr(
        OPERATOR, "launch", lambda kernel, *_, **__: kernels.append(kernel.__name__)
    )
    monkeypatch.setattr(tiles, "is_hopper", lambda device: True)
    # 2¹⁸ sequences of 64 and 65 queries: 3 · 2²⁴ padded rows a head, and a few. Nothing is there.
    for heads, suffix in ((42, "_hopper"), (43, "")):
        x = torch.empty(2**24, heads, 64, dtype=torch.bfloat16, device="meta")
        lse = torch.empty(heads, 2**24, device="meta")
        cu = torch.empty(2**18 + 1, dtype=torch.int32, device="meta")
        backward.launch_backward(
            OPERATOR, x, x, x, x, x, lse, x, x, x, mask=Mask(), scale=1.0, softcap=0.0,
            dropout_p=0.0, seed=None, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=65,
            max_seqlen_k=65, deterministic=False,
        )  # fmt: skip
        assert kernels == [f"attention_backward_{n}{suffix}_kernel" for n in ("queries", "keys")]
        kernels.clear()


def test_tiles_fit_their_sequences():
    tile = backward.tile_for("keys", 128, 2, 4096, 4096)
    assert tile == backward.TILES["keys"][2][128]
    assert backward.tile_for("keys", 128, 2, 4096, 4096, True).BLOCK_M == tile.BLOCK_M // 2
    assert backward.tile_for("keys", 16, 2, 1, 4096).BLOCK_M == 16
    assert backward.tile_for("keys", 16, 2, 4096, 0).BLOCK_N == 16
    for by_size in backward.TILES.values():
        for tile in (tile for by_width in by_size.values() for tile in by_width.values()):
            assert backward_problem.PADDED % tile.BLOCK_M == 0


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_sums_are_put_in_order(packed, device):
    # One tile and a part of one; a head dimension that does not fill the tile.
    width, lengths = 40, (70, 20) if packed else (70, 70)
    cu_seqlens = torch.tensor([0, 70, 90], dtype=torch.int32, device=device) if packed else None
    dq = [torch.randn(n, 2, width, device=device) for n in lengths]
    padded = torch.zeros(2, 128, 2, 64, device=device)
    for sums, x in zip(padded, dq, strict=True):
        sums[: len(x), :, :width] = x
    # [B, T, H, D] as [B, H, tile, warp, half, row, half, columns, pair, column]
    sums = padded.transpose(1, 2).reshape(2, 2, 2, 4, 2, 8, 2, 4, 4, 2)
    sums = sums.permute(1, 0, 2, 3, 6, 7, 5, 8, 4, 9) if packed else sums.permute(
        0, 1, 2, 3, 6, 7, 5, 8, 4, 9
    )  # fmt: skip
    out = torch.full((1, 90, 2, width) if packed else (2, 70, 2, width), torch.nan, device=device)
    OPERATOR.launch(
        backward.attention_backward_unpack_kernel, (2 * 2 * 2,), sums.contiguous(), out, cu_seqlens,
        0.5, 70, 2, 256 if packed else 128, *out.stride()[:3],
        D=width, PACKED=packed, PADDED=128, num_warps=4,
    )  # fmt: skip
    expected = torch.cat(dq)[None] if packed else torch.stack(dq)
    assert torch.equal(out, 0.5 * expected)


@pytest.fixture(params=[True, False], ids=["deterministic", "faster"])
def as_users_get_it(request, monkeypatch):
    # But for few keys too.
    monkeypatch.setattr(backward, "FUSED_KEYS", 0)
    return request.param


def test_hopper_kernel_only_where_that_pays(monkeypatch):
    kernels: list[str] = []
    monkeypatch.setattr(
        OPERATOR, "launch", lambda kernel, *_, **__: kernels.append(kernel.__name__)
    )
    monkeypatch.setattr(tiles, "is_hopper", lambda device: True)
    monkeypatch.setattr(backward, "FUSED_KEYS", 1536)
    every, half = Mask(), Mask(causal=True)
    portable, split, fused = ["queries", "keys"], ["queries_hopper", "keys_hopper"], ["hopper"]
    for length, width, mask, deterministic, dropout_p, expected in (
        (2048, 64, every, False, 0.0, ["rows", *fused, "unpack"]),
        (2048, 64, every, True, 0.0, split),
        (2048, 64, half, False, 0.0, split),
        (2048, 128, every, False, 0.0, split),
        (2048, 128, every, False, 0.5, portable),
        (2048, 256, every, False, 0.0, portable),
        (64, 128, every, False, 0.0, portable),
    ):
        x = torch.zeros(1, length, 1, width, dtype=torch.bfloat16)
        backward.launch_backward(
            OPERATOR, x, x, x, x, x, torch.zeros(1, 1, length), x, x, x, mask=mask, scale=1.0,
            softcap=0.0, dropout_p=dropout_p, seed=None, deterministic=deterministic,
        )  # fmt: skip
        assert kernels == [f"attention_backward_{name}_kernel" for name in expected]
        kernels.clear()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, torch.bfloat16) for width in (16, 64, 80, 96, 128, 192, 256)]
    + [(64, torch.float16), (128, torch.float32), (256, torch.float32), (256, torch.float64)],
    ids=str,
)
def test_matches_float64_at_real_widths(width, dtype, as_users_get_it):
    # One block past several, of both; grouped heads.
    problem = make((331, 523), (4, 2), (width, width), dtype, "cuda", mask=MASKS["bottom right"])
    problem.scale = width**-0.5
    check(problem, as_users_get_it)


# On Hopper two kernels, and one: with heads of 128 both modes are the two.
HOPPER_KERNELS = pytest.mark.parametrize(
    ("width", "as_users_get_it"),
    [(128, True), (64, False)],
    ids=["two", "one"],
    indirect=["as_users_get_it"],
)


@pytest.mark.gpu
@HOPPER_KERNELS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_matches_float64_at_real_lengths(softcap, mask, width, as_users_get_it):
    options = {"mask": mask, "softcap": softcap, "scale": width**-0.5}
    for lengths in ((113, 203), (1023, 1024), (2048, 2048)):
        problem = make(lengths, (4, 1), (width, width), torch.bfloat16, "cuda", **options)
        check(problem, as_users_get_it)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "width_v"), [(64, 40), (80, 128)])
def test_values_of_another_width(width, width_v, as_users_get_it):
    problem = make((331, 523), (2, 1), (width, width_v), torch.bfloat16, "cuda")
    check(problem, as_users_get_it)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "dropout_p"), [(128, 0.0), (128, 0.1), (64, 0.0)])
def test_packed_sequences_of_real_lengths(width, dropout_p, as_users_get_it):
    lengths = ((1000, 1000), (0, 3), (129, 700), (64, 0), (1, 1))
    options = {"mask": MASKS["bottom right"], "dropout_p": dropout_p, "width": width, "scale": 0.1}
    check(make_packed(lengths, (4, 2), torch.bfloat16, "cuda", **options), as_users_get_it)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_packed_sequences_of_a_few_tiles(width, as_users_get_it):
    # Small enough for sanitizers, and with more queries than the portable kernels get on Hopper.
    lengths = ((65, 200), (0, 3), (130, 70), (100, 0))
    options = {"mask": MASKS["bottom right"], "width": width, "scale": 0.1}
    check(make_packed(lengths, (4, 2), torch.bfloat16, "cuda", **options), as_users_get_it)


@pytest.mark.gpu
def test_what_lies_after_packed_sequences_of_real_lengths(as_users_get_it):
    check_neighbours(((200, 333), (5, 3)), "cuda", 64, as_users_get_it)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_portable_kernels_at_real_sizes(width, monkeypatch):
    monkeypatch.setattr(tiles, "is_hopper", lambda device: False)
    problem = make((331, 523), (4, 2), (width, width), torch.bfloat16, "cuda", mask=MASKS["causal"])
    problem.scale = width**-0.5
    check(problem, True)


@pytest.mark.gpu
def test_more_tiles_than_multiprocessors():
    # 384 of queries and 192 of keys: programs take several, and in no fixed order.
    shape = (1500, 1500), (16, 8), (128, 128), torch.bfloat16, "cuda"
    problem = make(*shape, mask=Mask(causal=True, left=300), scale=128**-0.5)
    check(problem, True)
    out, lse, _ = oracle(problem, torch.bfloat16)
    check_deterministic(lambda: gradients(problem, out, lse, True))


@pytest.mark.gpu
@HOPPER_KERNELS
def test_more_than_two_to_the_31_elements(width, as_users_get_it):
    # With a window, the last gradients are those of the last tokens alone.
    tokens, tail, mask = 2**20 + 128, 512, Mask(causal=True, left=100)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(
        1, tail, 2048 // width, width, generator=generator, device="cuda", dtype=torch.bfloat16
    )
    problem = Problem(x, x, x, x, mask=mask, scale=0.1)
    out, lse = attention(x.float(), x.float(), x.float(), problem)
    short = gradients(problem, out, lse, as_users_get_it)
    x = x.repeat(1, tokens // tail + 1, 1, 1)[:, -tokens:]
    out = out.to(x.dtype).repeat(1, tokens // tail + 1, 1, 1)[:, -tokens:]
    lse = lse.repeat(1, 1, tokens // tail + 1)[:, :, -tokens:]
    assert x.numel() > 2**31
    long = gradients(Problem(x, x, x, x, mask=mask, scale=0.1), out, lse, as_users_get_it)
    for a, b in zip(long, short, strict=True):
        torch.testing.assert_close(a[:, -256:], b[:, -256:], rtol=2e-2, atol=2e-2)
