"""commuting_matmul: against float64, symmetry to the bit, and gradients."""

from typing import Any

import pytest
import torch

from tilewright_kernels import commuting_matmul, commuting_matmul_reference, use_backend
from tilewright_kernels._triton import INTERPRETED
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    floor,
    poisoned_memory,
)

# The interpreter multiplies the bits of bfloat16.
DOT_DTYPES = tuple(d for d in FLOATING if not (INTERPRETED and d == torch.bfloat16))
SHAPES = (
    (1, 1),  # the smallest there is
    (7, 7),  # odd: pointers
    (2, 3, 33, 33),  # two dimensions of batch, one row past two tiles
    (2, 72, 72),  # an odd number of rows of tiles, the last one half empty
    (0, 16, 16),  # no matrix
    (2, 0, 0),  # no rows
)


def product(a, b, c):
    return commuting_matmul(a, b, alpha=-0.7, beta=2.1, c=c)


def reference(a, b, c):
    return commuting_matmul_reference(a, b, alpha=-0.7, beta=2.1, c=c)


def make(shape, dtype, device, seed=0):
    """Three polynomials of one symmetric matrix, of a norm about 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    s = (x + x.mT) / (4 * max(1, shape[-1]) ** 0.5)
    s2 = s @ s
    made = (s + 0.3 * s2, 0.5 * s - s2, s2 - s)
    return [t.to(device, dtype).requires_grad_() for t in made]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, small_triangle_tiles, device):
    inputs = make(shape, dtype, device)
    if dtype in (torch.float16, torch.bfloat16):
        # Rounded, they commute only nearly: which half is computed then shows.
        a, b, c = (t.detach() for t in inputs)
        with use_backend("triton"):
            ours = product(a, b, c)
        whole = reference(a.double(), b.double(), c.double())
        torch.testing.assert_close(
            ours.double().tril(), whole.tril(), rtol=2 * floor(dtype), atol=2 * floor(dtype)
        )
        return
    check_against_float64(product, reference, inputs, operator="commuting_matmul")


@pytest.mark.parametrize("shape", [(2, 72, 72), (2, 41, 41)], ids=["descriptors", "pointers"])
def test_symmetric_to_the_bit_and_repeatable(shape, small_triangle_tiles, device):
    # Upper halves, which c has and nobody reads, hold NaN.
    a, b, c = (t.detach() for t in make(shape, torch.float16, device))
    c = c.tril() + torch.full_like(c, torch.nan).triu(1)
    with use_backend("triton"), poisoned_memory():
        y = product(a, b, c)
        check_deterministic(lambda: [product(a, b, c)])
    assert y.isfinite().all()
    assert torch.equal(y, y.mT)


def test_the_lower_triangle_of_the_product_counts(small_triangle_tiles, device):
    # For matrices that do not commute: A·Bᵀ below the diagonal, in both kernels.
    for size in (40, 41):
        generator = torch.Generator().manual_seed(1)
        a, b = (
            (torch.randn(2, size, size, generator=generator) / size).to(device, torch.float16)
            for _ in range(2)
        )
        with use_backend("triton"):
            y = commuting_matmul(a, b)
        whole = (a.float() @ b.float().mT).half()
        torch.testing.assert_close(y.tril(), whole.tril(), rtol=2e-3, atol=1e-4)
        assert torch.equal(y, y.mT)


def test_one_operand_in_columns(small_triangle_tiles, device):
    # a's rows adjacent in memory, b's columns: one flag of the kernel cannot say both.
    a, b, c = (t.detach() for t in make((2, 40, 40), torch.float16, device))
    with use_backend("triton"):
        torch.testing.assert_close(product(a.mT.contiguous().mT, b, c), product(a, b, c))


def test_gradcheck(small_triangle_tiles):
    inputs = make((2, 5, 5), torch.float64, torch.device("cpu"))

    # Steps of finite differences away from symmetry do not commute: polynomials of one matrix do.
    def polynomial(s):
        return commuting_matmul(s + s.mT, (s + s.mT) @ (s + s.mT), alpha=0.4, beta=-1.2, c=s + s.mT)

    check_gradients(polynomial, inputs[:1], operator="commuting_matmul")


def test_compiles(device):
    check_compiles(product, make((2, 16, 16), torch.float16, device), operator="commuting_matmul")


def test_opcheck(device):
    a, b, c = make((2, 5, 5), torch.float32, device)
    forward = torch.ops.tilewright.commuting_matmul_forward.default
    torch.library.opcheck(forward, (a.detach(), b, c, 0.5, 2.0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": torch.ones(3, 4)}, ValueError, "square"),
        ({"b": torch.ones(2, 3, 3)}, ValueError, "b has shape"),
        ({"b": torch.ones(3, 3).half()}, TypeError, "b.to"),
        ({"beta": 1.0}, ValueError, "no c to scale"),
        ({"alpha": torch.ones(())}, TypeError, "alpha.item"),
        ({"a": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "floating|float16"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    given: dict[str, Any] = {"a": torch.ones(3, 3), "b": torch.ones(3, 3), **arguments}
    with pytest.raises(error, match=message):
        commuting_matmul(given.pop("a"), given.pop("b"), **given)
