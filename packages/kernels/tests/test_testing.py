"""The checks themselves: each must fail on the fault that it is there for."""

import pytest
import torch

from tilewright_kernels import rms_norm, rms_norm_reference, use_backend
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    layouts,
    poisoned_memory,
)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 8, generator=generator, dtype=dtype).requires_grad_()]


def ours(x):
    return rms_norm(x, (8,))


def reference(x):
    return rms_norm_reference(x, (8,))


def test_torch_against_torch_is_refused():
    # The reference in place of the kernel is exact, and launches nothing.
    with pytest.raises(AssertionError, match="launched no kernel"):
        check_against_float64(reference, reference, inputs(), operator="rms_norm")
    with pytest.raises(AssertionError, match="launched no kernel"):
        check_gradients(reference, inputs(torch.float64), operator="rms_norm")
    with pytest.raises(AssertionError):
        check_compiles(reference, inputs(), operator="rms_norm")


def test_a_wrong_value_is_refused():
    with pytest.raises(AssertionError, match="output 0: error"):
        check_against_float64(lambda x: ours(x) * 1.001, reference, inputs(), operator="rms_norm")


def test_a_wrong_gradient_is_refused():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return 1.001 * grads[0]

    def wrong(x):
        return ours(WrongGradient.apply(x))

    with pytest.raises(AssertionError, match="gradient 0: error"):
        check_against_float64(wrong, reference, inputs(), operator="rms_norm")
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check_gradients(wrong, inputs(torch.float64), operator="rms_norm")


def test_nan_shape_and_dtype_are_refused():
    good = torch.ones(3)
    oracle = good.double()
    assert_as_accurate(good, good, oracle)
    for bad in (
        torch.tensor([1.0, torch.nan, 1.0]),
        torch.tensor([1.0, torch.inf, 1.0]),
        torch.ones(1, 3),
        torch.ones(3, dtype=torch.float16),
    ):
        with pytest.raises(AssertionError):
            assert_as_accurate(bad, good, oracle)


def test_twice_torchs_error_is_allowed_and_no_more():
    oracle = torch.ones(3, dtype=torch.float64)
    torchs = torch.full((3,), 1.001)
    assert_as_accurate(torch.full((3,), 0.9981), torchs, oracle)
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.full((3,), 0.9979), torchs, oracle)


def test_changing_bits_are_refused():
    values = iter((torch.ones(3), torch.ones(3) + 1e-7))
    with pytest.raises(AssertionError, match="bits differ in 3 of 3"):
        check_deterministic(lambda: [next(values)])


def test_poisoned_memory_is_nan_and_restored(device):
    with poisoned_memory():
        assert torch.empty(5, device=device).isnan().all()
        assert torch.empty_like(torch.ones(5, device=device)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_launches_are_counted_per_block():
    with use_backend("triton"), count_launches() as outer:
        ours(*inputs())
        with count_launches() as inner:
            ours(*inputs())
    assert (outer["rms_norm"], inner["rms_norm"]) == (2, 1)


def test_layouts_hold_the_same_values(device):
    tensors = dict(layouts((4, 6), torch.float32, device))
    expanded = tensors.pop("expanded rows")
    first = tensors["contiguous"]
    assert all(torch.equal(t, first) for t in tensors.values())
    assert torch.equal(expanded, first[:1].expand(4, 6))
    assert len({t.stride() for t in (*tensors.values(), expanded)}) == 5
