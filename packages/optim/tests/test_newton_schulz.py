"""newton_schulz: against float64, torch.optim's own, singular values, both forms, odd shapes."""

from typing import Any

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from tilewright_kernels import use_backend
from tilewright_kernels.testing import FLOATING, count_launches, layouts, no_synchronization
from tilewright_optim import _newton_schulz_products as products
from tilewright_optim import newton_schulz, newton_schulz_reference
from tilewright_optim._coefficients import NAMED, QUINTIC, triples

FORMS = ("standard", "gram")
SHAPES = ((48, 48), (40, 72), (72, 40), (33, 70))  # square, wide, tall, not a multiple of 8


@pytest.fixture(autouse=True, params=[True, False], ids=["half", "full"])
def half_products(request, monkeypatch):
    """The products that only large matrices get, too; small ones get torch's."""
    if request.param:
        monkeypatch.setattr(products, "_few", lambda batch, n: False)


def spectrum(rows: int, cols: int, kind: str, seed: int = 0):
    """A matrix [rows, cols] whose singular values fall as the name says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if kind == "gaussian":
        return x.float()
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    k = torch.arange(min(rows, cols))
    s = {"exponential": torch.exp(-14.0 * k / len(k)), "power": 1 / (1.0 + k)}[kind]
    return ((u * s) @ v).float()


def error(y, oracle):
    return ((y.double().cpu() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gaussian", "exponential", "power"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_torchs(shape, kind, form, device):
    rows, cols = shape
    x = spectrum(rows, cols, kind).to(device)
    oracle = newton_schulz_reference(x.double()).cpu()
    torchs = _zeropower_via_newtonschulz(x, QUINTIC, 5, 1e-7)
    with use_backend("triton"):
        ours = newton_schulz(x, form=form)
    assert error(ours, oracle) <= 2 * error(torchs, oracle)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "coefficients", ["polar_express", [QUINTIC] * 7, (1.5, -0.5, 0.0)], ids=str
)
def test_coefficients(coefficients, form, device):
    x = spectrum(40, 72, "gaussian").to(device)
    steps = 7 if isinstance(coefficients, list) else 5
    oracle = newton_schulz_reference(x.double(), coefficients=coefficients, steps=steps).cpu()
    with use_backend("triton"):
        ours = newton_schulz(x, coefficients=coefficients, steps=steps, form=form)
    # In bfloat16 it would be 1e-2 to 1e-1; the quintic never settles, so more steps add up.
    assert error(ours, oracle) < (6e-3 if steps == 5 else 1.2e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("quintic", 0.66, 1.15), ("polar_express", 0.83, 1.16)]
)
def test_singular_values_are_in_the_band(coefficients, low, high, form, device):
    x = spectrum(48, 96, "gaussian").to(device)
    with use_backend("triton"):
        y = newton_schulz(x, coefficients=coefficients, form=form)
    s = torch.linalg.svdvals(y.double())
    assert low < s.min()
    assert s.max() < high


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_steps(steps, form, device):
    x = spectrum(24, 40, "gaussian").to(device)
    with use_backend("triton"):
        ours = newton_schulz(x, steps=steps, form=form)
    oracle = newton_schulz_reference(x.double(), steps=steps).cpu()
    assert error(ours, oracle) < 6e-3


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 3, 5, 7), (3, 8, 4)], ids=str)
def test_small_shapes_and_batches(shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    with use_backend("triton"):
        ours = newton_schulz(x)
    oracle = newton_schulz_reference(x.double()).cpu()
    assert ours.shape == x.shape
    assert error(ours, oracle) < 6e-3


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty(shape, backend, device):
    with use_backend(backend):
        assert newton_schulz(torch.ones(shape, device=device)).shape == shape


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_zeros_stay_zeros_and_sizes_do_not_matter(backend, device):
    x = spectrum(8, 12, "gaussian").to(device)
    batch = torch.stack([torch.zeros_like(x), x * 1e15, x * 1e-6, x])
    with use_backend(backend):
        y = newton_schulz(batch, eps=1e-12)
    assert torch.equal(y[0], batch[0])
    torch.testing.assert_close(y[1], y[3], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(y[2], y[3], rtol=1e-2, atol=2e-3)


def test_nan_stays_in_its_matrix(device):
    x = spectrum(8, 12, "gaussian").to(device)
    batch = torch.stack([x, torch.full_like(x, torch.nan), x])
    with use_backend("triton"):
        y = newton_schulz(batch)
    assert y[1].isnan().all()
    assert torch.equal(y[0], y[2])
    assert y[0].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dtypes(dtype, device):
    x = spectrum(16, 24, "gaussian").to(device, dtype)
    with use_backend("triton"), count_launches() as launches, no_synchronization():
        y = newton_schulz(x)
    assert launches["newton_schulz"] == 1
    assert y.dtype == dtype
    assert error(y, newton_schulz_reference(x.double()).cpu()) < 1e-2


def test_layouts(device):
    for name, x in layouts((3, 10, 16), torch.float32, device):
        before = x.clone()
        with use_backend("triton"):
            y = newton_schulz(x)
        assert error(y, newton_schulz_reference(x.double()).cpu()) < 6e-3, name
        assert torch.equal(x, before)


def test_reference_orthogonalizes():
    # The cubic iteration converges to U·Vᵀ; 40 steps bring the least singular value up.
    x = spectrum(6, 9, "gaussian").double()
    y = newton_schulz_reference(x, steps=40, coefficients=(1.5, -0.5, 0.0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(y, u @ v)
    torch.testing.assert_close(
        newton_schulz_reference(x.mT, steps=40, coefficients=(1.5, -0.5, 0.0)), y.mT
    )


def test_gram_form_for_wide_matrices():
    assert not products.gram_is_less(1536, 1536, 5)
    assert products.gram_is_less(1536, 4096, 5)
    assert not products.gram_is_less(1536, 4096, 1)


def test_triples():
    assert triples("quintic", 3) == (QUINTIC,) * 3
    express = NAMED["polar_express"]
    assert triples("polar_express", 7) == (*express, express[-1], express[-1])
    assert triples([(1, 2, 3), (4, 5, 6)], 3) == ((1, 2, 3), (4, 5, 6), (4, 5, 6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x\[None\]"),
        ({"x": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "x.float"),
        ({"form": "best"}, ValueError, "auto, standard, gram"),
        ({"coefficients": "cubic"}, ValueError, "quintic, polar_express"),
        ({"coefficients": (1.0, 2.0)}, ValueError, "list of such triples"),
        ({"coefficients": []}, ValueError, "list of such triples"),
        ({"steps": 100}, ValueError, "from 0 to 99"),
        ({"steps": -1}, ValueError, "from 0 to 99"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    given: dict[str, Any] = {"x": torch.ones(3, 4), **arguments}
    with pytest.raises(error, match=message):
        newton_schulz(given.pop("x"), **given)
