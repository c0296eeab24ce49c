"""flash_attn_varlen_func and flash_attn_decode: packed sequences and caches against float64.

What an option does within a sequence is in test_flash_attention_functional.py.
"""

import pytest
import torch

from tilewright_kernels import (
    decode_attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    use_backend,
    varlen_attention_reference,
)
from tilewright_kernels.flash_attention import registration
from tilewright_kernels.testing import check_against_float64, check_gradients, poisoned_memory

VARLEN = "flash_attn_varlen_func"
DECODE = "flash_attn_decode"
# Where the dtype is not what is tested: the one that shows the most, and the one that is used.
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Lengths of (queries, keys): an empty one at either end and inside, keys without queries and the
# other way round, one longer than a tile, more queries than keys.
SEQUENCES = {
    "cpu": ((0, 0), (5, 5), (40, 70), (0, 7), (9, 0), (1, 33), (20, 11), (0, 0)),
    "cuda": ((0, 0), (1023, 1024), (1, 700), (0, 3), (7, 0), (133, 201), (90, 1), (0, 0)),
}
DIM = {"cpu": 16, "cuda": 64}

pytestmark = pytest.mark.usefixtures("small_attention_tiles")


def make_packed(device, sequences=None, dtype=None, *, heads=(2, 1), dims=None, padding=0):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(sequences or SEQUENCES[device.type], dtype=torch.int32)
    dims = dims or (DIM[device.type],) * 2
    zero = torch.zeros(1, 2, dtype=torch.int32)
    cu = torch.cat((zero, lengths.cumsum(0).int())).to(device)
    longest = lengths.amax(0).tolist()
    tokens = (cu[-1] + padding).tolist()
    shapes = (tokens[0], heads[0], dims[0]), (tokens[1], heads[1], dims[0])
    shapes += ((tokens[1], heads[1], dims[1]),)
    q, k, v = (
        torch.randn(*shape, generator=generator)
        .to(device, dtype or DTYPE[device.type])
        .requires_grad_()
        for shape in shapes
    )
    return q, k, v, cu[:, 0], cu[:, 1], *longest


def check_packed(inputs, *, both=None, **options):
    """Values, lse and gradients against float64; by both backwards where that costs little."""
    if both is None:
        both = inputs[0].device.type == "cpu"
    for deterministic in (False, True) if both else (False,):
        check_against_float64(
            lambda *inputs, det=deterministic: flash_attn_varlen_func(
                *inputs, return_lse=True, deterministic=det, **options
            ),
            lambda *inputs: varlen_attention_reference(*inputs, return_lse=True, **options),
            inputs,
            operator=VARLEN,
        )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_matches_float64(causal, attention_dtype, device):
    check_packed(make_packed(device, dtype=attention_dtype), both=causal, is_causal=causal)


@pytest.mark.parametrize(
    "options",
    [{"window_size": (4, 2)}, {"window_size": (6, -1), "is_causal": True}, {"softcap": 1.5}],
    ids=str,
)
def test_options(options, device):
    dim = DIM[device.type]
    # In 16 bits the tanh of a softcap is approximate: see test_flash_attention_functional.py.
    dtype = torch.float32 if "softcap" in options else None
    # A key alone has p = 1 whatever its score: its gradient is 0, and in float32 the rounding of
    # dp - delta, whose terms are sums of products.
    sequences = [n for n in SEQUENCES[device.type] if n[1] != 1]
    inputs = make_packed(device, sequences, dtype, dims=(dim, dim + dim // 2))
    check_packed(inputs, **options)


def test_tokens_after_the_last_sequence_are_zero(device):
    inputs = make_packed(device, padding=7)
    check_packed(inputs, is_causal=True)
    with use_backend("triton"), poisoned_memory():
        out = flash_attn_varlen_func(*inputs, is_causal=True)
        grads = torch.autograd.grad(out.sum(), inputs[:3])
    for t in (out, *grads):
        assert (t[-7:] == 0).all()
        assert t.isfinite().all()


def pack(q, k, v):
    """[B, H, T, D] of one length as packed sequences."""
    cu = [torch.arange(len(t) + 1, device=t.device, dtype=torch.int32) * t.shape[2] for t in (q, k)]
    return *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *cu, q.shape[2], k.shape[2]


def make_rectangular(device, *, batch=2):
    generator = torch.Generator().manual_seed(0)
    lengths = {"cpu": (33, 40), "cuda": (133, 201)}[device.type]
    q, k, v = (
        torch.randn(batch, heads, length, DIM[device.type], generator=generator)
        .to(device, DTYPE[device.type])
        .requires_grad_()
        for heads, length in ((2, lengths[0]), (1, lengths[1]), (1, lengths[1]))
    )
    return q, k, v


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sequences_of_one_length_are_a_batch(softcap, device):
    q, k, v = make_rectangular(device)
    with use_backend("triton"):
        packed = flash_attn_varlen_func(*pack(q, k, v), is_causal=True, softcap=softcap)
        expected = scaled_dot_product_attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right", enable_gqa=True,
            softcap=softcap,
        )  # fmt: skip
    torch.testing.assert_close(packed, expected.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_is_the_references(p, device):
    torch.manual_seed(11)
    seed = registration.draw_seed(p, torch.empty(0, device=device))

    def function(q, k, v):
        torch.manual_seed(11)
        return flash_attn_varlen_func(*pack(q, k, v), dropout_p=p, is_causal=True)

    def reference(q, k, v):
        return varlen_attention_reference(*pack(q, k, v), dropout_p=p, is_causal=True, seed=seed)

    check_against_float64(function, reference, make_rectangular(device), operator=VARLEN)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_gradcheck(device):
    q, k, v, cu_q, cu_k, longest_q, longest_k = make_packed(
        device, ((3, 3), (0, 2), (4, 5)), torch.float64, heads=(2, 1), dims=(3, 2)
    )
    check_gradients(
        lambda q, k, v: flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, longest_q, longest_k, is_causal=True
        ),
        (q, k, v),
        operator=VARLEN,
        fast_mode=True,
    )


def make_cache(device, dtype=None, *, queries=1, heads=(4, 2), capacity=70):
    generator = torch.Generator().manual_seed(0)
    dim = DIM[device.type]
    shapes = (3, queries, heads[0], dim), *[(3, capacity, heads[1], dim)] * 2
    q, k, v = (
        torch.randn(*shape, generator=generator).to(device, dtype or DTYPE[device.type])
        for shape in shapes
    )
    return q, k, v, torch.tensor((queries, 33, capacity), dtype=torch.int32, device=device)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window_size": (8, 0)}], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_matches_float64(queries, options, attention_dtype, device):
    check_against_float64(
        lambda *inputs: flash_attn_decode(*inputs, **options),
        lambda *inputs: decode_attention_reference(*inputs, **options),
        make_cache(device, attention_dtype, queries=queries),
        operator=DECODE,
    )


def test_decode_ignores_what_lies_beyond_the_lengths(device):
    q, k, v, lengths = make_cache(device)
    beyond = (torch.arange(70, device=device) >= lengths[:, None])[..., None, None]
    with use_backend("triton"):
        out = flash_attn_decode(q, k, v, lengths)
        k, v = k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)
        assert torch.equal(flash_attn_decode(q, k, v, lengths), out)


def test_decode_with_a_window_past_int32(device):
    # Fewer keys than new tokens: length - tokens - window would not be an int32.
    q, k, v, _ = make_cache(device, queries=3)
    lengths = torch.tensor((1, 33, 70), dtype=torch.int32, device=device)
    with use_backend("triton"):
        expected = flash_attn_decode(q, k, v, lengths)
        for window in (2**31 - 1, 2**40):
            out = flash_attn_decode(q, k, v, lengths, window_size=(window, 0))
            assert torch.equal(out, expected)


def test_decode_has_no_gradient(device):
    q, k, v, lengths = make_cache(device)
    with use_backend("triton"):
        out = flash_attn_decode(q.requires_grad_(), k, v, lengths)
    with pytest.raises(RuntimeError, match="no gradient; call flash_attn_varlen_func"):
        out.sum().backward()
