"""Halves of exact masters and stochastic rounding: bits, special values, kernels like torch."""

import pytest
import torch

from tilewright_kernels.authoring import tl, triton
from tilewright_optim import _rounding
from tilewright_optim._rounding import join_master, random_bits, split_master, stochastic_round

N = 256
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-42, -1e-45, 3.4028235e38, -3.4028235e38, torch.inf, -torch.inf)


def samples(device):
    """Floats of every exponent, halfway cases of both signs, and special values."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (N,), generator=generator)
    bits[:16] = (bits[:16] & ~0xFFFF) | 0x8000
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.where(x.isnan(), 1.5, x)
    x[-len(SPECIAL) :] = torch.tensor(SPECIAL)
    return x.to(device)


@triton.jit
def _split_kernel(x_ptr, high_ptr, low_ptr, back_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    high, low = _rounding.split_halves(tl.load(x_ptr + at))
    tl.store(high_ptr + at, high)
    tl.store(low_ptr + at, low)
    tl.store(back_ptr + at, _rounding.join_halves(high, low))


@triton.jit
def _round_kernel(x_ptr, y_ptr, words_ptr, seed, step, N: tl.constexpr):
    at = tl.arange(0, N)
    first, second = _rounding.random_keys(tl.full((), seed, tl.int64), tl.full((), step, tl.int64))
    words = _rounding.random_words(at, first, second)
    tl.store(words_ptr + at, words.to(tl.int64))
    tl.store(y_ptr + at, _rounding.stochastic_half(tl.load(x_ptr + at), words))


def bits(x):
    return x.view(torch.int32)


def test_halves_restore_every_bit(device):
    x = samples(device)
    high, low = split_master(x)
    assert torch.equal(bits(join_master(high, low)), bits(x))


def test_high_half_is_the_nearest(device):
    x = samples(device)[: -len(SPECIAL)]
    high = split_master(x)[0]
    error = (high.double() - x.double()).abs()
    others = [(x.bfloat16().view(torch.int16) + d).view(torch.bfloat16) for d in (-1, 0, 1)]
    best = torch.stack([(o.double() - x.double()).abs().nan_to_num(torch.inf) for o in others])
    finite = high.isfinite()
    assert torch.equal(error[finite], best.amin(0)[finite])


def test_ties_go_away_from_zero(device):
    half = torch.tensor([1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8], device=device)
    expected = [1 + 2.0**-7, -1 - 2.0**-7, 1 + 2.0**-6]
    assert split_master(half)[0].tolist() == expected


@pytest.mark.parametrize("nan_bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_nan_stays_nan_in_both(nan_bits, device):
    # The GPU makes 0x7FFFFFFF, whose rounding overflows into the sign: -0 in the weights.
    x = torch.tensor([nan_bits], dtype=torch.int32, device=device).view(torch.float32)
    high, low = split_master(x)
    assert high.isnan().all()
    assert join_master(high, low).isnan().all()
    assert stochastic_round(x, torch.full((1,), 0xFFFFFFFF, device=device)).isnan().all()


def test_halves_of_the_kernel_are_torchs(device):
    x = samples(device)
    x[:4] = torch.nan
    high, low = (torch.empty(N, dtype=torch.int16, device=device) for _ in range(2))
    back = torch.empty_like(x)
    _split_kernel[(1,)](x, high, low, back, N=tl.constexpr(N))
    expected = split_master(x)
    assert torch.equal(high, expected[0].view(torch.int16))
    assert torch.equal(low, expected[1])
    assert torch.equal(bits(back)[4:], bits(x)[4:])


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (7, 123456), (2**31, 2**33 + 5)])
def test_stochastic_rounding_of_the_kernel_is_torchs(seed, step, device):
    x = samples(device)
    x[0] = torch.nan
    y = torch.empty(N, dtype=torch.int16, device=device)
    words = torch.empty(N, dtype=torch.int64, device=device)
    _round_kernel[(1,)](x, y, words, seed, step, N=tl.constexpr(N))
    expected = random_bits(N, seed, torch.tensor(step, device=device))
    assert torch.equal(words, expected)
    assert torch.equal(y, stochastic_round(x, expected).view(torch.int16))


def test_stochastic_rounding_is_right_in_the_mean():
    # 0.3 of the way from 1 to the next bfloat16: 65536 draws are 0.3 within 5 deviations.
    x = torch.full((65536,), 1 + 0.3 * 2**-7)
    y = stochastic_round(x, random_bits(len(x), 3, torch.tensor(11.0)))
    assert set(y.tolist()) == {1.0, 1 + 2**-7}
    assert abs((y.double().mean() - 1) * 2**7 - 0.3) < 5 * (0.21 / 65536) ** 0.5


def test_what_is_representable_stays():
    x = samples("cpu").bfloat16()
    y = stochastic_round(x.float(), random_bits(len(x), 0, torch.tensor(1)))
    assert torch.equal(y.view(torch.int16), x.view(torch.int16))


def test_random_bits_differ_by_element_tensor_and_step():
    draws = [random_bits(4096, seed, torch.tensor(step)) for seed, step in [(0, 1), (0, 2), (1, 1)]]
    for a in draws:
        assert len(a.unique()) > 4090
        assert abs(a.double().mean() / 2**32 - 0.5) < 5 * (1 / 12 / 4096) ** 0.5
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        a, b = (draws[k].double() - draws[k].double().mean() for k in (i, j))
        assert abs((a * b).mean() / (a.std() * b.std())) < 5 / 64
