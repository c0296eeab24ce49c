"""The short way to launch tells apart what Triton does, and computes what the long way does."""

import pytest
import torch

from tilewright_kernels._launcher import _describe
from tilewright_kernels._operator import Operator
from tilewright_kernels._triton import tl, triton


@triton.jit
def _affine_kernel(x_ptr, bias_ptr, y_ptr, n, offset, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + cols, mask=cols < n) * SCALE + offset
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < n)
    tl.store(y_ptr + cols, y, mask=cols < n)


_AFFINE = Operator("affine")


def affine(x, bias, offset, scale):
    y = torch.full_like(x, torch.nan)
    grid = (triton.cdiv(len(x), 128),)
    arguments = (x, bias, y, len(x), offset)
    _AFFINE.launch(_affine_kernel, grid, *arguments, SCALE=scale, BLOCK=128, num_warps=1)
    return y


def test_integers_are_told_apart_as_triton_does():
    groups = [[1], [16, 32, 0], [3, 17], [2**31, 2**40], [2**31 + 1]]
    codes = [{tuple(_describe((n,))[1]) for n in group} for group in groups]
    assert all(len(group) == 1 for group in codes), codes
    assert len(set.union(*codes)) == len(groups), codes


def test_tensors_are_told_apart_by_dtype_and_alignment():
    x = torch.zeros(64)
    kinds = [x, x[1:], x.half(), None]
    codes = [tuple(_describe((kind,))[1]) for kind in kinds]
    assert len(set(codes)) == len(kinds), codes
    assert _describe((x[4:],))[1] == _describe((x,))[1]
    assert _describe((x[1:],))[0] == [x.data_ptr() + 4]


@pytest.mark.parametrize("argument", [1.5, True, "text"], ids=str)
def test_other_arguments_are_left_to_triton(argument):
    assert _describe((torch.zeros(1), argument)) is None


def test_first_and_later_launches_agree(device):
    x = torch.randn(300, device=device)
    bias = torch.randn(300, device=device)
    for offset in (1, 3, 16):
        for scale in (2.0, 3.0):
            for given in (None, bias, bias[:299]):
                expected = x[: len(given)] if given is not None else x
                expected = expected * scale + offset + (0 if given is None else given)
                for _ in range(3):
                    actual = affine(x[: len(expected)], given, offset, scale)
                    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_later_launches_do_not_bind_arguments(monkeypatch):
    x = torch.randn(256, device="cuda")
    affine(x, None, 5, 2.0)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", None)
    torch.testing.assert_close(affine(x, None, 7, 2.0), x * 2 + 7)


@pytest.mark.gpu
def test_a_profilers_hook_sees_every_launch():
    x = torch.randn(256, device="cuda")
    affine(x, None, 5, 2.0)
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        affine(x, None, 5, 2.0)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 1
