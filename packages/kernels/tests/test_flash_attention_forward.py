"""launch_forward: the kernel of the forward against attention written out in float64."""

import math

import pytest
import torch

from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention import forward, tiles
from tilewright_kernels.flash_attention.forward import Tile, launch_forward
from tilewright_kernels.flash_attention.masks import Mask, keep_reference
from tilewright_kernels.flash_attention.online_softmax import as_operand
from tilewright_kernels.testing import assert_as_accurate, check_deterministic, poisoned_memory

OPERATOR = Operator("scaled_dot_product_attention")
NO_MASK = Mask()
CAUSAL = Mask(causal=True)
BOTTOM_RIGHT = Mask(causal=True, bottom_right=True)
MASKS = (
    NO_MASK,
    CAUSAL,
    BOTTOM_RIGHT,
    Mask(causal=True, bottom_right=True, left=9),  # edges on both sides
    Mask(left=20, right=3),
    Mask(bottom_right=True, left=0, right=40),  # a right edge and blocks that all see
)
# One of each; a row past a tile; fewer queries than keys, and more; several tiles of both.
LENGTHS = (1, 1), (17, 16), (3, 50), (50, 3), (37, 45)
# Batch, query heads, key heads: multi-head, grouped, one for all.
HEADS = (2, 2, 2), (1, 4, 2), (1, 3, 1)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    # 16 x 16 walks as many blocks with 50 keys as 128 x 128 does with 400.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(forward, "TILES", {n: {256: Tile(16, 16, 2, 4)} for n in (2, 4, 8)})
        forward.tile_for.cache_clear()
        yield
        monkeypatch.undo()
        forward.tile_for.cache_clear()
    else:
        yield


def written_out(q, k, v, *, mask, scale, softcap=0.0, dropped=None, dropout_p=0.0):
    """Attention of [B, T, H, D] with its scores in memory; out and lse."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = scale * (q @ k.mT)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~mask.visible(q.shape[2], k.shape[2], q.device), -torch.inf)
    lse = s.logsumexp(-1) if k.shape[2] else s.new_full(s.shape[:-1], -torch.inf)
    p = torch.exp(s - torch.where(lse.isinf(), 0.0, lse)[..., None])
    if dropped is not None:
        p = p.masked_fill(dropped, 0.0) / (1 - dropout_p)
    return (p @ v).transpose(1, 2), lse


def attend(q, k, v, *, mask, scale, softcap=0.0, dropout_p=0.0, seed=None, **packed):
    *batch, tokens, heads, _ = q.shape
    out = q.new_full((*batch, tokens, heads, v.shape[-1]), torch.nan)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((*batch, heads, tokens), torch.nan, dtype=dtype)
    launch_forward(
        OPERATOR, q, k, v, out, lse, mask=mask, scale=scale, softcap=softcap, dropout_p=dropout_p,
        seed=seed, **packed,
    )  # fmt: skip
    return out, lse


def make(lengths, heads, width, dtype, device, *, width_v=None, size=1.0):
    (len_q, len_k), (batch, query_heads, key_heads) = lengths, heads
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, len_q, query_heads, width),
        (batch, len_k, key_heads, width),
        (batch, len_k, key_heads, width_v or width),
    )
    return [(size * torch.randn(s, generator=generator)).to(device, dtype) for s in shapes]


def check(q, k, v, *, mask=NO_MASK, scale=None, **options):
    """Ours against float64, with the error of the same formula in the same dtype as a measure."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    ours = attend(q, k, v, mask=mask, scale=scale, **options)
    same = written_out(q, k, v, mask=mask, scale=scale, **options)
    wide = written_out(*(x.double() for x in (q, k, v)), mask=mask, scale=scale, **options)
    assert_as_accurate(ours[0], same[0], wide[0], what="out")
    assert_as_accurate(ours[1], same[1].to(ours[1].dtype), wide[1], what="lse")


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masks_and_lengths(mask, lengths, device):
    check(*make(lengths, HEADS[1], 16, torch.float32, device), mask=mask)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_heads_and_dtypes(heads, dtype, device):
    check(*make((20, 33), heads, 32, dtype, device), mask=BOTTOM_RIGHT)


@pytest.mark.parametrize(
    ("width", "width_v"), [(16, 16), (24, 40), (64, 64), (80, 80), (192, 128), (256, 256), (17, 3)]
)
def test_head_dimensions(width, width_v, device):
    # 17 and 3 are no multiples of 16 bytes: read through pointers instead of descriptors.
    check(*make((18, 33), (1, 2, 1), width, torch.float16, device, width_v=width_v), mask=CAUSAL)


@pytest.mark.parametrize("width", [40, 18])
def test_sums_in_pieces(width, monkeypatch, device):
    # Four pieces a head of 40 or so, two a block of keys; 18 goes through pointers.
    monkeypatch.setattr(forward, "TILES", {4: {256: Tile(16, 32, 1, 4, 16)}})
    forward.tile_for.cache_clear()
    inputs = make((37, 45), (2, 4, 2), width, torch.float32, device, width_v=24)
    check(*inputs, mask=Mask(causal=True, bottom_right=True, left=9))


@pytest.mark.parametrize("mask", [NO_MASK, CAUSAL], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, mask, device):
    inputs = make((20, 33), (1, 2, 2), 32, torch.float32, device, size=3.0)
    check(*inputs, mask=mask, softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scales(scale, softcap, device):
    check(*make((20, 33), (1, 2, 2), 16, torch.float32, device), scale=scale, softcap=softcap)


@pytest.mark.parametrize("mask", [NO_MASK, CAUSAL], ids=str)
def test_logits_that_no_exponential_holds(mask, device):
    inputs = make((20, 33), (1, 2, 2), 16, torch.float32, device, size=100.0)
    check(*inputs, mask=mask, scale=1.0)


def test_rows_that_see_nothing(device):
    inputs = make((40, 20), (1, 2, 1), 16, torch.float16, device)
    out, lse = attend(*inputs, mask=BOTTOM_RIGHT, scale=0.3)
    assert torch.equal(out[:, :20], torch.zeros_like(out[:, :20]))
    assert (lse[..., :20] == -torch.inf).all()
    assert lse[..., 20:].isfinite().all()
    check(*inputs, mask=BOTTOM_RIGHT)


def test_no_keys(device):
    inputs = make((5, 0), (2, 2, 1), 16, torch.float32, device)
    out, lse = attend(*inputs, mask=CAUSAL, scale=0.3)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


def test_no_queries(device):
    out, lse = attend(*make((0, 5), (2, 2, 1), 16, torch.float32, device), mask=CAUSAL, scale=0.3)
    assert out.numel() == lse.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(dtype, device):
    # Heads outside of tokens; parts of one projection; rows that begin at no multiple of 16 bytes;
    # one batch for all. Nothing is copied: launch_forward has no memory of its own.
    q, k, v = make((18, 33), (2, 4, 2), 24, dtype, device)
    fused = torch.cat([k, v], dim=2)
    odd = torch.cat([v.new_full((*v.shape[:3], 1), torch.nan), v], dim=3)
    for name, inputs in {
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "slices": (q, fused[:, :, :2], fused[:, :, 2:]),
        "misaligned": (q, k, odd[..., 1:]),
        "expanded": (q, k[:1].expand_as(k), v[:1].expand_as(v)),
    }.items():
        try:
            check(*inputs, mask=CAUSAL)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


PACKS = (
    # Tokens of each sequence as (queries, keys); with empty ones and more queries than keys.
    ((5, 5), (0, 0), (20, 20), (1, 1)),
    ((3, 20), (0, 7), (18, 0), (20, 9), (1, 40)),
)


def pack(lengths, heads, width, dtype, device):
    """Packed q, k, v and their cu_seqlens; after the last sequence, keys and values are NaN."""
    totals = [sum(n) + 9 for n in zip(*lengths, strict=True)]
    q, k, v = (x[0] for x in make(totals, (1, *heads), width, dtype, device))
    cu = [
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0).to(device, torch.int32)
        for n in zip(*lengths, strict=True)
    ]
    for x in (k, v):
        x[cu[1][-1] :] = torch.nan
    return q, k, v, cu


@pytest.mark.parametrize("mask", [NO_MASK, BOTTOM_RIGHT, MASKS[3]], ids=str)
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_sequences(lengths, mask, device):
    q, k, v, (cu_q, cu_k) = pack(lengths, (4, 2), 16, torch.float16, device)
    longest_q, longest_k = (max(n) for n in zip(*lengths, strict=True))
    out, lse = attend(
        q, k, v, mask=mask, scale=0.25, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=longest_q, max_seqlen_k=longest_k,
    )  # fmt: skip
    bounds = (zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) for cu in (cu_q, cu_k))
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        inputs = q[None, q0:q1], k[None, k0:k1], v[None, k0:k1]
        same = written_out(*inputs, mask=mask, scale=0.25)
        wide = written_out(*(x.double() for x in inputs), mask=mask, scale=0.25)
        assert_as_accurate(out[None, q0:q1], same[0], wide[0], what="out")
        assert_as_accurate(lse[None, :, q0:q1], same[1].float(), wide[1], what="lse")
    assert out[cu_q[-1] :].isnan().all(), "rows of no sequence are left alone"


def test_a_sequence_does_not_see_its_neighbours(device):
    # The tile of the first sequence reaches into the second, whose NaN must not come through.
    q, k, v, (cu, _) = pack(((5, 5), (8, 8)), (2, 1), 16, torch.float16, device)
    for x in (k, v):
        x[5:] = torch.nan
    out, _ = attend(
        q, k, v, mask=BOTTOM_RIGHT, scale=0.25, cu_seqlens_q=cu, cu_seqlens_k=cu,
        max_seqlen_q=8, max_seqlen_k=8,
    )  # fmt: skip
    assert out[:5].isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(dropout_p, device):
    q, k, v = make((20, 33), (2, 4, 2), 16, torch.float32, device)
    seed = torch.tensor(-(2**40) + 3, device=device)
    out, lse = attend(q, k, v, mask=CAUSAL, scale=0.25, dropout_p=dropout_p, seed=seed)
    head, query, key = (torch.arange(n, device=device) for n in (8, 20, 33))
    kept = keep_reference(
        seed, head[:, None, None], query[:, None], key, 20, 33, dropout_p
    ).view(2, 4, 20, 33)  # fmt: skip
    options = {"mask": CAUSAL, "scale": 0.25, "dropped": ~kept, "dropout_p": min(dropout_p, 0.5)}
    same = written_out(q, k, v, **options)
    wide = written_out(*(x.double() for x in (q, k, v)), **options)
    assert_as_accurate(out, same[0], wide[0], what="out")
    assert_as_accurate(lse, same[1], wide[1], what="lse")


@pytest.mark.parametrize("together", [1, 64])
def test_order_of_programs(together, monkeypatch, device):
    # Groups of heads with a smaller last one, and one group.
    monkeypatch.setattr(tiles, "CACHED", together * 33 * 2 * 16 * 4)
    check(*make((40, 33), (3, 3, 3), 16, torch.float32, device), mask=CAUSAL)


def test_other_lengths_compile_nothing(monkeypatch, device):
    constants = []
    monkeypatch.setattr(OPERATOR, "launch", lambda *args, **meta: constants.append(meta))
    for length in (200, 500, 1000):
        attend(*make((200, length), (1, 1, 1), 16, torch.float32, device), mask=CAUSAL, scale=1.0)
    assert constants[0] == constants[1] == constants[2]


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_other_scales_compile_nothing(softcap, monkeypatch, device):
    constants = []
    monkeypatch.setattr(OPERATOR, "launch", lambda *args, **meta: constants.append(meta))
    inputs = make((20, 33), (1, 1, 1), 16, torch.float32, device)
    for factor in (1.0, 0.3, 2.0):
        attend(*inputs, mask=CAUSAL, scale=factor, softcap=factor * softcap)
    assert constants[0] == constants[1] == constants[2]


@triton.jit
def operand_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, as_operand(tl.load(x_ptr + at), tl.float32, "tf32"))


def test_tf32_operands(device):
    # Rounded to nearest; the last is the NaN that GPUs make, all ones but for the sign.
    bits = [0x3F800000, 0x3F800FFF, 0x3F801000, 0x7F7FEFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1]
    x = torch.tensor(bits, dtype=torch.int32, device=device).view(torch.float32)
    y = torch.empty_like(x)
    OPERATOR.launch(operand_kernel, (1,), x, y, N=8)
    expected = [0x3F800000, 0x3F800000, 0x3F802000, 0x7F7FE000, 0x7F800000]
    assert y[:5].view(torch.int32).tolist() == expected
    assert y[5:].isnan().all()


def test_bits_repeat(device):
    inputs = make((20, 33), (1, 4, 2), 16, torch.float16, device)
    with poisoned_memory():
        check_deterministic(lambda: attend(*inputs, mask=BOTTOM_RIGHT, scale=0.3))


@pytest.fixture(params=["chosen", "portable"])
def kernel(request, monkeypatch):
    """The kernel that launch_forward takes on this GPU, and the one that any GPU has."""
    if request.param == "portable":
        monkeypatch.setattr(tiles, "is_hopper", lambda _: False)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [NO_MASK, CAUSAL, Mask(True, True, left=200)], ids=str)
@pytest.mark.parametrize(
    "lengths", [(1, 1024), (239, 1), (113, 203), (1023, 1024), (2048, 2048)], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "widths"),
    [(torch.bfloat16, (16, 64, 96, 128, 256)), (torch.float16, (128,))],
    ids=str,
)
def test_real_tiles(dtype, widths, lengths, mask):
    for width in widths:
        check(*make(lengths, (2, 4, 2), width, dtype, torch.device("cuda")), mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [NO_MASK, BOTTOM_RIGHT], ids=str)
def test_head_dimensions_at_real_sizes(mask, kernel):
    # Of k and v different ones; queries of more tiles than an H200 has multiprocessors.
    for width, width_v in ((128, 64), (40, 56)):
        inputs = make((700, 500), (4, 12, 4), width, torch.bfloat16, torch.device("cuda"),
                      width_v=width_v)  # fmt: skip
        check(*inputs, mask=mask)


@pytest.mark.gpu
def test_more_heads_fit_in_the_cache_than_int32_counts(kernel, monkeypatch):
    # 2³⁰ of them, times 4 tiles.
    monkeypatch.setattr(tiles, "CACHED", 2**30 * 500 * 2 * 64 * 2)
    inputs = make((512, 500), (2, 4, 4), 64, torch.bfloat16, torch.device("cuda"))
    check(*inputs, mask=CAUSAL)


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_at_real_sizes(tf32):
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        for width in (64, 128, 256):
            inputs = make((300, 300), (1, 2, 1), width, torch.float32, torch.device("cuda"))
            check(*inputs, mask=CAUSAL)
            used = forward.tile_for(width, 4, 300, 300, False, tf32)
            assert used == (forward.TF32_TILES if tf32 else forward.TILES[4])[width]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("aligned", [True, False])
def test_real_tiles_with_softcap_and_through_pointers(softcap, aligned, kernel):
    q, k, v = make((700, 700), (1, 4, 2), 128, torch.bfloat16, torch.device("cuda"), size=2.0)
    if not aligned:
        v = torch.nn.functional.pad(v, (1, 0))[..., 1:]
    check(q, k, v, mask=CAUSAL, softcap=softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [5.0, 50.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softcaps_at_real_sizes(dtype, softcap):
    # Up to 55 bound bfloat16's scores so far down that no maximum is taken; size 20 reaches them.
    for size in (1.0, 20.0):
        inputs = make((300, 500), (2, 4, 2), 128, dtype, torch.device("cuda"), size=size)
        check(*inputs, mask=BOTTOM_RIGHT, softcap=softcap)


@pytest.mark.gpu
def test_real_tiles_with_dropout():
    q, k, v = make((300, 300), (1, 2, 1), 128, torch.bfloat16, torch.device("cuda"))
    seed = torch.tensor(7, device="cuda")
    out, _ = attend(q, k, v, mask=CAUSAL, scale=0.1, dropout_p=0.2, seed=seed)
    head, row = (torch.arange(n, device="cuda") for n in (2, 300))
    kept = keep_reference(seed, head[:, None, None], row[:, None], row, 300, 300, 0.2)[None]
    options = {"mask": CAUSAL, "scale": 0.1, "dropped": ~kept, "dropout_p": 0.2}
    same = written_out(q, k, v, **options)[0]
    wide = written_out(*(x.double() for x in (q, k, v)), **options)[0]
    assert_as_accurate(out, same, wide, what="out")


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [NO_MASK, BOTTOM_RIGHT, Mask(True, True, left=100)], ids=str)
def test_packed_at_real_sizes(mask, kernel):
    lengths = ((700, 700), (0, 0), (128, 300), (300, 128), (1, 1), (0, 50), (129, 129))
    q, k, v, (cu_q, cu_k) = pack(lengths, (4, 2), 128, torch.bfloat16, torch.device("cuda"))
    out, _ = attend(
        q, k, v, mask=mask, scale=0.1, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=700, max_seqlen_k=700,
    )  # fmt: skip
    bounds = (zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True) for cu in (cu_q, cu_k))
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        inputs = q[None, q0:q1], k[None, k0:k1], v[None, k0:k1]
        same = written_out(*inputs, mask=mask, scale=0.1)[0]
        wide = written_out(*(x.double() for x in inputs), mask=mask, scale=0.1)[0]
        assert_as_accurate(out[None, q0:q1], same, wide, what="out")


@pytest.mark.gpu
def test_bits_repeat_at_real_sizes(kernel):
    inputs = make((1500, 1500), (4, 16, 4), 128, torch.bfloat16, torch.device("cuda"))
    with poisoned_memory():
        check_deterministic(lambda: attend(*inputs, mask=BOTTOM_RIGHT, scale=0.1))


@pytest.mark.gpu
def test_a_head_past_two_to_the_31_elements():
    # Keys and values of 2³¹ elements each: 4 GiB of bfloat16; each row is the mean of all values.
    rows, heads = 2**21, 8
    q = torch.zeros(1, 128, heads, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16).expand(1, rows, heads, 128)
    v = torch.zeros(1, rows, heads, 128, device="cuda", dtype=torch.bfloat16)
    v[:, rows // 2 :] = 1.0
    out, lse = attend(q, k, v, mask=NO_MASK, scale=1.0)
    torch.testing.assert_close(out, torch.full_like(out, 0.5))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(rows)))
