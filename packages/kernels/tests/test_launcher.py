"""The short way to launch tells apart what Triton does, and computes what the long way does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilewright_kernels import _launcher
from tilewright_kernels._launch import cdiv
from tilewright_kernels._launcher import _describe, launch
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
    grid = (cdiv(len(x), 128),)
    arguments = (x, bias, y, len(x), offset)
    _AFFINE.launch(_affine_kernel, grid, *arguments, SCALE=scale, BLOCK=128, num_warps=1)
    return y


def described(*args, device=-1):
    found = _describe(args, device)
    assert found is not None
    return found


INTEGERS = [0, 1, -1, 3, 16, -16, 17, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, -(2**40)]


def test_integers_are_told_apart_as_triton_does():
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    backend = pytest.importorskip("triton.backends.compiler").BaseBackend
    for a in INTEGERS:
        for b in INTEGERS:
            tritons = [specialize(backend, n, False, True, True) for n in (a, b)]
            ours = [described(n)[1] for n in (a, b)]
            assert (ours[0] == ours[1]) == (tritons[0] == tritons[1]), (a, b)


def test_tensors_are_told_apart_by_dtype_and_alignment():
    x = torch.zeros(64)
    kinds = [x, x[1:], x.half(), None]
    codes = [tuple(described(kind)[1]) for kind in kinds]
    assert len(set(codes)) == len(kinds), codes
    assert described(x[4:])[1] == described(x)[1]
    assert described(x[1:])[0] == [x.data_ptr() + 4]


def test_floats_are_all_of_one_kind():
    assert described(1.5)[0] == [1.5]
    assert described(1.5)[1] == described(1.0)[1] != described(1)[1]


@pytest.mark.parametrize("argument", [True, "text", 2**63], ids=str)
def test_other_arguments_are_left_to_triton(argument):
    assert _describe((torch.zeros(1), argument), -1) is None


def test_tensors_elsewhere_are_left_to_triton():
    assert _describe((torch.zeros(1),), 0) is None


class CudaLauncher:
    """A stand-in for Triton's, on a machine without CUDA: notes what it was to launch."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, binary, launched):
        self.launch = lambda *args: launched.append((binary, args[-3:]))


class Kernel:
    """A stand-in for a kernel (x_ptr, n, SCALE): each set of constants is a binary of its own."""

    arg_names = ("x_ptr", "n", "SCALE")

    def __init__(self, name, launched, signature=("*fp32", "i32", "constexpr")):
        self.name, self.launched, self.compilations = name, launched, 0
        self.signature = dict(zip(self.arg_names, signature, strict=True))

    def __getitem__(self, grid):
        def run(x, n, **meta):
            self.compilations += 1
            binary = (self.name, repr(meta.get("SCALE")))
            self.launched.append((binary, None))
            source = SimpleNamespace(signature=self.signature)
            launcher = CudaLauncher(binary, self.launched)
            return SimpleNamespace(run=launcher, src=source, function=0, packed_metadata=())

        return run


@pytest.fixture
def launched(monkeypatch):
    """(binary, last three arguments; None of a launch by Triton) of every launch."""
    monkeypatch.setattr(_launcher, "_watched", lambda kernel: False)
    monkeypatch.setattr(_launcher, "_KNOWN_VERSION", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return []


def start(kernel, n=3, **meta):
    x = torch.zeros(64)
    launch(kernel, (1,), (x, n), meta, -1)
    return x


def test_constants_that_a_dict_takes_for_one_are_told_apart(launched):
    kernel = Kernel("k", launched)
    for scale in (1, 1.0, True, 1, 1.0, True):
        start(kernel, SCALE=scale)
    assert [binary[1] for binary, _ in launched] == ["1", "1.0", "True"] * 2
    assert kernel.compilations == 3


def test_the_second_launch_passes_addresses_and_numbers(launched):
    kernel = Kernel("k", launched)
    start(kernel, 3, SCALE=2)
    x = start(kernel, 5, SCALE=2)
    assert launched[1] == (("k", "2"), (x.data_ptr(), 5, 2))


def test_a_kernel_that_is_gone_is_not_launched_for_another(launched):
    for name in range(50):
        start(Kernel(name, launched), SCALE=2)
        start(Kernel(name + 1000, launched), SCALE=2)
    names = [binary[0] for binary, _ in launched]
    assert names == [n for name in range(50) for n in (name, name + 1000)]


def test_what_no_dict_can_hold_goes_to_triton(launched):
    kernel = Kernel("k", launched)
    for _ in range(2):
        start(kernel, SCALE=[2])
    assert kernel.compilations == 2


def test_a_tensor_given_for_a_number_is_left_to_triton(launched):
    kernel = Kernel("k", launched, signature=("fp32", "i32", "constexpr"))
    for _ in range(2):
        start(kernel, SCALE=2)
    assert kernel.compilations == 2


def test_an_unknown_version_is_left_to_triton(launched, monkeypatch):
    monkeypatch.setattr(_launcher, "_KNOWN_VERSION", False)
    kernel = Kernel("k", launched)
    for _ in range(2):
        start(kernel, SCALE=2)
    assert kernel.compilations == 2


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
    seen: list[Any] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata)

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        affine(x, None, 5, 2.0)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 1
