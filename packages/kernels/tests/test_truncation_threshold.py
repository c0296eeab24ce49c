import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    truncation_threshold,
    truncation_threshold_reference,
    use_backend,
)
from tilewright_kernels.testing import (
    check_deterministic,
    count_launches,
    layouts,
    no_synchronization,
    poisoned_memory,
    randn,
)

module = importlib.import_module("tilewright_kernels.truncation_threshold")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What is on: top-k, top-p, min-p.
KINDS = ("", "k", "p", "m", "kpm")


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    # A row of 70 is walked in two blocks, the last of which has six logits.
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(module, "BLOCK_V", 64)


def options(kind, batch, size, device):
    some = torch.tensor([1, size // 3 or 1, 2, size], device=device).clamp(1, size)
    return {
        "temperature": torch.tensor([0.7, 1.0, 0.0, 2.5], device=device)[:batch].contiguous(),
        "top_k": some[:batch].contiguous() if "k" in kind else torch.full_like(some, size)[:batch],
        "top_p": torch.tensor([0.3, 0.9, 0.5, 1.0], device=device)[:batch].contiguous()
        if "p" in kind
        else torch.full((batch,), 2.0, device=device),
        "min_p": torch.tensor([0.2, 0.0, 1.0, 0.05], device=device)[:batch].contiguous()
        if "m" in kind
        else torch.zeros(batch, device=device),
    }


def check(logits, given):
    with use_backend("triton"), count_launches() as launches, poisoned_memory():
        ours = truncation_threshold(logits, **given)
    assert launches["truncation_threshold"] == 1
    assert torch.equal(ours, truncation_threshold_reference(logits, **given))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_sort_s(kind, dtype, device):
    check(randn(4, 70, dtype=dtype, device=device) * 3, options(kind, 4, 70, device))


def test_equal_logits(device):
    # Three of the largest, of which top-k leaves two: their probabilities are a half each.
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, -1.0]], device=device)
    given = options("kp", 1, 6, device) | {"top_k": torch.tensor([2], device=device)}
    for top_p, expected in ((0.4, 3.0), (0.9, 3.0)):
        given["top_p"] = torch.tensor([top_p], device=device)
        assert check(logits, given).item() == expected
    # Four, one of them smaller: it is what the last bit of top_p asks for.
    given["top_k"], given["temperature"] = given["top_k"] + 2, torch.ones(1, device=device)
    for top_p, expected in ((0.5, 3.0), (0.95, 2.0)):
        given["top_p"] = torch.tensor([top_p], device=device)
        assert check(logits, given).item() == expected


def test_signs_infinities_and_one_logit(device):
    rows = torch.tensor(
        [[-1.0, -2.0, -3.0, -4.0], [0.0, -0.0, 1e-40, -1e-40], [float("-inf")] * 3 + [5.0]],
        device=device,
    )
    given = options("k", 3, 4, device) | {"top_k": torch.tensor([3, 1, 2], device=device)}
    ours = check(rows[[0, 2]].contiguous(), {k: v[[0, 2]].contiguous() for k, v in given.items()})
    assert ours.tolist() == [-3.0, float("-inf")]
    check(rows[1:2], {k: v[1:2].contiguous() for k, v in given.items()})
    check(rows[:1, :1].contiguous(), options("kpm", 1, 1, device))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 66),
    seed=st.integers(0, 700),
    kind=st.sampled_from(KINDS),
    coarse=st.booleans(),
)
def test_any_row(size, seed, kind, coarse):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = randn(4, size, dtype=torch.float32, device=device, seed=seed) * 4
    logits = logits.round() if coarse else logits
    given = options(kind, 4, size, device)
    with use_backend("triton"):
        ours = truncation_threshold(logits, **given)
    expected = truncation_threshold_reference(logits, **given)
    # A sum that is top_p but for rounding may take one logit more or fewer.
    wide = logits.double() / torch.where(given["temperature"] > 0, given["temperature"], 1)[:, None]
    close = (wide.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
             - given["top_p"][:, None]).abs().amin(-1) < 1e-5  # fmt: skip
    assert ((ours == expected) | close).all()


def test_layouts(device):
    given = options("kpm", 4, 40, device)
    for _, logits in layouts((4, 40), torch.float32, device):
        check(logits, given)


def test_candidates_are_enough(device):
    logits = randn(4, 70, dtype=torch.float32, device=device)
    given = options("kp", 4, 70, device)
    given["top_k"] = given["top_k"].clamp(max=16)
    with use_backend("torch"):
        few = truncation_threshold(logits, **given, candidates=16)
        assert torch.equal(few, truncation_threshold(logits, **given))
    with use_backend("triton"):
        assert torch.equal(few, truncation_threshold(logits, **given, candidates=16))


def test_bits_repeat(device):
    logits, given = (
        randn(4, 70, dtype=torch.float32, device=device),
        options("kpm", 4, 70, device),
    )
    with use_backend("triton"):
        check_deterministic(lambda: [truncation_threshold(logits, **given)])


def test_opcheck_and_compile(device):
    logits, given = randn(4, 50, dtype=torch.float32, device=device), options("kp", 4, 50, device)
    torch.library.opcheck(
        torch.ops.tilewright.find_thresholds.default, (logits, *given.values())
    )  # fmt: skip
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with use_backend("triton"):
        compiled = torch.compile(truncation_threshold, fullgraph=True, backend=backend)
        assert torch.equal(compiled(logits, **given), truncation_threshold(logits, **given))


def test_bad_input(device):
    logits, given = randn(4, 50, dtype=torch.float32, device=device), options("kp", 4, 50, device)

    def refused(error, message, logits=logits, **changes):
        options: dict[str, Any] = given | changes
        with pytest.raises(error, match=message):
            truncation_threshold(logits, **options)

    refused(TypeError, "logits is torch.float64; give logits.float", logits=logits.double())
    refused(ValueError, r"logits has shape \(4, 0\)", logits=logits[:, :0])
    refused(TypeError, "top_k is torch.int32; give torch.int64", top_k=given["top_k"].int())
    refused(TypeError, "top_p is torch.float64", top_p=given["top_p"].double())
    refused(ValueError, r"min_p has shape \(3,\); give \[4\]", min_p=given["min_p"][:3])
    refused(ValueError, "temperature on meta", temperature=given["temperature"].to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32768, 151936])
def test_real_vocabularies(size, dtype):
    cuda = torch.device("cuda")
    logits, given = randn(4, size, dtype=dtype, device=cuda) * 3, options("k", 4, size, cuda)
    with no_synchronization(), use_backend("triton"):
        truncation_threshold(logits, **given)
    check(logits, given)
    # Sums of so many end within a few of one another, where logits lie close.
    given = options("kpm", 4, size, cuda)
    with use_backend("triton"):
        ours = truncation_threshold(logits, **given)
    expected = truncation_threshold_reference(logits, **given)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("candidates", "launched"), [(None, 1), (32768, 1), (64, 0)])
def test_auto_selects_where_candidates_are_few(candidates, launched):
    cuda = torch.device("cuda")
    logits, given = randn(2, 32768, dtype=torch.bfloat16, device=cuda), options("p", 2, 32768, cuda)
    given["top_k"] = given["top_k"].clamp(max=64)
    with count_launches() as launches:
        truncation_threshold(logits, **given, candidates=candidates)
    assert launches["truncation_threshold"] == launched
