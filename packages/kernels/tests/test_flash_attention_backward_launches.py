"""Which kernels the backward of attention is, their tiles, and scratch memory between them."""

import pytest
import torch

from tilewright_kernels._triton import tl, triton
from tilewright_kernels.flash_attention import backward, backward_problem, backward_tiles, tiles
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.testing import (
    OPERATOR,
    gradients,
    make,
    make_packed,
    oracle,
)


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


def test_tiles_fit_their_sequences():
    tile = backward.tile_for("keys", 128, 2, 4096, 4096)
    assert tile == backward.TILES["keys"][2][128]
    assert backward.tile_for("keys", 128, 2, 4096, 4096, True).BLOCK_M == tile.BLOCK_M // 2
    assert backward.tile_for("keys", 16, 2, 1, 4096).BLOCK_M == 16
    assert backward.tile_for("keys", 16, 2, 4096, 0).BLOCK_N == 16
    tf32 = backward.TF32_TILES["keys"][128]
    assert backward.tile_for("keys", 128, 4, 4096, 4096, tf32=True) == tf32
    by_widths = [by_width for sizes in backward.TILES.values() for by_width in sizes.values()]
    for by_width in (*by_widths, *backward.TF32_TILES.values()):
        assert all(backward_problem.PADDED % tile.BLOCK_M == 0 for tile in by_width.values())


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
