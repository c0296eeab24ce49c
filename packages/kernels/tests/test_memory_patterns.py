"""memory_patterns: every kernel against float64 and finite differences, copies bit by bit."""

import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import memory_patterns as patterns
from tilewright_kernels import use_backend
from tilewright_kernels.memory_patterns import (
    bandwidth_report,
    copy_misaligned,
    copy_reference,
    copy_strided,
    copy_tiled,
    multiply_add,
    multiply_add_reference,
    scale,
    scale_reference,
    sum_reference,
    sum_tree,
    transpose_naive,
    transpose_reference,
    transpose_tiled,
    vector_add,
    vector_add_reference,
)
from tilewright_kernels.testing import (
    FLOATING,
    ROW_SHAPES,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    no_synchronization,
    poisoned_memory,
)

# Public name: function, reference, number of tensors.
PATTERNS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "vector_add": (vector_add, vector_add_reference, 2),
    "multiply_add": (
        lambda x, y: multiply_add(x, 0.1, y),
        lambda x, y: multiply_add_reference(x, 0.1, y),
        2,
    ),
    "scale": (lambda x: scale(x, 0.1), lambda x: scale_reference(x, 0.1), 1),
    "copy_coalesced": (patterns.copy_coalesced, copy_reference, 1),
    "copy_misaligned": (lambda x: copy_misaligned(x, 5), copy_reference, 1),
    "copy_strided": (lambda x: copy_strided(x, 7), copy_reference, 1),
    "copy_tiled": (copy_tiled, copy_reference, 1),
    "transpose_naive": (
        lambda x: transpose_naive(x.view(-1, x.shape[-1])),
        lambda x: transpose_reference(x.view(-1, x.shape[-1])),
        1,
    ),
    "transpose_tiled": (
        lambda x: transpose_tiled(x.view(-1, x.shape[-1])),
        lambda x: transpose_reference(x.view(-1, x.shape[-1])),
        1,
    ),
    **{
        name: (getattr(patterns, name), sum_reference, 1)
        for name in ("sum_one_program", "sum_atomic", "sum_tree", "sum_persistent")
    },
}
NAMES = pytest.mark.parametrize("name", PATTERNS)
SHAPES = (
    *ROW_SHAPES,
    (70, 130),  # several of the largest blocks
)


def make(shape, dtype, device, tensors=1):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(tensors)
    ]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@NAMES
def test_matches_float64(name, dtype, device):
    function, reference, tensors = PATTERNS[name]
    for shape in SHAPES:
        inputs = make(shape, dtype, device, tensors)
        check_against_float64(function, reference, inputs, operator=name)


@pytest.mark.smoke
def test_references_are_torchs(device):
    x, y = make((6, 40), torch.float32, device, 2)
    assert torch.equal(vector_add(x, y), x + y)
    torch.testing.assert_close(multiply_add(x, 3.0, y), 3 * x + y)
    assert torch.equal(transpose_tiled(x), x.T)
    torch.testing.assert_close(sum_tree(x), x.sum())


@NAMES
def test_layouts(name, device):
    function, reference, tensors = PATTERNS[name]
    for _, x in layouts((6, 10), torch.float32, device):
        # Expanded or strided in one input, contiguous in the other.
        inputs = [x, *make((6, 10), torch.float32, device, tensors - 1)]
        check_against_float64(function, reference, inputs[:tensors], operator=name)


# Every bit of a copy is its source's, of NaNs and negative zeros too.
@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), step=st.integers(1, 200))
def test_copies_have_the_same_bits(n, step):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(n)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator, dtype=torch.int32)
    x = bits.to(device).view(torch.float32)
    with use_backend("triton"), poisoned_memory():
        for copy in (copy_misaligned(x, step - 1), copy_strided(x, step), copy_tiled(x, 1)):
            assert torch.equal(copy.view(torch.int32), x.view(torch.int32))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(0, 80), columns=st.integers(1, 1500), pad=st.integers(0, 3))
def test_any_matrix_is_transposed(rows, columns, pad):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = make((rows, columns + pad), torch.float32, device)[0].detach()[:, pad:]
    with use_backend("triton"), poisoned_memory():
        for transpose in (transpose_naive, transpose_tiled):
            assert torch.equal(transpose(x), x.T)


def test_a_tree_of_many_levels(monkeypatch, device):
    # 16 a block: 5000 elements, 313 sums, 20, 2, 1.
    monkeypatch.setattr(import_module("tilewright_kernels.memory_patterns.reduce"), "BLOCK", 16)
    for name in ("sum_tree", "sum_persistent", "sum_one_program"):
        function, reference, _ = PATTERNS[name]
        inputs = make((5000,), torch.bfloat16, device)
        check_against_float64(function, reference, inputs, operator=name)


@NAMES
def test_gradcheck(name):
    function, _, tensors = PATTERNS[name]
    inputs = make((3, 5), torch.float64, torch.device("cpu"), tensors)
    check_gradients(function, inputs, operator=name)


def test_gradient_of_one_input_only(device):
    x, y = make((3, 5), torch.float32, device, 2)
    with use_backend("triton"):
        (dy,) = torch.autograd.grad(multiply_add(x.detach(), 3.0, y).sum(), y)
        (dx,) = torch.autograd.grad(multiply_add(x, 3.0, y.detach()).sum(), x)
    assert (dy == 1).all()
    assert (dx == 3).all()


@NAMES
def test_compiles(name, device):
    function, _, tensors = PATTERNS[name]
    check_compiles(function, make((5, 16), torch.float32, device, tensors), operator=name)


@NAMES
def test_opcheck(name, device):
    _, _, tensors = PATTERNS[name]
    x, *y = make((5, 16), torch.float32, device, tensors)
    number = {"scale": [0.5], "multiply_add": [0.5], "copy_tiled": [2]}.get(name, [])
    number = [3] if name in ("copy_misaligned", "copy_strided") else number
    torch.library.opcheck(
        getattr(torch.ops.tilewright, f"{name}_forward").default, (x, *number, *y)
    )


@pytest.mark.filterwarnings("ignore:sum_atomic is not deterministic")
@NAMES
def test_every_element_is_written_and_bits_repeat(name, device):
    function, _, tensors = PATTERNS[name]
    inputs = make((70, 130), torch.float32, device, tensors)

    def run():
        y = function(*inputs)
        return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        if name != "sum_atomic":  # its order is the programs' order of arrival
            check_deterministic(run)


def test_report_has_a_line_for_every_pattern(device):
    lines = bandwidth_report(device, megabytes=1)
    assert lines[0].share == 1
    assert all(line.gb_per_s > 0 and line.share > 0 for line in lines)
    named = {line.pattern.split("(")[0] for line in lines}
    assert named == {"out.copy_", *PATTERNS}


def test_report_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory_patterns", "1"])
    runpy.run_module("tilewright_kernels.memory_patterns", run_name="__main__")
    printed = capsys.readouterr().out
    assert "GB/s" in printed
    assert "transpose_tiled(x)" in printed


@pytest.mark.gpu
@NAMES
def test_nothing_waits_for_the_device(name):
    function, _, tensors = PATTERNS[name]
    inputs = make((70, 130), torch.float32, torch.device("cuda"), tensors)
    with no_synchronization():
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # Offsets that int32 cannot hold: 4 GiB in, 4 GiB out.
    x = torch.randn(2**10, device="cuda", dtype=torch.bfloat16).repeat(2**21 + 3)
    assert torch.equal(vector_add(x, x)[-5000:], 2 * x[-5000:])
    for copy in (copy_misaligned(x, 3), copy_strided(x, 2**16), copy_tiled(x)):
        assert torch.equal(copy[-5000:], x[-5000:])
        del copy
    square = x[: 2**31].view(2**10, 2**21)
    assert torch.equal(transpose_tiled(square)[-100:], square.T[-100:])
    assert torch.equal(transpose_naive(square)[-100:], square.T[-100:])
    expected = x[: 2**10].double().sum() * (len(x) // 2**10)
    for name in ("sum_atomic", "sum_tree", "sum_persistent"):
        ours = getattr(patterns, name)(x.view(-1, 2**10))
        torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    for name, (function, reference, tensors) in PATTERNS.items():
        inputs = make((5, 16), torch.float32, torch.device("cuda:1"), tensors)
        check_against_float64(function, reference, inputs, operator=name)


def test_bad_input(device):
    x, y = make((5, 16), torch.float32, device, 2)
    with pytest.raises(ValueError, match=r"x has shape \(5, 16\) and y \(5,\)"):
        vector_add(x, y[:, 0])
    with pytest.raises(
        TypeError, match=r"x is torch.float32 and y torch.float16.*to\(torch.float32"
    ):
        multiply_add(x, 2.0, y.half())
    with pytest.raises(ValueError, match=r"x on .*, y on meta"):
        vector_add(x, y.to("meta"))
    integers = torch.ones(4, dtype=torch.int64, device=device)
    for function in (lambda x: scale(x, 2.0), copy_tiled, sum_tree, transpose_tiled):
        with pytest.raises(TypeError, match=r"x is torch.int64.*to\(torch.bfloat16\)"):
            function(integers)
    for transpose in (transpose_naive, transpose_tiled):
        with pytest.raises(ValueError, match=r"x has shape \(80,\); give a matrix"):
            transpose(x.flatten())
    with pytest.raises(ValueError, match="shift is -1"):
        copy_misaligned(x, -1)
    with pytest.raises(ValueError, match="stride is 0"):
        copy_strided(x, 0)
    with pytest.raises(ValueError, match="stages is 0"):
        copy_tiled(x, 0)
    number: Any = torch.tensor(3.0)
    for function in (lambda: scale(x, number), lambda: multiply_add(x, number, y)):
        with pytest.raises(TypeError, match=r"alpha is a Tensor; give a number, .*float\(alpha\)"):
            function()


def test_more_programs_than_a_launch_has(device):
    # Expanded, so that 2³¹ elements take no memory before the check.
    x = torch.ones(1, 1, device=device).expand(2**31, 1)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"2147483648 programs.* take transpose_tiled"):
            transpose_naive(x)
        with pytest.raises(ValueError, match=r"2147483648 programs.* smaller stride"):
            copy_strided(x, 2**31)


def test_atomic_sum_heeds_a_call_for_determinism(device):
    x = torch.ones(8, device=device)
    try:
        with use_backend("triton"):
            torch.use_deterministic_algorithms(True)
            with pytest.raises(RuntimeError, match=r"sum_atomic is not deterministic; sum_tree"):
                patterns.sum_atomic(x)
            torch.use_deterministic_algorithms(True, warn_only=True)
            with pytest.warns(UserWarning, match="sum_atomic is not deterministic"):
                assert patterns.sum_atomic(x) == 8
    finally:
        torch.use_deterministic_algorithms(False)
