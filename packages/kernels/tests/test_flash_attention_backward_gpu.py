"""The backward of attention alone as users get it on a GPU: Hopper's kernels, at real sizes."""

import pytest
import torch

from tilewright_kernels.flash_attention import backward, tiles
from tilewright_kernels.flash_attention.masks import Mask
from tilewright_kernels.flash_attention.testing import (
    MASKS,
    Problem,
    attention,
    check,
    check_neighbours,
    gradients,
    make,
    make_packed,
    oracle,
)
from tilewright_kernels.testing import check_deterministic

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[True, False], ids=["deterministic", "faster"])
def as_users_get_it(request, monkeypatch):
    # But for few keys too.
    monkeypatch.setattr(backward, "FUSED_KEYS", 0)
    return request.param


# On Hopper two kernels, and one: with heads of 128 both modes are the two.
HOPPER_KERNELS = pytest.mark.parametrize(
    ("width", "as_users_get_it"),
    [(128, True), (64, False)],
    ids=["two", "one"],
    indirect=["as_users_get_it"],
)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, torch.bfloat16) for width in (16, 64, 80, 96, 128, 192, 256)]
    + [(64, torch.float16), (128, torch.float32), (256, torch.float32), (256, torch.float64)],
    ids=str,
)
def test_matches_float64_at_real_widths(width, dtype, as_users_get_it):
    # One block past several, of both; grouped heads.
    problem = make((331, 523), (4, 2), (width, width), dtype, "cuda", mask=MASKS["bottom right"])
    problem.scale = width**-0.5
    check(problem, as_users_get_it)


@HOPPER_KERNELS
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_matches_float64_at_real_lengths(softcap, mask, width, as_users_get_it):
    options = {"mask": mask, "softcap": softcap, "scale": width**-0.5}
    for lengths in ((113, 203), (1023, 1024), (2048, 2048)):
        problem = make(lengths, (4, 1), (width, width), torch.bfloat16, "cuda", **options)
        check(problem, as_users_get_it)


@pytest.mark.parametrize(("width", "width_v"), [(64, 40), (80, 128)])
def test_values_of_another_width(width, width_v, as_users_get_it):
    problem = make((331, 523), (2, 1), (width, width_v), torch.bfloat16, "cuda")
    check(problem, as_users_get_it)


@pytest.mark.parametrize(("width", "dropout_p"), [(128, 0.0), (128, 0.1), (64, 0.0)])
def test_packed_sequences_of_real_lengths(width, dropout_p, as_users_get_it):
    lengths = ((1000, 1000), (0, 3), (129, 700), (64, 0), (1, 1))
    options = {"mask": MASKS["bottom right"], "dropout_p": dropout_p, "width": width, "scale": 0.1}
    check(make_packed(lengths, (4, 2), torch.bfloat16, "cuda", **options), as_users_get_it)


@pytest.mark.parametrize("width", [64, 128])
def test_packed_sequences_of_a_few_tiles(width, as_users_get_it):
    # Small enough for sanitizers, and with more queries than the portable kernels get on Hopper.
    lengths = ((65, 200), (0, 3), (130, 70), (100, 0))
    options = {"mask": MASKS["bottom right"], "width": width, "scale": 0.1}
    check(make_packed(lengths, (4, 2), torch.bfloat16, "cuda", **options), as_users_get_it)


def test_what_lies_after_packed_sequences_of_real_lengths(as_users_get_it):
    check_neighbours(((200, 333), (5, 3)), "cuda", 64, as_users_get_it)


@pytest.mark.parametrize("width", [64, 128])
def test_portable_kernels_at_real_sizes(width, monkeypatch):
    monkeypatch.setattr(tiles, "is_hopper", lambda device: False)
    problem = make((331, 523), (4, 2), (width, width), torch.bfloat16, "cuda", mask=MASKS["causal"])
    problem.scale = width**-0.5
    check(problem, True)


def test_more_tiles_than_multiprocessors():
    # 384 of queries and 192 of keys: programs take several, and in no fixed order.
    shape = (1500, 1500), (16, 8), (128, 128), torch.bfloat16, "cuda"
    problem = make(*shape, mask=Mask(causal=True, left=300), scale=128**-0.5)
    check(problem, True)
    out, lse, _ = oracle(problem, torch.bfloat16)
    check_deterministic(lambda: gradients(problem, out, lse, True))


@HOPPER_KERNELS
def test_more_than_two_to_the_31_elements(width, as_users_get_it):
    # With a window, the last gradients are those of the last tokens alone.
    tokens, tail, mask = 2**20 + 128, 512, Mask(causal=True, left=100)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(
        1, tail, 2048 // width, width, generator=generator, device="cuda", dtype=torch.bfloat16
    )
    problem = Problem(x, x, x, x, mask=mask, scale=0.1)
    out, lse = attention(x.float(), x.float(), x.float(), problem)
    short = gradients(problem, out, lse, as_users_get_it)
    x = x.repeat(1, tokens // tail + 1, 1, 1)[:, -tokens:]
    out = out.to(x.dtype).repeat(1, tokens // tail + 1, 1, 1)[:, -tokens:]
    lse = lse.repeat(1, 1, tokens // tail + 1)[:, :, -tokens:]
    assert x.numel() > 2**31
    long = gradients(Problem(x, x, x, x, mask=mask, scale=0.1), out, lse, as_users_get_it)
    for a, b in zip(long, short, strict=True):
        torch.testing.assert_close(a[:, -256:], b[:, -256:], rtol=2e-2, atol=2e-2)
