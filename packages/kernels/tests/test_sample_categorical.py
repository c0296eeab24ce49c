import importlib

import pytest
import torch

from tilewright_kernels import (
    sample_categorical,
    sample_categorical_reference,
    use_backend,
)
from tilewright_kernels.testing import (
    FLOATING,
    check_deterministic,
    count_launches,
    layouts,
    no_synchronization,
    poisoned_memory,
    randn,
)

module = importlib.import_module("tilewright_kernels.sample_categorical")


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    # A row of 100 is shared by four programs, the last of which has four logits.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(module, "BLOCK_V", 32)


def make(batch, size, dtype, device):
    logits = randn(batch, size, dtype=dtype, device=device) * 2
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator).to(device)
    steps = torch.randint(0, 2**31, (batch,), generator=generator).to(device)
    return logits, seeds, steps


def options(name, batch, device):
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0, 0.0], device=device)[:batch].contiguous()
    threshold = torch.linspace(-1, 1, batch, device=device)
    return {
        "plain": {},
        "temperature": {"temperature": temperature},
        "threshold": {"threshold": threshold},
        "both": {"temperature": temperature, "threshold": threshold},
    }[name]


def check(logits, seeds, steps, **given):
    with use_backend("triton"), count_launches() as launches, poisoned_memory():
        tokens, log_probs = sample_categorical(logits, seeds, steps, **given)
    assert launches["sample_categorical"] == 1
    expected, expected_log_probs = sample_categorical_reference(logits, seeds, steps, **given)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(log_probs, expected_log_probs)
    return tokens


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("given", ["plain", "temperature", "threshold", "both"])
def test_draws_what_the_reference_draws(given, dtype, device):
    check(*make(5, 100, dtype, device), **options(given, 5, device))


@pytest.mark.parametrize("size", [1, 16, 32, 33])
def test_sizes_of_the_vocabulary(size, device):
    check(*make(3, size, torch.float32, device))


def test_reference_follows_the_distribution():
    draws = 40_000
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    seeds, steps = torch.full((draws,), 7), torch.arange(draws)
    tokens, log_probs = sample_categorical_reference(p.log().expand(draws, 5), seeds, steps)
    frequencies = tokens.bincount(minlength=5) / draws
    # Four standard errors of the most uncertain frequency.
    assert (frequencies - p).abs().max() < 4 * (0.25 / draws) ** 0.5
    torch.testing.assert_close(log_probs, p.log()[tokens])


def test_rare_tokens_are_as_rare_as_they_should_be():
    # Of 2¹⁸ draws each of two tokens of p = 2⁻¹⁴ gets 16 on average.
    logits = torch.tensor([0.0, -14 * 0.6931472, -14 * 0.6931472])
    steps = torch.arange(2**18)
    seeds = torch.full_like(steps, 3)
    tokens, _ = sample_categorical_reference(logits.expand(2**18, 3), seeds, steps)
    counts = tokens.bincount(minlength=3)
    assert 4 <= counts[1] <= 32
    assert 4 <= counts[2] <= 32


def test_a_draw_depends_on_its_row_alone(device):
    logits, seeds, steps = make(5, 100, torch.float32, device)
    with use_backend("triton"):
        together, _ = sample_categorical(logits, seeds, steps)
        backwards, _ = sample_categorical(logits.flip(0), seeds.flip(0), steps.flip(0))
        alone = [sample_categorical(logits[i:][:1], seeds[i:][:1], steps[i:][:1]) for i in range(5)]
        later, _ = sample_categorical(logits, seeds, steps.flip(0))
        other, _ = sample_categorical(logits, seeds.flip(0), steps)
    assert torch.equal(together, backwards.flip(0))
    assert torch.equal(together, torch.cat([tokens for tokens, _ in alone]))
    assert not torch.equal(together, later)
    assert not torch.equal(together, other)


def test_equal_logits_without_temperature_give_the_first(device):
    logits = torch.zeros(2, 100, device=device)
    logits[1, 40:] = 1.0
    _, seeds, steps = make(2, 100, torch.float32, device)
    tokens = check(logits, seeds, steps, temperature=torch.zeros(2, device=device))
    assert tokens.tolist() == [0, 40]


def test_what_is_forbidden_is_never_drawn(device):
    # -inf alone in whole blocks, and one token left, the least likely.
    logits, _, _ = make(1, 100, torch.float32, device)
    logits[:, :70] = -torch.inf
    logits = logits.expand(8, 100).contiguous()
    seeds = torch.arange(8, device=device)
    assert check(logits, seeds, seeds).min() >= 70
    last = logits.clone()
    last[:, 71:] = -torch.inf
    assert (check(last, seeds, seeds) == 70).all()


def test_layouts(device):
    _, seeds, steps = make(4, 20, torch.float32, device)
    for _, logits in layouts((4, 20), torch.float32, device):
        check(logits, seeds, steps)


def test_counters_are_zero_again_and_bits_repeat(device):
    logits, seeds, steps = make(5, 100, torch.float32, device)
    counters = torch.zeros(5, dtype=torch.int32, device=device)
    with use_backend("triton"):
        check_deterministic(lambda: sample_categorical(logits, seeds, steps, counters=counters))
    assert not counters.any()


def test_results_in_given_tensors(device):
    logits, seeds, steps = make(5, 100, torch.float32, device)
    held = torch.full((2, 5), -1, dtype=torch.int64, device=device)
    out = held[0], held[1].view(torch.float32)[:5]
    for backend in ("triton", "torch"):
        held.fill_(-1)
        with use_backend(backend):
            expected = sample_categorical(logits, seeds, steps)
            returned = sample_categorical(logits, seeds, steps, out=out)
        assert returned == out
        for ours, theirs in zip(out, expected, strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"out's log_probs is torch.int64 of shape \(5,\)"):
        sample_categorical(logits, seeds, steps, out=(held[0], held[1]))


def test_nothing_to_draw(device):
    logits, seeds, steps = make(5, 100, torch.float32, device)
    tokens, log_probs = sample_categorical(logits[:0], seeds[:0], steps[:0])
    assert tokens.shape == log_probs.shape == (0,)


def test_opcheck(device):
    logits, seeds, steps = make(2, 40, torch.float32, device)
    args = (logits, seeds, steps, None, None, None)
    torch.library.opcheck(torch.ops.tilewright.draw_tokens.default, args)
    out = torch.empty(2, dtype=torch.int64, device=device), torch.empty(2, device=device)
    torch.library.opcheck(torch.ops.tilewright.draw_tokens_into.default, (*out, *args))


def test_compiles(device):
    args = make(2, 40, torch.float32, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with use_backend("triton"), count_launches() as launches:
        expected = sample_categorical(*args)
        compiled = torch.compile(sample_categorical, fullgraph=True, backend=backend)
        assert torch.equal(compiled(*args)[0], expected[0])
    assert launches["sample_categorical"] == 2


def test_no_gradient(device):
    logits, seeds, steps = make(2, 40, torch.float32, device)
    with use_backend("triton"):
        tokens, log_probs = sample_categorical(logits.requires_grad_(), seeds, steps)
    assert not tokens.requires_grad
    assert not log_probs.requires_grad


def test_bad_input(device):
    logits, seeds, steps = make(2, 40, torch.float32, device)

    def refused(error, message, logits=logits, seeds=seeds, steps=steps, **changes):
        with pytest.raises(error, match=message):
            sample_categorical(logits, seeds, steps, **changes)

    refused(ValueError, r"logits has shape \(40,\)", logits=logits[0])
    refused(ValueError, r"logits has shape \(2, 0\)", logits=logits[:, :0])
    refused(TypeError, "logits is torch.int64", logits=logits.long())
    refused(TypeError, "seeds is torch.int32; give int64", seeds=seeds.int())
    refused(TypeError, "steps is torch.float32", steps=steps.float())
    refused(ValueError, r"seeds has shape \(1,\); give \[2\]", seeds=seeds[:1])
    refused(ValueError, r"threshold has shape \(40,\)", threshold=logits[0])
    refused(TypeError, "temperature is torch.float64", temperature=logits[:, 0].double())
    refused(ValueError, "counters is torch.int32 of shape", counters=seeds[:1].int())
    refused(ValueError, "seeds on meta", seeds=seeds.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32768, 151936])
def test_real_vocabularies(size):
    cuda = torch.device("cuda")
    args = make(5, size, torch.bfloat16, cuda)
    check(*args, **options("both", 5, cuda))
    counters = torch.zeros(5, dtype=torch.int32, device=cuda)
    with no_synchronization():
        sample_categorical(*args, counters=counters)
