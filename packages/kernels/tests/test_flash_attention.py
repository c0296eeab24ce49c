"""Attention end to end: public functions against float64, torch's own function and differences.

What each kernel does with tiles, strides and descriptors is in test_flash_attention_forward.py,
_backward.py and _decode.py. The interpreter takes lengths of one tile and a bit; the grid of real
lengths is for the GPU.
"""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import (
    attention_reference,
    backend_report,
    decode_attention_reference,
    flash_attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    use_backend,
    varlen_attention_reference,
)
from tilewright_kernels.flash_attention import backward, fallback, forward, registration
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    poisoned_memory,
)

OP = "scaled_dot_product_attention"
VARLEN = "flash_attn_varlen_func"
DECODE = "flash_attn_decode"
# The interpreter multiplies bfloat16 as bits; float64 is for the interpreter.
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.float16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}
# One of each, one query, one key, a tile and a bit of both.
LENGTHS = ((1, 1), (1, 70), (37, 1), (45, 77))
REAL_LENGTHS = ((1, 1), (1, 1024), (239, 1), (113, 203), (1023, 1024), (2048, 2048))
WINDOWS = (None, (5, -1), (-1, 3), (9, 4), (0, 0))


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    # In the interpreter a tile and a bit is 45 queries and 77 keys, for every dtype.
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    of_every_size = {size: {256: forward.Tile(32, 64, 2, 4)} for size in (2, 4, 8)}
    monkeypatch.setattr(forward, "TILES", of_every_size)
    of_every_size = {size: {256: backward.Tile(32, 64, 2, 4)} for size in (2, 4, 8)}
    monkeypatch.setattr(backward, "TILES", dict.fromkeys(backward.TILES, of_every_size))
    for module in (forward, backward):
        module.tile_for.cache_clear()
    yield
    for module in (forward, backward):
        module.tile_for.cache_clear()


def make(lengths, dtype, device, *, heads=(2, 2), dims=(16, 16), batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    q = random(batch, heads[0], lengths[0], dims[0])
    k = random(batch, heads[1], lengths[1], dims[0])
    return q, k, random(batch, heads[1], lengths[1], dims[1])


def check(inputs, **options):
    """Values, lse and gradients of both backwards against float64."""
    gqa = inputs[0].shape[1] != inputs[1].shape[1]
    for deterministic in (True, False):
        check_against_float64(
            lambda q, k, v, det=deterministic: scaled_dot_product_attention(
                q, k, v, enable_gqa=gqa, return_lse=True, deterministic=det, **options
            ),
            lambda q, k, v: attention_reference(q, k, v, return_lse=True, **options),
            inputs,
            operator=OP,
        )


@pytest.fixture(params=range(3))
def dtype(request, device):
    return DTYPES[device.type][request.param]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_float64(lengths, causal, dtype, device):
    check(make(lengths, dtype, device), is_causal=causal)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(29, 53), (53, 29)], ids=str)
def test_masks(lengths, alignment, window, device):
    # Bottom-right with more queries than keys, and windows past the end: queries that see nothing.
    inputs = make(lengths, torch.float32, device)
    for causal in (False, True):
        check(inputs, is_causal=causal, causal_alignment=alignment, window_size=window)


def test_a_query_that_sees_nothing_is_zero_and_gives_no_gradient(device):
    q, k, v = make((50, 20), torch.float32, device)
    with use_backend("triton"):
        out, lse = scaled_dot_product_attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right", return_lse=True
        )
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[:, :, :30] == 0).all()
    assert (lse[:, :, :30] == -torch.inf).all()
    assert (dq[:, :, :30] == 0).all()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    assert (out[:, :, 30:] != 0).any(-1).all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
def test_heads(heads, device):
    check(make((33, 40), torch.float32, device, heads=heads, batch=2), is_causal=True)


@pytest.mark.parametrize(
    "dims",
    [(1, 1), (8, 8), (20, 20), (64, 64), (80, 80), (24, 40), (128, 128), (256, 256)],
    ids=str,
)
def test_head_dimensions(dims, device):
    check(make((20, 35), torch.float16, device, dims=dims))


@pytest.mark.parametrize("softcap", [0.3, 5.0])
def test_softcap(softcap, dtype, device):
    # With 0.3 most scores are at the cap.
    check(make((33, 40), dtype, device), is_causal=True, softcap=softcap)


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.5, 0.0])
def test_scale(scale, device):
    check(make((20, 24), torch.float32, device), scale=scale)


def test_huge_logits(device):
    # Scores of ±10⁵: e¹⁰⁰⁰⁰⁰ is no number, and all but one probability of a row is 0.
    q, k, v = make((33, 40), torch.float32, device)
    inputs = [(t.detach() * scale).requires_grad_() for t, scale in ((q, 300), (k, 300), (v, 1))]
    check(inputs, is_causal=True)


@pytest.mark.parametrize("packed", [False, True], ids=["rectangular", "packed"])
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_is_the_references(p, packed, device):
    q, k, v = make((33, 40), torch.float32, device, heads=(4, 2))
    seed = drawn_seed(11, device)

    def function(q, k, v):
        torch.manual_seed(11)
        if packed:
            q, k, v, *rest = pack(q, k, v)
            return flash_attn_varlen_func(q, k, v, *rest, dropout_p=p, is_causal=True)
        return scaled_dot_product_attention(
            q, k, v, dropout_p=p, is_causal=True, enable_gqa=True, causal_alignment="bottom_right"
        )

    def reference(q, k, v):
        if packed:
            q, k, v, *rest = pack(q, k, v)
            return varlen_attention_reference(
                q, k, v, *rest, dropout_p=p, is_causal=True, seed=seed
            )
        return attention_reference(
            q, k, v, None, p, True, causal_alignment="bottom_right", seed=seed
        )

    check_against_float64(function, reference, (q, k, v), operator=VARLEN if packed else OP)


def drawn_seed(manual, device):
    """The seed that a call after torch.manual_seed(manual) draws."""
    torch.manual_seed(manual)
    return registration.draw_seed(0.5, torch.empty(0, device=device))


def pack(q, k, v):
    """[B, H, T, D] of one length as packed sequences."""
    cu = [torch.arange(len(t) + 1, device=t.device, dtype=torch.int32) * t.shape[2] for t in (q, k)]
    return *(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), *cu, q.shape[2], k.shape[2]


def test_dropout_keeps_its_share_and_the_mean(device):
    # Equal scores and v = 1: the output is the share that was kept, over 1 - p.
    q, k, v = make((128, 128), torch.float32, device, batch=2)
    with use_backend("triton"), torch.no_grad():
        out = scaled_dot_product_attention(q * 0, k, torch.ones_like(v), dropout_p=0.25)
        again = scaled_dot_product_attention(q * 0, k, torch.ones_like(v), dropout_p=0.25)
        nothing = scaled_dot_product_attention(q, k, v, dropout_p=1.0)
    # 65536 draws of variance p / (1 - p): five standard deviations.
    assert abs(out[..., 0].mean().item() - 1) < 5 * (0.25 / 0.75 / 65536) ** 0.5
    assert not torch.equal(out, again)
    assert (nothing == 0).all()


def test_layouts(device):
    # torch's order, that of a projection, parts of one projection, an expanded batch, gaps.
    base = make((20, 24), torch.float32, device, batch=2)
    layouts = {
        "[B, H, T, D]": lambda t: t.clone(),
        "[B, T, H, D]": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a row": lambda t: F.pad(t.transpose(1, 2), (0, 0, 1, 2))[:, :, 1:-2].transpose(
            1, 2
        ),
        "expanded batch": lambda t: t[:1].expand(t.shape),
        "every second column": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    }
    for name, layout in layouts.items():
        inputs = [layout(t.detach()).requires_grad_() for t in base]
        try:
            check(inputs, is_causal=True)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def in_order(order, inputs):
    """The tensors, those of [B, T, H, D] in memory as transposed views."""
    if order == "BHTD":
        return inputs
    return [
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs
    ]


@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
def test_results_lie_as_the_query_does(order, device):
    inputs = q, k, v = in_order(order, make((20, 24), torch.float32, device, batch=2))
    with use_backend("triton"):
        out = scaled_dot_product_attention(q, k, v)
        grads = torch.autograd.grad(out.sum(), inputs)
    assert out.stride() == inputs[0].stride()
    assert [g.stride() for g in grads] == [t.stride() for t in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
def test_nothing_is_copied(order):
    inputs = make((256, 256), torch.bfloat16, torch.device("cuda"), dims=(64, 64))
    q, k, v = in_order(order, inputs)
    dout = torch.randn_like(q)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled_dot_product_attention(q, k, v, is_causal=True, deterministic=True).backward(dout)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "shapes",
    [
        ((7, 16), (9, 16), (9, 8)),
        ((3, 7, 16), (3, 9, 16), (3, 9, 16)),
        ((2, 1, 3, 7, 16), (2, 2, 3, 9, 16), (2, 2, 3, 9, 16)),
        ((2, 3, 7, 16), (1, 3, 9, 16), (1, 3, 9, 16)),  # one batch of keys for all
        ((2, 3, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),  # one head of keys for all
        ((2, 1, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),  # one head of queries
        ((0, 3, 7, 16), (0, 3, 9, 16), (0, 3, 9, 16)),
        ((2, 3, 0, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
        ((2, 3, 7, 16), (2, 3, 0, 16), (2, 3, 0, 16)),
    ],
    ids=str,
)
def test_ranks_broadcast_and_empties(shapes, device):
    generator = torch.Generator().manual_seed(0)
    inputs = q, k, v = [
        torch.randn(*s, generator=generator).to(device).requires_grad_() for s in shapes
    ]
    expected = F.scaled_dot_product_attention(q, k, v)
    dout = torch.randn(expected.shape, generator=generator).to(device)
    with use_backend("triton"):
        out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
        assert lse.shape == out.shape[:-1]
        grads = torch.autograd.grad(out, inputs, dout)
    torch.testing.assert_close(out, expected)
    if 0 in shapes[1]:
        assert (lse == -torch.inf).all()
    for ours, torchs in zip(grads, torch.autograd.grad(expected, inputs, dout), strict=True):
        torch.testing.assert_close(ours, torchs)


# Lengths of (queries, keys): an empty one at either end and inside, keys without queries and the
# other way round, one longer than a tile, more queries than keys.
SEQUENCES = ((0, 0), (5, 5), (40, 70), (0, 7), (9, 0), (1, 33), (20, 11), (0, 0))


def make_packed(sequences, dtype, device, *, heads=(2, 1), dims=(16, 16), padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(sequences, dtype=torch.int32)
    zero = torch.zeros(1, 2, dtype=torch.int32)
    cu = torch.cat((zero, lengths.cumsum(0).int())).to(device)
    longest = lengths.amax(0).tolist()
    tokens = (cu[-1] + padding).tolist()
    shapes = (tokens[0], heads[0], dims[0]), (tokens[1], heads[1], dims[0])
    shapes += ((tokens[1], heads[1], dims[1]),)
    q, k, v = (
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    )
    return q, k, v, cu[:, 0], cu[:, 1], *longest


def check_packed(inputs, **options):
    for deterministic in (True, False):
        check_against_float64(
            lambda *inputs, det=deterministic: flash_attn_varlen_func(
                *inputs, return_lse=True, deterministic=det, **options
            ),
            lambda *inputs: varlen_attention_reference(*inputs, return_lse=True, **options),
            inputs,
            operator=VARLEN,
        )


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_packed_matches_float64(causal, dtype, device):
    check_packed(make_packed(SEQUENCES, dtype, device), is_causal=causal)


@pytest.mark.parametrize(
    "options",
    [{"window_size": (4, 2)}, {"window_size": (6, -1), "is_causal": True}, {"softcap": 1.5}],
    ids=str,
)
def test_packed_options(options, device):
    check_packed(make_packed(SEQUENCES, torch.float32, device, dims=(16, 24)), **options)


def test_packed_tokens_after_the_last_sequence_are_zero(device):
    inputs = make_packed(((5, 5), (20, 30)), torch.float32, device, padding=7)
    check_packed(inputs, is_causal=True)
    with use_backend("triton"), poisoned_memory():
        out = flash_attn_varlen_func(*inputs, is_causal=True)
        grads = torch.autograd.grad(out.sum(), inputs[:3])
    for t in (out, *grads):
        assert (t[-7:] == 0).all()
        assert t.isfinite().all()


def test_packed_is_rectangular_for_one_length(device):
    q, k, v = make((33, 40), torch.float32, device)
    with use_backend("triton"):
        packed = flash_attn_varlen_func(*pack(q, k, v), is_causal=True)
        expected = scaled_dot_product_attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right"
        )
    assert torch.equal(packed, expected.transpose(1, 2).flatten(0, 1))


def make_cache(dtype, device, *, queries=1, heads=(4, 2), dims=(16, 16), capacity=70):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, queries, heads[0], dims[0], generator=generator)
    k = torch.randn(3, capacity, heads[1], dims[0], generator=generator)
    v = torch.randn(3, capacity, heads[1], dims[1], generator=generator)
    lengths = torch.tensor((queries, 33, capacity), dtype=torch.int32, device=device)
    return *(t.to(device, dtype) for t in (q, k, v)), lengths


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window_size": (8, 0)}], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_matches_float64(queries, options, dtype, device):
    check_against_float64(
        lambda *inputs: flash_attn_decode(*inputs, **options),
        lambda *inputs: decode_attention_reference(*inputs, **options),
        make_cache(dtype, device, queries=queries),
        operator=DECODE,
    )


def test_decode_ignores_what_lies_beyond_the_lengths(device):
    q, k, v, lengths = make_cache(torch.float32, device)
    beyond = (torch.arange(70, device=device) >= lengths[:, None])[..., None, None]
    with use_backend("triton"):
        out = flash_attn_decode(q, k, v, lengths)
        k, v = k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)
        assert torch.equal(flash_attn_decode(q, k, v, lengths), out)


def test_decode_has_no_gradient(device):
    q, k, v, lengths = make_cache(torch.float32, device)
    with use_backend("triton"):
        out = flash_attn_decode(q.requires_grad_(), k, v, lengths)
    with pytest.raises(RuntimeError, match="no gradient; call flash_attn_varlen_func"):
        out.sum().backward()


@pytest.mark.smoke
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 33), (33, 20)], ids=str)
def test_references_are_torchs(lengths, causal):
    inputs = make(lengths, torch.float64, torch.device("cpu"))
    expected = F.scaled_dot_product_attention(*inputs, is_causal=causal)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad(expected, inputs, dout)
    for reference in (attention_reference, flash_attention_reference):
        out = reference(*inputs, is_causal=causal)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, dout), wanted)


def test_attn_mask_of_the_reference_is_torchs():
    inputs = make((20, 33), torch.float64, torch.device("cpu"), batch=2)
    generator = torch.Generator().manual_seed(0)
    for attn_mask in (
        torch.rand(20, 33, generator=generator) > 0.3,
        torch.randn(2, 1, 20, 33, generator=generator).double(),
    ):
        torch.testing.assert_close(
            attention_reference(*inputs, attn_mask),
            F.scaled_dot_product_attention(*inputs, attn_mask),
        )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_tiles_are_the_whole(alignment, window):
    # Tiles that divide neither length, of a shape of their own.
    cpu = torch.device("cpu")
    for lengths, causal in itertools.product(((29, 53), (53, 29)), (False, True)):
        inputs = make(lengths, torch.float64, cpu)
        options = {"is_causal": causal, "causal_alignment": alignment, "window_size": window}
        whole = attention_reference(*inputs, **options, return_lse=True)
        tiled = flash_attention_reference(
            *inputs, **options, block_q=8, block_k=12, return_lse=True
        )
        torch.testing.assert_close(tiled, whole)
        grad_outputs = [torch.full_like(t, 0.7) + t.detach().nan_to_num(neginf=0.0) for t in whole]
        torch.testing.assert_close(
            torch.autograd.grad(tiled, inputs, grad_outputs),
            torch.autograd.grad(whole, inputs, grad_outputs),
        )


# The compiler itself makes an instance of every autograd.Function it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_tiled_reference_compiles():
    inputs = make((20, 20), torch.float32, torch.device("cpu"))
    compiled = torch.compile(flash_attention_reference, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, True, block_q=8, block_k=8)
    expected = flash_attention_reference(*inputs, True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_backend_torch_is_the_reference(alignment, window):
    cpu = torch.device("cpu")
    for lengths, causal in itertools.product(((20, 20), (13, 29), (29, 13)), (False, True)):
        inputs = make(lengths, torch.float64, cpu, heads=(4, 2))
        options = {"is_causal": causal, "causal_alignment": alignment, "window_size": window}
        with use_backend("torch"):
            out = scaled_dot_product_attention(*inputs, enable_gqa=True, **options)
        expected = attention_reference(*inputs, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


def test_backend_torch_of_packed_sequences_and_caches():
    cpu = torch.device("cpu")
    inputs = make_packed(SEQUENCES, torch.float64, cpu, padding=2)
    cache = make_cache(torch.float64, cpu, queries=2)
    with use_backend("torch"):
        out = flash_attn_varlen_func(*inputs, is_causal=True)
        new = flash_attn_decode(*cache)
    expected = varlen_attention_reference(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs[:3]), torch.autograd.grad(expected.sum(), inputs[:3])
    )
    torch.testing.assert_close(new, decode_attention_reference(*cache))


def test_attn_mask_falls_to_torch(device):
    q, k, v = make((20, 24), torch.float32, device)
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
    q, k, v = make((20, 24), torch.float64, device)
    bias = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).to(device).double()
    for attn_mask in (bias, bias > -1):
        options = {"window_size": (6, 3), "attn_mask": attn_mask}
        with use_backend("torch"):
            out = scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(out, attention_reference(q, k, v, **options))


def test_wide_heads_fall_to_torch(device):
    q, k, v = make((5, 6), torch.float32, device, dims=(257, 257))
    with use_backend("torch"):
        out = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    with use_backend("triton"), pytest.raises(ValueError, match="1 to 256 and this is 257"):
        scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "softcap": 2.0},
        {"window_size": (2, 1), "causal_alignment": "bottom_right"},
        {"dropout_p": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "atomic"])
def test_gradcheck(options, deterministic):
    def function(q, k, v):
        torch.manual_seed(3)
        return scaled_dot_product_attention(
            q, k, v, enable_gqa=True, return_lse=True, deterministic=deterministic, **options
        )

    inputs = make((5, 7), torch.float64, torch.device("cpu"), heads=(2, 1), dims=(3, 2))
    check_gradients(function, inputs, operator=OP, fast_mode=True)


def packed_causal(inputs):
    return flash_attn_varlen_func(*inputs, is_causal=True)


def test_gradcheck_of_packed_sequences():
    q, k, v, *rest = make_packed(
        ((3, 3), (0, 2), (4, 5)), torch.float64, torch.device("cpu"), heads=(2, 1), dims=(3, 2)
    )
    check_gradients(
        lambda q, k, v: packed_causal((q, k, v, *rest)), (q, k, v), operator=VARLEN, fast_mode=True
    )


def test_second_derivative_is_refused(device):
    q, k, v = make((5, 5), torch.float32, device)
    with use_backend("triton"):
        out = scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_compiles(device):
    inputs = make((20, 24), torch.float32, device, heads=(4, 2))
    check_compiles(
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, window_size=(7, -1), return_lse=True
        ),
        inputs,
        operator=OP,
    )


def test_packed_compiles(device):
    inputs = make_packed(((5, 5), (0, 3), (20, 30)), torch.float32, device)
    check_compiles(
        lambda *inputs: flash_attn_varlen_func(*inputs, is_causal=True), inputs, operator=VARLEN
    )


def test_dropout_and_decode_compile(device):
    q, k, v = make((20, 24), torch.float32, device)
    cache = make_cache(torch.float32, device)

    def function(q, k, v, *cache):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5), flash_attn_decode(*cache)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend("triton"), torch.no_grad():
        first, again = compiled(q, k, v, *cache), compiled(q, k, v, *cache)
        assert not torch.equal(first[0], again[0])  # a seed of its own each call
        torch.testing.assert_close(first[1], flash_attn_decode(*cache))


def test_opcheck(device):
    seed = torch.tensor(7, device=device)
    options = ([1, 0, -1, -1], 0.25, 1.5, 0.2, True)
    q, k, v = (
        t.detach().transpose(1, 2).requires_grad_()
        for t in make((9, 12), torch.float32, device, heads=(2, 1))
    )
    inputs = (q, k, v, seed, None, None, 0, 0, *options)
    torch.library.opcheck(torch.ops.tilewright.attention_forward.default, inputs)
    with torch.no_grad():
        out, lse = torch.ops.tilewright.attention_forward(*inputs)
        torch.library.opcheck(
            torch.ops.tilewright.attention_backward.default,
            (out, None, q, k, v, out, lse, *inputs[3:]),
        )
    packed = make_packed(((5, 5), (0, 3)), torch.float32, device)
    torch.library.opcheck(
        torch.ops.tilewright.varlen_attention_forward.default,
        (*packed[:3], seed, *packed[3:], *options),
    )
    torch.library.opcheck(
        torch.ops.tilewright.decode_attention_forward.default,
        (*make_cache(torch.float32, device), 0.25, 0.0, -1),
    )


def test_deterministic_backward_gives_the_same_bits(device):
    size = 20 if device.type == "cpu" else 1000
    inputs = make((size, size), torch.float16, device, heads=(4, 2), dims=(32, 32))
    dout = torch.randn_like(inputs[0])

    def run():
        out = scaled_dot_product_attention(
            *inputs, is_causal=True, enable_gqa=True, deterministic=True
        )
        return out, *torch.autograd.grad(out, inputs, dout)

    with use_backend("triton"):
        check_deterministic(run, runs=10)


def test_deterministic_follows_torch(device, monkeypatch):
    asked = []
    launch = registration.launch_backward
    monkeypatch.setattr(
        registration,
        "launch_backward",
        lambda *args, **kwargs: (asked.append(kwargs["deterministic"]), launch(*args, **kwargs)),
    )
    q, k, v = make((5, 5), torch.float32, device)
    with use_backend("triton"):
        scaled_dot_product_attention(q, k, v).sum().backward()
        with poisoned_memory():  # turns torch's setting on
            scaled_dot_product_attention(q, k, v).sum().backward()
            scaled_dot_product_attention(q, k, v, deterministic=False).sum().backward()
    assert asked == [False, True, False]


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "atomic"])
@pytest.mark.parametrize("lengths", [(45, 77), (77, 45)], ids=str)
def test_every_element_is_written(lengths, deterministic, device):
    inputs = make(lengths, torch.float32, device, heads=(4, 2), dims=(20, 12))
    with use_backend("triton"), poisoned_memory():
        out, lse = scaled_dot_product_attention(
            *inputs, is_causal=True, causal_alignment="bottom_right", enable_gqa=True,
            return_lse=True, deterministic=deterministic,
        )  # fmt: skip
        grads = torch.autograd.grad(out.sum(), inputs)
    assert not any(t.isnan().any() for t in (out, lse, *grads))


def test_inputs_are_left_alone(device):
    inputs = make((20, 24), torch.float32, device)
    before = [t.detach().clone() for t in inputs]
    dout = torch.ones_like(inputs[0])
    with use_backend("triton"):
        scaled_dot_product_attention(*inputs).backward(dout)
    for a, b in zip((*inputs, dout), (*before, torch.ones_like(dout)), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_lse_alone(device):
    inputs = make((20, 24), torch.float32, device)
    with use_backend("triton"):
        _, lse = scaled_dot_product_attention(*inputs, return_lse=True)
        grads = torch.autograd.grad(lse.sum(), inputs[:2])
    _, lse = attention_reference(*inputs, return_lse=True)
    torch.testing.assert_close(grads, torch.autograd.grad(lse.sum(), inputs[:2]))


def test_autocast(device):
    q, k, v = make((20, 24), torch.float32, device)
    dtype = torch.float16
    with use_backend("triton"), torch.autocast(device.type, dtype):
        out = scaled_dot_product_attention(q, k, v)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_bad_input(device):
    q, k, v = make((5, 6), torch.float32, device, heads=(4, 2), batch=2)
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
    with pytest.raises(ValueError, match=r"window_size is \(3, -2\)"):
        attention(q, q, q, window_size=(3, -2))
    with pytest.raises(ValueError, match=r"window_size is 3;"):
        attention(q, q, q, window_size=3)  # pyrefly: ignore[no-matching-overload]
    with pytest.raises(ValueError, match=r"causal_alignment is 'left'; give top_left or bottom"):
        attention(q, q, q, causal_alignment="left")  # pyrefly: ignore[no-matching-overload]


def test_bad_packed_input(device):
    q, k, v, cu_q, cu_k, *longest = make_packed(
        ((5, 5), (3, 4)), torch.float32, device, heads=(4, 2)
    )
    function = flash_attn_varlen_func
    with pytest.raises(ValueError, match=r"must be \[N, H, D\]"):
        function(q[None], k, v, cu_q, cu_k, *longest)
    with pytest.raises(TypeError, match=r"cu_seqlens_k is torch.int64.*int32"):
        function(q, k, v, cu_q, cu_k.long(), *longest)
    with pytest.raises(ValueError, match=r"cu_seqlens_k has shape \(2,\)"):
        function(q, k, v, cu_q, cu_k[:2], *longest)
    with pytest.raises(ValueError, match=r"max_seqlen_q is -1"):
        function(q, k, v, cu_q, cu_k, -1, 5)
    with pytest.raises(ValueError, match=r"divides query's"):
        function(q[:, :3], k, v, cu_q, cu_k, *longest)


def test_bad_cache(device):
    q, k, v, lengths = make_cache(torch.float32, device)
    with pytest.raises(ValueError, match=r"must be \[B, T, H, D\]"):
        flash_attn_decode(q[:2], k, v, lengths)
    with pytest.raises(TypeError, match=r"lengths is torch.int64"):
        flash_attn_decode(q, k, v, lengths.long())
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\); it must be \[3\]"):
        flash_attn_decode(q, k, v, lengths[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", REAL_LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_float64_at_real_lengths(dtype, lengths, causal, heads):
    inputs = make(lengths, dtype, torch.device("cuda"), heads=heads, dims=(128, 128))
    check(inputs, is_causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window_size": (100, -1)}], ids=str)
def test_all_head_dimensions(dim, options):
    device = torch.device("cuda")
    check(make((300, 400), torch.bfloat16, device, dims=(dim, dim)), **options)
    check(make((70, 130), torch.float32, device, dims=(dim, dim)), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window_size": (200, -1)}, {"softcap": 20.0}], ids=str)
def test_packed_matches_float64_at_real_lengths(options):
    sequences = ((0, 0), (1023, 1024), (1, 700), (513, 513), (0, 3), (7, 0), (128, 128), (90, 1))
    device = torch.device("cuda")
    inputs = make_packed(sequences, torch.bfloat16, device, heads=(8, 2), dims=(128, 128))
    check_packed(inputs, is_causal=True, **options)


@pytest.mark.gpu
def test_memory_is_linear_in_the_length():
    # A score of float32 for each pair at 65536 would be 16 GiB; q, k, v, out and their gradients
    # are 16 MiB each, and the faster backward sums dq in float32.
    length = 65536
    q, k, v = make((length, length), torch.bfloat16, torch.device("cuda"), heads=(1, 1),
                   dims=(128, 128))  # fmt: skip
    scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    q.grad = k.grad = v.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * q.numel() * q.element_size()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 2²⁰ + 128 tokens of 16 heads of 128: offsets that int32 cannot hold. 4 GiB a tensor.
    length, heads = 2**20 + 128, 16
    device = torch.device("cuda")
    q = torch.randn(1, 128, heads, 128, device=device, dtype=torch.bfloat16)
    q = q.repeat(1, length // 128, 1, 1).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, length, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, window_size=(63, -1), deterministic=True
    )
    (dq,) = torch.autograd.grad(out, q, out.detach())
    last = q[:, :, -64:].detach().requires_grad_()
    expected = attention_reference(
        last, k[:, :, -128:], v[:, :, -128:], causal_alignment="bottom_right", window_size=(63, 0)
    )
    (wanted,) = torch.autograd.grad(expected, last, out[:, :, -64:].detach())
    torch.testing.assert_close(out[:, :, -64:], expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(dq[:, :, -64:], wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_graph_draws_dropout_anew():
    q, k, v = (t.detach() for t in make((64, 64), torch.bfloat16, torch.device("cuda")))
    scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    inputs = make((20, 24), torch.float16, torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    check(inputs, is_causal=True)


def test_half_precision_is_rounded_once(device):
    # Against torch's own attention in the same dtype, which is what a user compares with.
    q, k, v = make((40, 50), torch.float16, device)
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with use_backend("triton"):
        ours = scaled_dot_product_attention(q, k, v)
    assert_as_accurate(ours, F.scaled_dot_product_attention(q, k, v), wide)
