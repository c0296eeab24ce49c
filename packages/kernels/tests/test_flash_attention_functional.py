"""scaled_dot_product_attention against float64: values, log-sum-exp, gradients, option by option.

Each option is one more set of kernels to compile, about a second each on a GPU: there all options
share one problem, and what a kernel is not compiled for (lengths, windows' widths) varies freely.
"""

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import attention_reference, scaled_dot_product_attention, use_backend
from tilewright_kernels.flash_attention import registration
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_against_float64,
    check_gradients,
    floor,
)

OP = "scaled_dot_product_attention"
# Where the dtype is not what is tested: the one that shows the most, and the one that is used.
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# (queries, keys): a tile and a bit of both.
LENGTHS = {"cpu": (33, 40), "cuda": (133, 201)}
SEEING_NOTHING = {"cpu": (29, 53), "cuda": LENGTHS["cuda"]}
DIM = {"cpu": 16, "cuda": 64}
BATCH = {"cpu": 1, "cuda": 2}
WINDOWS = (None, (5, -1), (-1, 3), (9, 4), (0, 0))

pytestmark = pytest.mark.usefixtures("small_attention_tiles")

interpreted = pytest.mark.parametrize("device", ["cpu"], indirect=True)
"""Small shapes, for each of which a GPU would compile kernels that no user runs."""


def make(device, lengths=None, dtype=None, *, heads=(2, 2), dims=None, batch=None):
    generator = torch.Generator().manual_seed(0)
    len_q, len_k = lengths or LENGTHS[device.type]
    dim_k, dim_v = dims or (DIM[device.type],) * 2
    batch = batch or BATCH[device.type]

    def random(*shape):
        numbers = torch.randn(*shape, generator=generator)
        return numbers.to(device, dtype or DTYPE[device.type]).requires_grad_()

    q, k = random(batch, heads[0], len_q, dim_k), random(batch, heads[1], len_k, dim_k)
    return q, k, random(batch, heads[1], len_k, dim_v)


def check(inputs, *, both=None, **options):
    """Values, lse and gradients against float64; by both backwards where that costs little."""
    gqa = inputs[0].shape[1] != inputs[1].shape[1]
    if both is None:
        both = inputs[0].device.type == "cpu"
    for deterministic in (False, True) if both else (False,):
        check_against_float64(
            lambda q, k, v, det=deterministic: scaled_dot_product_attention(
                q, k, v, enable_gqa=gqa, return_lse=True, deterministic=det, **options
            ),
            lambda q, k, v: attention_reference(q, k, v, return_lse=True, **options),
            inputs,
            operator=OP,
        )


@interpreted
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
# One of each, one query, one key, a tile and a bit of both.
@pytest.mark.parametrize("lengths", [(1, 1), (1, 70), (37, 1), (45, 77)], ids=str)
def test_matches_float64(lengths, causal, attention_dtype, device):
    check(make(device, lengths, attention_dtype), is_causal=causal)


def test_dtypes(attention_dtype, device):
    check(make(device, dtype=attention_dtype), is_causal=True, both=True)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 1024), (239, 1), (113, 203), (1023, 1024), (2048, 2048)], ids=str
)
def test_real_lengths(lengths, causal):
    device = torch.device("cuda")
    check(make(device, lengths, heads=(4, 2), dims=(128, 128), batch=1), is_causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 4), torch.float16), ((4, 1), torch.bfloat16)],
    ids=["multi-head", "multi-query"],
)
def test_real_heads(heads, dtype):
    device = torch.device("cuda")
    check(make(device, (1023, 1024), dtype, heads=heads, dims=(128, 128)), is_causal=True)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("more", ["queries", "keys"])
def test_masks(more, alignment, window, device):
    # Bottom-right with more queries than keys, and windows past the end: queries that see nothing.
    lengths = SEEING_NOTHING[device.type]
    inputs = make(device, lengths if more == "keys" else lengths[::-1])
    for causal in (False, True):
        check(inputs, is_causal=causal, causal_alignment=alignment, window_size=window)


def test_a_query_that_sees_nothing_is_zero_and_gives_no_gradient(device):
    len_k, len_q = LENGTHS[device.type]
    q, k, v = make(device, (len_q, len_k))
    with use_backend("triton"):
        out, lse = scaled_dot_product_attention(
            q, k, v, is_causal=True, causal_alignment="bottom_right", return_lse=True
        )
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    blind = len_q - len_k
    assert (out[:, :, :blind] == 0).all()
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert (dq[:, :, :blind] == 0).all()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    assert (out[:, :, blind:] != 0).any(-1).all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)], ids=str)
def test_heads(heads, device):
    check(make(device, heads=heads, batch=2), is_causal=True)


@interpreted
@pytest.mark.parametrize(
    "dims",
    [(1, 1), (8, 8), (20, 20), (64, 64), (80, 80), (24, 40), (128, 128), (256, 256)],
    ids=str,
)
def test_head_dimensions(dims, device):
    check(make(device, (20, 35), torch.float16, dims=dims))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dims",
    [*((n, n) for n in (16, 32, 40, 72, 96, 128, 160, 192, 224, 256)), (3, 3), (24, 40)],
    ids=str,
)
def test_real_head_dimensions(dims):
    # A window as well: blocks at two edges and between them.
    device = torch.device("cuda")
    check(make(device, (300, 400), dims=dims), is_causal=True, window_size=(100, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 128, 256])
def test_real_head_dimensions_of_float32(dim):
    check(make(torch.device("cuda"), (70, 130), torch.float32, dims=(dim, dim)))


def in_one_dtype(q, k, v, softcap):
    """Causal attention as eager torch computes it, scores and all in the inputs' dtype."""
    scores = softcap * torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / softcap)
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1) @ v, lse.to(torch.promote_types(lse.dtype, torch.float32))


@pytest.mark.parametrize("softcap", [0.3, 5.0])
def test_softcap(softcap, attention_dtype, device):
    # With 0.3 most scores are at the cap. In 16 bits a GPU's tanh is good to 11 bits, as scores of
    # 16 bits would be.
    check_against_float64(
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, softcap=softcap, return_lse=True
        ),
        lambda q, k, v: in_one_dtype(q, k, v, softcap),
        make(device, dtype=attention_dtype),
        operator=OP,
    )


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.5, 0.0])
def test_scale(scale, device):
    check(make(device), is_causal=True, scale=scale)


def test_huge_logits(device):
    # Scores of ±10⁵: e¹⁰⁰⁰⁰⁰ is no number, and all but one probability of a row is 0.
    inputs = q, k, v = [
        (t.detach() * scale).requires_grad_()
        for t, scale in zip(make(device, dtype=torch.float32), (300, 300, 1), strict=True)
    ]

    def run(attention, tensors, dout):
        out = attention(*tensors, is_causal=True)
        return out, *torch.autograd.grad(out, tensors, dout.to(out.dtype))

    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(device)
    with use_backend("triton"):
        ours = run(scaled_dot_product_attention, inputs, dout)
    same = run(attention_reference, inputs, dout)
    wide = run(
        attention_reference, [t.detach().double().requires_grad_() for t in inputs], dout.double()
    )
    # ds = p · (dp - delta) is 0 for the one key of a row, where both are dout · v up to rounding;
    # what is left of it is multiplied by keys and queries of hundreds.
    dp = (dout @ v.mT).abs().max().item() * q.shape[-1] ** -0.5
    # p = exp(s - lse) is as far off as lse, which is as large as s, is rounded.
    largest = (q @ k.mT).abs().max().item() * q.shape[-1] ** -0.5
    p_error = largest * torch.finfo(torch.float32).eps / floor(torch.float32)
    dv = dout.abs().max().item() * max(1.0, p_error)
    scales = 0.0, dp * k.abs().max().item(), dp * q.abs().max().item(), dv
    for name, triple, scale in zip(
        ("out", "dq", "dk", "dv"), zip(ours, same, wide, strict=True), scales, strict=True
    ):
        assert_as_accurate(*triple, scale=scale, what=name)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_is_the_references(p, device):
    torch.manual_seed(11)
    seed = registration.draw_seed(p, torch.empty(0, device=device))

    def function(q, k, v):
        torch.manual_seed(11)
        return scaled_dot_product_attention(
            q, k, v, dropout_p=p, is_causal=True, enable_gqa=True, causal_alignment="bottom_right"
        )

    def reference(q, k, v):
        return attention_reference(
            q, k, v, None, p, True, causal_alignment="bottom_right", seed=seed
        )

    check_against_float64(function, reference, make(device, heads=(4, 2)), operator=OP)


def test_dropout_keeps_its_share_and_the_mean(device):
    # Equal scores and v = 1: the output is the share that was kept, over 1 - p.
    q, k, v = make(device, (128, 128), torch.float32, dims=(16, 16), batch=2)
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
    base = make(device, batch=2)
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
            check(inputs, both=False, is_causal=True)
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
    inputs = q, k, v = in_order(order, make(device, batch=2))
    with use_backend("triton"):
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        grads = torch.autograd.grad(out.sum(), inputs)
    assert out.stride() == q.stride()
    assert [g.stride() for g in grads] == [t.stride() for t in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["BHTD", "BTHD"])
def test_nothing_is_copied(order):
    inputs = in_order(order, make(torch.device("cuda")))
    dout = torch.randn_like(inputs[0])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        out = scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(out, inputs, dout)
    called = {event.key for event in profile.key_averages()}
    assert "aten::empty" in " ".join(called)
    assert not {"aten::copy_", "aten::clone"} & called


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
        ((2, 0, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),
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


@interpreted
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
def test_gradcheck(options, deterministic, device):
    def function(q, k, v):
        torch.manual_seed(3)
        return scaled_dot_product_attention(
            q, k, v, enable_gqa=True, return_lse=True, deterministic=deterministic, **options
        )

    inputs = make(device, (5, 7), torch.float64, heads=(2, 1), dims=(3, 2))
    check_gradients(function, inputs, operator=OP, fast_mode=True)


def test_half_precision_is_rounded_once(device):
    # Against torch's own attention in the same dtype, which is what a user compares with.
    q, k, v = make(device, dtype=torch.float16)
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with use_backend("triton"):
        ours = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_as_accurate(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True), wide)


@pytest.mark.gpu
def test_memory_is_linear_in_the_length():
    # A score of float32 for each pair at 65536 would be 16 GiB a head. q and out of 8 heads and
    # their gradients are 128 MiB each, and an eighth of that are k and v.
    extra = {}
    for length in (32768, 65536):
        device = torch.device("cuda")
        q, k, v = (
            torch.randn(1, n, length, 128, device=device, dtype=torch.bfloat16).requires_grad_()
            for n in (8, 1, 1)
        )
        for _ in range(2):  # what the first call allocates for good is not what is measured
            q.grad = k.grad = v.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out.backward(torch.ones_like(out))
            extra[length] = torch.cuda.max_memory_allocated() - before
            del out
        # 3.3 of q, and 2 more if dq were summed in float32.
        assert extra[length] < 5 * q.numel() * q.element_size()
    assert extra[65536] < 2.1 * extra[32768]


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 2²⁰ + 128 tokens of 16 heads of 128: offsets that int32 cannot hold. 4 GiB a tensor.
    length, heads = 2**20 + 128, 16
    device = torch.device("cuda")
    q = torch.randn(1, 128, heads, 128, device=device, dtype=torch.bfloat16)
    q = q.repeat(1, length // 128, 1, 1).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(1, 1, length, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    last = q[:, :, -64:].detach().requires_grad_()
    # First the reference: torch warns where a thread's first product is one of autograd's.
    expected = attention_reference(
        last, k[:, :, -128:], v[:, :, -128:], causal_alignment="bottom_right", window_size=(63, 0)
    )
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, window_size=(63, -1), deterministic=True
    )
    (dq,) = torch.autograd.grad(out, q, out.detach())
    (wanted,) = torch.autograd.grad(expected, last, out[:, :, -64:].detach())
    torch.testing.assert_close(out[:, :, -64:], expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(dq[:, :, -64:], wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    inputs = make(torch.device("cuda:1"), (20, 24), torch.float16)
    assert torch.cuda.current_device() == 0
    check(inputs, is_causal=True)
