"""Attention by torch: asked for, and where the kernels cannot."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import (
    attention_reference,
    backend_report,
    decode_attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    use_backend,
    varlen_attention_reference,
)
from tilewright_kernels.flash_attention import fallback
from tilewright_kernels.flash_attention.masks import as_mask
from tilewright_kernels.testing import count_launches

OP = "scaled_dot_product_attention"
CAUSAL = as_mask(True, "top_left", None)
WINDOWS = (None, (5, -1), (-1, 3), (9, 4), (0, 0))


def make(len_q, len_k, dtype=torch.float64, *, device="cpu", heads=(2, 2), dim=16):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, length, dim, generator=generator).to(device, dtype).requires_grad_()
        for n, length in ((heads[0], len_q), (heads[1], len_k), (heads[1], len_k))
    )
    return q, k, v


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_backend_torch_is_the_reference(alignment, window):
    for lengths, causal in itertools.product(((20, 20), (13, 29), (29, 13)), (False, True)):
        inputs = make(*lengths, heads=(4, 2))
        options = {"is_causal": causal, "causal_alignment": alignment, "window_size": window}
        with use_backend("torch"):
            out = scaled_dot_product_attention(*inputs, enable_gqa=True, **options)
        expected = attention_reference(*inputs, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


def test_backend_torch_of_packed_sequences():
    # Empty ones, keys without queries and the other way round, tokens after the last.
    queries = torch.tensor((0, 0, 5, 9, 9, 18, 19, 39), dtype=torch.int32)
    keys = torch.tensor((0, 0, 5, 12, 19, 19, 30, 41), dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, 16, generator=generator).double().requires_grad_()
        for tokens, heads in ((41, 2), (43, 1), (43, 1))
    )
    rest = queries, keys, 20, 11
    with use_backend("torch"):
        out = flash_attn_varlen_func(q, k, v, *rest, is_causal=True)
    expected = varlen_attention_reference(q, k, v, *rest, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v))
    )


def test_backend_torch_of_a_cache():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 4, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, 70, 2, 16, generator=generator, dtype=torch.float64)
    lengths = torch.tensor((2, 33, 70), dtype=torch.int32)
    with use_backend("torch"):
        out = flash_attn_decode(q, k, v, lengths)
    torch.testing.assert_close(out, decode_attention_reference(q, k, v, lengths))


def test_attn_mask_falls_to_torch(device):
    q, k, v = make(20, 24, torch.float32, device=device)
    attn_mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    fallback._warn.cache_clear()
    with use_backend("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend_report(reset=True)
        outs = [scaled_dot_product_attention(q, k, v, attn_mask) for _ in range(2)]
        assert backend_report()[OP].torch == 2
    torch.testing.assert_close(outs[0], F.scaled_dot_product_attention(q, k, v, attn_mask))
    # On the CPU nobody expects a kernel.
    assert len(caught) == (device.type == "cuda")
    assert all("because attn_mask is given" in str(warning.message) for warning in caught)
    with use_backend("triton"), pytest.raises(ValueError, match="but attn_mask is given"):
        scaled_dot_product_attention(q, k, v, attn_mask)


def test_attn_mask_together_with_a_window(device):
    q, k, v = make(20, 24, device=device)
    bias = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(device).double()
    for attn_mask in (bias, bias > -1):
        options = {"window_size": (6, 3), "attn_mask": attn_mask}
        with use_backend("torch"):
            out = scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(out, attention_reference(q, k, v, **options))


def test_attn_mask_of_float32(device):
    # As torch takes it: beside 16 bits, given so or by autocast.
    q, k, v = make(20, 24, torch.float32, device=device)
    bias = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend("torch"):
        half = q.half(), k.half(), v.half()
        out = scaled_dot_product_attention(*half, attn_mask=bias)
        # Of float32 beside 16 bits one of torch's CUDA kernels makes NaN.
        expected = F.scaled_dot_product_attention(*half, attn_mask=bias.half())
        torch.testing.assert_close(out, expected)
        with torch.autocast(device.type, torch.float16):
            out = scaled_dot_product_attention(q, k, v, bias)
            torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [-1e9, torch.finfo(torch.float32).min])
def test_attn_mask_of_finite_numbers_stays_finite(hidden, dtype, device):
    # The first query sees nothing but in numbers that 16 bits round to -inf: all weights are equal.
    q, k, v = make(4, 24, dtype, device=device)
    bias = torch.zeros(4, 24, device=device)
    bias[0] = hidden
    bias[1, 3:] = -torch.inf
    with use_backend("torch"):
        out = scaled_dot_product_attention(q * 0, k, v, bias)
    torch.testing.assert_close(out[:, :, 0], v.mean(-2), atol=2e-2, rtol=0)
    torch.testing.assert_close(out[:, :, 1], v[:, :, :3].mean(-2), atol=2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_queries_that_neither_attn_mask_nor_window_lets_see_anything(dtype, device):
    # The last three lie past all keys by more than the window.
    inputs = make(13, 6, torch.float32, device=device)
    attn_mask = torch.zeros(13, 6, device=device, dtype=dtype)
    with use_backend("torch"):
        options = {
            "window_size": (4, 0),
            "attn_mask": ~attn_mask if dtype == torch.bool else attn_mask,
        }
        out = scaled_dot_product_attention(*inputs, **options)
    expected = attention_reference(*inputs, **options)
    assert (out[:, :, 10:] == 0).all()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


def test_wide_heads_fall_to_torch(device):
    q, k, v = make(5, 6, torch.float32, device=device, dim=257)
    with use_backend("torch"):
        out = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    with use_backend("triton"), pytest.raises(ValueError, match="1 to 256 and this is 257"):
        scaled_dot_product_attention(q, k, v)
    with use_backend("triton"), pytest.raises(ValueError, match="1 to 256 and this is 0"):
        scaled_dot_product_attention(q[..., :8], k[..., :8], v[..., :0])


def better(inputs, mask=CAUSAL, dropout_p=0.0, plain=True, repeats=False):
    q, k, v = inputs
    return fallback.better_in_float32(q, k, v, mask, dropout_p, plain, repeats)


def test_torch_is_better_in_float32_where_its_kernel_serves():
    inputs = make(20, 20, torch.float32)
    assert better(inputs)
    assert better(inputs, as_mask(False, "top_left", None))
    assert better(make(13, 29, torch.float32))
    assert not better(make(13, 29, torch.float32), as_mask(True, "bottom_right", None))
    assert not better(inputs, as_mask(True, "top_left", (5, 0)))
    assert not better(make(20, 20, torch.float32, heads=(4, 2)))
    assert not better(make(20, 20, torch.float32, dim=18))
    assert not better(make(20, 20, torch.bfloat16))
    assert not better(make(20, 20, torch.float64))
    assert not better(inputs, dropout_p=0.1)
    assert not better(inputs, plain=False)
    assert not better(inputs, repeats=True)
    # Of these torch would write out all scores.
    assert not better([t[0] for t in inputs])
    assert not better([t[None] for t in inputs])
    assert not better([t.transpose(-1, -2) for t in make(16, 16, torch.float32)])


def test_tensor_cores_are_better_in_tf32():
    former = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not better(make(20, 20, torch.float32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = former


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_auto_takes_torch_in_float32(causal):
    q, k, v = (t.detach().requires_grad_() for t in make(130, 130, torch.float32, device="cuda"))
    inputs = (q, k, v)
    with count_launches() as launches, warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert launches[OP] == 0
    with use_backend("triton"), count_launches() as launches:
        kernels = scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert launches[OP] > 0
    torch.testing.assert_close(ours, kernels, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(kernels.sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with count_launches() as launches:
        scaled_dot_product_attention(q, k, v, is_causal=causal, deterministic=True)
    assert launches[OP] > 0
