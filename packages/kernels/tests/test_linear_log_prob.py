"""linear_log_prob: against float64, torch's log_softmax, linear_cross_entropy and differences."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import (
    LinearLogProb,
    _softmax_gradient,
    linear_cross_entropy,
    linear_log_prob,
    linear_log_prob_reference,
    use_backend,
)
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    poisoned_memory,
)


def make(tokens, width, classes, dtype=torch.float32, device="cpu", seed=0):
    """Hidden states, weight, labels of which every third is ignored but for the first, bias."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    x, weight, bias = leaf(*tokens, width), leaf(classes, width), leaf(classes)
    labels = torch.randint(classes, tokens, generator=generator)
    labels.view(-1)[1::3] = -100
    return x, weight, labels.to(device), bias


def check(x, weight, labels, bias=None, chunk_bytes=None, **options):
    def with_bias(function, x, weight, labels, bias):
        return function(x, weight, labels, bias=bias, **options)

    check_against_float64(
        partial(with_bias, partial(linear_log_prob, chunk_bytes=chunk_bytes)),
        partial(with_bias, linear_log_prob_reference),
        (x, weight, labels, bias),
        operator="linear_log_prob",
    )


# One element, odd sizes in one tile, three dimensions, several tiles of rows, no tokens.
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    "shape", [((1,), 1, 1), ((5,), 3, 7), ((2, 9), 16, 64), ((33,), 5, 129), ((0,), 4, 16)], ids=str
)
def test_matches_float64(shape, dtype, device):
    tokens, width, classes = shape
    check(*make(tokens, width, classes, dtype, device))


@pytest.mark.smoke
def test_reference_is_torchs_log_softmax(device):
    x, weight, labels, bias = make((2, 5), 4, 11, torch.float64, device)
    logits = x @ weight.T + bias
    chosen = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ours = linear_log_prob_reference(x, weight, labels, bias=bias)
    torch.testing.assert_close(ours, chosen.where(labels >= 0, 0.0))


def test_is_the_negative_cross_entropy(device):
    x, weight, labels, bias = make((7,), 4, 11, device=device)
    with use_backend("triton"):
        log_prob = linear_log_prob(x, weight, labels, bias=bias, softcap=3.0)
        losses = linear_cross_entropy(x, weight, labels, bias, reduction="none", softcap=3.0)
    assert torch.equal(log_prob, -losses)
    assert (log_prob[labels == -100] == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_mean_logits(dtype, softcap, device, monkeypatch):
    # Tiles of a few columns, whose sums are added up; and chunks of two tokens.
    monkeypatch.setattr(_softmax_gradient, "UNROLL", 2)
    monkeypatch.setattr(_softmax_gradient, "LEAST_THREADS", 1)
    x, weight, labels, bias = make((3,), 4, 21, dtype, device)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "return_mean_logits": True}
    row_bytes = 256 if dtype == torch.float64 else 128  # of 21 logits, in whole lines
    chunk_bytes = 2 * row_bytes
    with use_backend("triton"):
        log_prob, means = linear_log_prob(x, weight, labels, chunk_bytes=chunk_bytes, **options)
        without = linear_log_prob(x, weight, labels, bias=bias, softcap=softcap)
    torch.testing.assert_close(log_prob, without)
    expected = linear_log_prob_reference(x, weight, labels, **options)[1]
    assert means.dtype == log_prob.dtype
    assert not means.requires_grad
    torch.testing.assert_close(means, expected)
    assert (means[labels == -100] == 0).all()
    if softcap is None:
        x, weight, bias = (t.detach().double() for t in (x, weight, bias))
        by_weight = x @ weight.mean(0) + bias.mean()
        atol = 1e-2 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(means[0].double(), by_weight[0], rtol=0, atol=atol)


def test_a_preference_loss(device):
    # Log-probabilities of whole answers, chosen against rejected, as trainers compare them.
    x, weight, labels, _ = make((4, 6), 5, 13, device=device)

    def loss(log_prob):
        chosen, rejected = log_prob(x, weight, labels).sum(-1).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    with use_backend("triton"):
        ours = torch.autograd.grad(loss(linear_log_prob), (x, weight))
    for a, b in zip(
        ours, torch.autograd.grad(loss(linear_log_prob_reference), (x, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_ignore_index_and_integer_labels(device):
    x, weight, labels, bias = make((6,), 3, 7, device=device)
    check(x, weight, labels.where(labels >= 0, 5), bias, ignore_index=5, chunk_bytes=256)
    check(x, weight, labels.to(torch.int32), bias)


@pytest.mark.parametrize("bad", [-1, 7])
def test_label_out_of_range_shows_as_nan(bad, device):
    x, weight, labels, _ = make((3,), 4, 7, device=device)
    labels[2] = bad
    with use_backend("triton"):
        log_prob, means = linear_log_prob(x, weight, labels, return_mean_logits=True)
    for result in (log_prob, means, torch.autograd.grad(log_prob.sum(), x)[0]):
        assert result[2].isnan().all()
        assert result[:2].isfinite().all()


def test_gradcheck(device):
    x, weight, labels, bias = make((3,), 1, 3, torch.float64, device)
    check_gradients(
        lambda x, w, b: linear_log_prob(x, w, labels, bias=b, chunk_bytes=256),
        (x, weight, bias),
        operator="linear_log_prob",
    )


def test_compiles(device):
    x, weight, labels, _ = make((5,), 8, 16, device=device)
    check_compiles(
        lambda x, w: linear_log_prob(x * 1.0, w, labels), (x, weight), operator="linear_log_prob"
    )


def test_opcheck(device):
    x, weight, labels, bias = make((4,), 3, 8, device=device)
    ops = torch.ops.tilewright
    tensors, options = (x, weight, bias, labels), (-100, 0.0, 0.0, None, None)
    torch.library.opcheck(ops.linear_log_prob_losses.default, (*tensors, *options, True))
    with torch.no_grad():
        torch.library.opcheck(
            ops.linear_log_prob_losses_backward.default,
            (torch.rand(4, device=device), *tensors, *options, True, False, True),
        )


# On a GPU torch warns that cuBLAS may choose another algorithm next time; the test would show it.
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")
def test_every_element_is_written_and_bits_repeat(device):
    x, weight, labels, _ = make((9,), 5, 21, device=device)

    def run():
        log_prob, means = linear_log_prob(
            x, weight, labels, chunk_bytes=384, return_mean_logits=True
        )
        return log_prob, means, *torch.autograd.grad(log_prob.sum(), (x, weight))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    x, weight, labels, bias = make((6,), 5, 9, device=device)
    with use_backend(backend):
        with torch.autocast(device.type, torch.bfloat16):
            ours = linear_log_prob(x, weight, labels, bias=bias)
        narrow = (x.bfloat16(), weight.bfloat16(), labels)
        assert torch.equal(ours, linear_log_prob(*narrow, bias=bias.bfloat16()))
    assert [g.dtype for g in torch.autograd.grad(ours.sum(), (x, weight))] == [torch.float32] * 2


# Not float64: over so many classes its error is the order of summation, for which nothing allows.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 100, 50257), (260, 128, 131072)], ids=str)
def test_matches_float64_at_real_widths(shape, dtype):
    tokens, width, classes = shape
    x, weight, labels, bias = make((tokens,), width, classes, dtype, "cuda")
    with torch.no_grad():
        weight /= width**0.5
    check(x, weight, labels, bias, chunk_bytes=100 * classes * dtype.itemsize)


def test_module_is_the_function(device):
    x, weight, labels, bias = make((6,), 5, 9, device=device)
    options: dict[str, Any] = {"ignore_index": 2, "softcap": 2.0}
    labels[0], labels[1::3] = 2, 3
    with use_backend("triton"):
        ours = LinearLogProb(**options, chunk_bytes=256)(x, weight, labels, bias)
    expected = linear_log_prob_reference(x, weight, labels, bias=bias, **options)
    torch.testing.assert_close(ours, expected)
    assert ours[0] == 0


def test_bad_input(device):
    x, weight, labels, _ = make((5,), 4, 9, device=device)
    with pytest.raises(ValueError, match=r"labels has shape \(4,\).*input's \(5, 4\)"):
        linear_log_prob(x, weight, labels[:4])
    with pytest.raises(TypeError, match=r"labels is torch.float32.*labels.long"):
        linear_log_prob(x, weight, labels.float())
    with pytest.raises(ValueError, match=r"labels on meta"):
        linear_log_prob(x, weight, labels.to("meta"))
    with pytest.raises(ValueError, match=r"softcap is -1"):
        linear_log_prob(x, weight, labels, softcap=-1.0)
