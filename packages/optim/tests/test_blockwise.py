"""Codes of 8 bits: their precision, what becomes of zeros and NaN, v's mean, layouts."""

import pytest
import torch

from tilewright_optim._blockwise import (
    BLOCK,
    dequantize_signed,
    dequantize_square,
    num_blocks,
    quantize_signed,
    quantize_square,
)
from tilewright_optim._rounding import random_bits


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(x, step=1):
    return random_bits(x.numel(), 0, torch.tensor(step))


@pytest.mark.parametrize("shape", [(), (1,), (BLOCK,), (BLOCK + 1,), (3, 170), (0,), (0, 4)])
def test_signed_is_the_nearest_code(shape):
    m = draw(*shape)
    code, scale = quantize_signed(m)
    assert code.dtype == torch.int8
    assert code.shape == m.shape
    assert scale.shape == (num_blocks(m.numel()),)
    back = dequantize_signed(code, scale)
    # On the scale of roots, codes are 1 / 127 apart.
    root = scale.repeat_interleave(BLOCK)[: m.numel()].view(shape)
    ours, exact = ((t.sign() * (t.abs() / root).sqrt()) for t in (back, m))
    assert ((ours - exact).abs() <= 0.5 / 127 + 1e-6).all()
    again = quantize_signed(back)
    assert torch.equal(again[0], code)
    torch.testing.assert_close(again[1], scale, rtol=3e-7, atol=0)


@pytest.mark.parametrize("shape", [(), (BLOCK,), (BLOCK + 1,), (3, 170), (0,)])
def test_square_takes_one_of_the_codes_around(shape):
    v = draw(*shape).square()
    code, scale = quantize_square(v, words(v))
    assert code.dtype == torch.uint8
    back = dequantize_square(code, scale)
    top = scale.repeat_interleave(BLOCK)[: v.numel()].view(shape)
    ours, exact = ((t / top) ** 0.25 * 255 for t in (back, v))
    assert ((ours - exact).abs() <= 1 + 1e-3).all()
    assert (back > 0).all()


def test_square_is_right_in_the_mean():
    # What a step changes is less than a code: the mean must not stay behind.
    v = torch.linspace(1e-4, 1.0, BLOCK)
    draws = [dequantize_square(*quantize_square(v, words(v, step))) for step in range(4000)]
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert ((mean - v).abs() <= 5 * spread / 4000**0.5 + 2e-4 * v).all()


def test_the_largest_keeps_its_value():
    m = draw(4, BLOCK)
    back = dequantize_signed(*quantize_signed(m))
    largest = m.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), m.gather(1, largest), rtol=3e-7, atol=0)
    v = m.square()
    back = dequantize_square(*quantize_square(v, words(v)))
    torch.testing.assert_close(back.gather(1, largest), v.gather(1, largest), rtol=3e-7, atol=0)


def test_zeros_stay_and_others_do_not_become_zero():
    v = torch.zeros(2 * BLOCK)
    v[0], v[1] = 1.0, 1e-20
    for step in range(20):
        code, scale = quantize_square(v, words(v, step))
        back = dequantize_square(code, scale)
        assert back[1] > 0
        assert not back[2:].any()
    assert scale.tolist() == [1.0, 0.0]


def test_nan_is_not_hidden():
    m = draw(2 * BLOCK)
    m[3] = torch.nan
    code, scale = quantize_signed(m)
    assert not dequantize_signed(code, scale)[:BLOCK].isfinite().any()
    assert dequantize_signed(code, scale)[BLOCK:].isfinite().all()
    code, scale = quantize_square(m.square(), words(m))
    assert not dequantize_square(code, scale)[:BLOCK].isfinite().any()


def test_blocks_follow_memory():
    m = draw(40, 30)
    code, scale = quantize_signed(m.T.contiguous().T)
    expected, expected_scale = quantize_signed(m.T.contiguous())
    assert code.stride() == (1, 40)
    assert torch.equal(code, expected.T)
    assert torch.equal(scale, expected_scale)
