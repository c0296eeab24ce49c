"""What a caller of attention can get wrong, and what the message says of it."""

import re
from functools import partial

import pytest
import torch

from tilewright_kernels import (
    attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    use_backend,
)
from tilewright_kernels.flash_attention.arguments import SOFTCAPS


def test_bad_input(device):
    q = torch.zeros(2, 4, 5, 16, device=device)
    k = v = torch.zeros(2, 2, 6, 16, device=device)
    attention = scaled_dot_product_attention
    with pytest.raises(ValueError, match=r"query has 4 heads, key 2.*enable_gqa=True"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"query has 3 heads.*divides query's"):
        attention(q[:, :3], k, v, enable_gqa=True)
    with pytest.raises(ValueError, match=r"last dimensions of query and key"):
        attention(q[..., :8], k, v, enable_gqa=True)
    with pytest.raises(ValueError, match=r"one length"):
        attention(q, k, v[:, :, :5], enable_gqa=True)
    with pytest.raises(ValueError, match=r"do not broadcast"):
        attention(q.repeat(2, 1, 1, 1)[:3], k, v, enable_gqa=True)
    with pytest.raises(ValueError, match=r"two dimensions"):
        attention(q[0, 0, 0], k, v)
    with pytest.raises(TypeError, match=r"and key torch.float16.*key.to\(torch.float32\)"):
        attention(q, k.half(), v, enable_gqa=True)
    with pytest.raises(TypeError, match=r"query is torch.int64"):
        attention(q.long(), k.long(), v.long(), enable_gqa=True)
    with pytest.raises(ValueError, match=r"value on meta"):
        attention(q, k, v.to("meta"), enable_gqa=True)
    with pytest.raises(ValueError, match=r"is_causal and attn_mask are both given"):
        attention(q, q, q, torch.ones(5, 5, dtype=torch.bool, device=device), is_causal=True)
    with pytest.raises(TypeError, match=r"attn_mask is torch.int64"):
        attention(q, q, q, torch.ones(5, 5, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"p is 1.5"):
        attention(q, q, q, dropout_p=1.5)
    with pytest.raises(ValueError, match=r"softcap is -1.0"):
        attention(q, q, q, softcap=-1.0)
    with pytest.raises(ValueError, match=r"softcap is inf.*None for no softcap"):
        attention(q, q, q, softcap=float("inf"))
    for softcap in (0.0, 1e-40, 1e-18, 1e39, float("nan")):
        with pytest.raises(
            ValueError, match=rf"softcap is {re.escape(str(softcap))}; give .* 1e-06 to 1e\+06"
        ):
            attention(q, q, q, softcap=softcap)
    for scale in (float("nan"), float("inf"), -float("inf"), 1e39):
        with pytest.raises(ValueError, match=rf"scale is {re.escape(str(scale))}; give .*None for"):
            attention(q, q, q, scale=scale)
    with pytest.raises(ValueError, match=r"window_size is \(3, -2\)"):
        attention(q, q, q, window_size=(3, -2))
    with pytest.raises(ValueError, match=r"window_size is 3;"):
        attention(q, q, q, window_size=3)  # pyrefly: ignore[no-matching-overload]
    with pytest.raises(ValueError, match=r"causal_alignment is 'left'; give top_left or bottom"):
        attention(q, q, q, causal_alignment="left")  # pyrefly: ignore[no-matching-overload]


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_widest_softcaps_hide_and_cap(dtype, softcap, device):
    # On Hopper in 16 bits its own kernels, which give a hidden key a score of -2⁶³ softcap.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 1, 1, 80, 64, generator=generator).to(device, dtype)
    q, k, v = (x.requires_grad_() for x in inputs.unbind())
    wide_q, wide_k, wide_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = attention_reference(wide_q, wide_k, wide_v, is_causal=True, softcap=softcap)
    with use_backend("triton"):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, softcap=softcap)
    assert_close = partial(torch.testing.assert_close, rtol=1e-2, atol=1e-2, check_dtype=False)
    assert_close(out, expected)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert_close(dv, torch.autograd.grad(expected, wide_v, torch.ones_like(expected))[0])
    assert not any(x.isnan().any() for x in (dq, dk))


def test_bad_packed_input(device):
    q = torch.zeros(8, 4, 16, device=device)
    k = v = torch.zeros(9, 2, 16, device=device)
    cu_q, cu_k = torch.tensor([[0, 5, 8], [0, 5, 9]], dtype=torch.int32, device=device)
    longest = 5, 5
    function = flash_attn_varlen_func
    with pytest.raises(ValueError, match=r"must be \[N, H, D\]"):
        function(q[None], k, v, cu_q, cu_k, *longest)
    with pytest.raises(TypeError, match=r"cu_seqlens_k is torch.int64.*int32"):
        function(q, k, v, cu_q, cu_k.long(), *longest)
    with pytest.raises(ValueError, match=r"cu_seqlens_k has shape \(2,\)"):
        function(q, k, v, cu_q, cu_k[:2], *longest)
    with pytest.raises(ValueError, match=r"max_seqlen_q is -1"):
        function(q, k, v, cu_q, cu_k, -1, 5)
    with pytest.raises(ValueError, match=r"softcap is 1e-40"):
        function(q, k, v, cu_q, cu_k, *longest, softcap=1e-40)
    with pytest.raises(ValueError, match=r"scale is inf"):
        function(q, k, v, cu_q, cu_k, *longest, scale=float("inf"))
    with pytest.raises(ValueError, match=r"divides query's"):
        function(q[:, :3], k, v, cu_q, cu_k, *longest)


def test_bad_cache(device):
    q = torch.zeros(3, 1, 4, 16, device=device)
    k = v = torch.zeros(3, 70, 2, 16, device=device)
    lengths = torch.tensor((1, 33, 70), dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, D\]"):
        flash_attn_decode(q[:2], k, v, lengths)
    with pytest.raises(TypeError, match=r"lengths is torch.int64"):
        flash_attn_decode(q, k, v, lengths.long())
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\); it must be \[3\]"):
        flash_attn_decode(q, k, v, lengths[:2])
    with pytest.raises(ValueError, match=r"softcap is 1e\+39"):
        flash_attn_decode(q, k, v, lengths, softcap=1e39)
    with pytest.raises(ValueError, match=r"scale is nan"):
        flash_attn_decode(q, k, v, lengths, scale=float("nan"))
