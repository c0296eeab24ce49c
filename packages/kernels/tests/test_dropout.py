"""dropout and dropout_add: masks bit for bit those of plain torch, values against float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    Dropout,
    dropout,
    dropout_add,
    dropout_add_reference,
    dropout_reference,
    use_backend,
)
from tilewright_kernels._elementwise import ROW_BLOCK
from tilewright_kernels._triton import tl, triton
from tilewright_kernels.dropout import _DROPOUT, BLOCK, philox_reference
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

P, SEED = 0.3, 0x123456789ABCDEF


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def check(x, residual=None):
    """One seed in every dtype is one mask, so the oracle drops what the kernel drops."""
    if residual is None:
        check_against_float64(
            lambda x: dropout(x, P, seed=SEED),
            lambda x: dropout_reference(x, P, seed=SEED),
            [x],
            operator="dropout",
        )
    else:
        check_against_float64(
            lambda x, r: dropout_add(x, r, P, seed=SEED),
            lambda x, r: dropout_add_reference(x, r, P, seed=SEED),
            [x, residual],
            operator="dropout_add",
        )


@triton.jit
def _randint4x_kernel(words_ptr, seed_ptr, first_ptr, N: tl.constexpr):
    words = tl.randint4x(tl.load(seed_ptr), tl.load(first_ptr) + tl.arange(0, N))
    for i in tl.static_range(4):
        tl.store(words_ptr + 4 * tl.arange(0, N) + i, words[i])


def test_philox_is_the_published_one(device):
    # Known answer of Random123 for zeros; other keys and counters by Triton's own generator.
    words = philox_reference(torch.tensor(0), torch.tensor([0]))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    for seed, first in ((1, 0), (SEED, 5), (-SEED, 2**32 - 8), (-1, 2**40 + 3)):
        key, start = torch.tensor(seed, device=device), torch.tensor(first, device=device)
        expected = torch.empty(16, 4, dtype=torch.int32, device=device)
        kernel: Any = _randint4x_kernel
        kernel[(1,)](expected, key, start, N=16)
        words = philox_reference(key, start + torch.arange(16, device=device))
        assert torch.equal(words.to(torch.int32), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_matches_float64(shape, dtype, device):
    check(make(shape, dtype, device))
    check(make(shape, dtype, device), make(shape, dtype, device, seed=1))


# Flat, in rows, and in rows that start within a counter; two whole tiles and a little more.
@pytest.mark.parametrize(
    "shape",
    [(2 * BLOCK + 3,), (3, 2 * ROW_BLOCK + 8), (3, 2 * ROW_BLOCK - 2), (70, 6)],
    ids=str,
)
def test_mask_is_the_references(shape, device):
    wide = torch.ones(*shape[:-1], shape[-1] + 5, device=device)
    for x in (torch.ones(shape, device=device), wide[..., 5:], wide[..., 5:].double()):
        with use_backend("triton"):
            ours = dropout(x, P, seed=SEED)
        assert torch.equal(ours, dropout_reference(x, P, seed=SEED))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 300),
    pad=st.integers(0, 5),
    p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_stride_probability_and_seed(rows, width, pad, p, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.rand(rows, width + pad, device=device)[:, pad:] + 1
    with use_backend("triton"):
        ours = dropout(x, p, seed=seed)
    torch.testing.assert_close(ours, dropout_reference(x, p, seed=seed))
    assert torch.equal(ours != 0, dropout_reference(x, p, seed=seed) != 0)


def test_layouts(device):
    # The mask goes by an element's place in the shape: the same in every memory layout.
    for name, x in layouts((6, 10), torch.float32, device):
        try:
            check(x.requires_grad_())
            check(x, make((6, 10), torch.float32, device))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_rows_are_read_in_place(device, monkeypatch):
    """No copy before a launch: the kernel gets a pointer into the caller's own memory."""
    launched = []
    monkeypatch.setattr(_DROPOUT, "launch", lambda kernel, grid, *args, **m: launched.append(args))
    wide = torch.randn(2, 3, 11, device=device)
    with use_backend("triton"):
        dropout(wide[..., 3:])
    assert launched[0][0].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_frequency_and_expectation(p, device):
    n = 1 << 18
    with use_backend("triton" if device.type == "cuda" else "torch"):
        y = dropout(torch.ones(n, device=device), p, seed=SEED)
    # Five standard deviations of a binomial.
    assert abs((y != 0).double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs(y.double().mean() - 1) < 5 * math.sqrt(p / (1 - p) / n)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))


def test_neighbours_and_seeds_are_independent():
    # The four words of a counter, counters in a row, and seeds in a row: all pairs of masks agree
    # as often as chance has it.
    x = torch.ones(1 << 16)
    masks = [dropout_reference(x, seed=seed) != 0 for seed in (0, 1, 2, 2**32)]
    masks += [masks[0].roll(shift) for shift in (1, 2, 3, 4, 8)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(x))


def test_probability_zero_and_one(device):
    x, residual = make((5, 9), torch.float32, device), make((5, 9), torch.float32, device, seed=1)
    with use_backend("triton"):
        for kept in (dropout(x, 0.0), dropout(x, P, training=False), dropout(x, 2.0**-34)):
            assert kept is x
        assert torch.equal(dropout_add(x, residual, 0.0), x + residual)
        assert torch.equal(dropout_add(x, residual, P, training=False), x + residual)
        y = dropout(x, 1.0)
        assert torch.equal(y, torch.zeros_like(x))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
        assert torch.equal(dropout_add(x, residual, 1.0), residual)


def test_backward_has_the_masks_of_forward(device):
    x, residual = make((7, 33), torch.float32, device), make((7, 33), torch.float32, device, seed=1)
    with use_backend("triton"):
        y = dropout(x, P)
        (dx,) = torch.autograd.grad(y.sum(), x)
        z = dropout_add(x, residual, P)
        dy = torch.rand_like(z)
        da, dr = torch.autograd.grad(z, (x, residual), dy)
    assert torch.equal(y, x * dx)
    assert torch.equal(z - residual != 0, da != 0)
    # Not even a copy of the gradient.
    assert dr.data_ptr() == dy.data_ptr()


def test_gradient_of_one_input_only(device):
    x, residual = make((7, 33), torch.float32, device), make((7, 33), torch.float32, device, seed=1)
    check(x, residual.detach())
    check(x.detach(), residual)


def test_default_generator_makes_it_reproducible(device):
    x = torch.ones(5, 33, device=device)

    def draw(backend):
        torch.manual_seed(3)
        with use_backend(backend):
            return dropout(x), dropout(x), dropout_add(x, x)

    first, second, added = draw("triton")
    assert not torch.equal(first, second)
    for backend in ("triton", "torch"):
        for ours, again in zip((first, second, added), draw(backend), strict=True):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("seed", [0, 1, 16, -1, 2**31, SEED, -(2**63)])
def test_seed_as_number_and_as_tensor(seed, device):
    x = torch.ones(5, 33, device=device)
    with use_backend("triton"):
        number = dropout(x, seed=seed)
        for where in ("cpu", device):
            assert torch.equal(dropout(x, seed=torch.tensor(seed, device=where)), number)
    assert torch.equal(dropout_reference(x, seed=seed), number)


def test_any_integer_is_a_seed(device):
    x = torch.ones(5, 33, device=device)
    seed: Any = np.int64(3)
    with use_backend("triton"):
        assert torch.equal(dropout(x, seed=seed), dropout(x, seed=3))


def test_dropped_nan_is_nan_as_torchs(device):
    x = torch.full((40,), torch.nan, device=device)
    with use_backend("triton"):
        assert dropout(x).isnan().all()


def test_output_gradient_layouts(device):
    x, residual = make((8, 8), torch.float32, device), make((8, 8), torch.float32, device, seed=1)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), torch.rand(8, 8, device=device).T, wide[:, 3:11]):
        with use_backend("triton"):
            ours = torch.autograd.grad(dropout_add(x, residual, P, seed=5), (x, residual), dy)
        expected = torch.autograd.grad(
            dropout_add_reference(x, residual, P, seed=5), (x, residual), dy
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradcheck():
    cpu = torch.device("cpu")
    x, residual = make((3, 5), torch.float64, cpu), make((3, 5), torch.float64, cpu, seed=1)
    check_gradients(lambda x: dropout(x, P, seed=SEED), [x], operator="dropout")
    check_gradients(
        lambda x, r: dropout_add(x, r, P, seed=SEED), [x, residual], operator="dropout_add"
    )


def test_second_derivative_is_refused(device):
    x = make((3, 5), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="dropout is differentiable once"):
        torch.autograd.grad(dropout(x).sum(), x, create_graph=True)


def test_compiles(device):
    x, residual = make((5, 16), torch.float32, device), make((5, 16), torch.float32, device, seed=1)
    check_compiles(lambda x: dropout(x, P, seed=SEED), [x], operator="dropout")
    check_compiles(
        lambda x, r: dropout_add(x, r, P, seed=SEED), [x, residual], operator="dropout_add"
    )


def test_compiled_code_draws_anew(device):
    x = torch.ones(40, device=device)
    compiled = torch.compile(
        lambda x: (dropout(x), dropout(x)), fullgraph=True, backend="aot_eager"
    )
    with use_backend("triton"):
        torch.manual_seed(0)
        masks = (*compiled(x), *compiled(x))
        torch.manual_seed(0)
        assert torch.equal(compiled(x)[0], masks[0])
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])


def test_opcheck(device):
    x, residual = make((5, 16), torch.float32, device), make((5, 16), torch.float32, device, seed=1)
    ops, kept = torch.ops.tilewright, 3 * 2**30
    for seed in (torch.tensor(SEED), torch.tensor(SEED, device=device)):
        torch.library.opcheck(ops.dropout_forward.default, (x, seed, kept))
        torch.library.opcheck(ops.dropout_add_forward.default, (x, residual, seed, kept))
        with torch.no_grad():
            torch.library.opcheck(ops.dropout_add_backward.default, (x, seed, kept))


@pytest.mark.parametrize("shape", [(37, 65), (3, BLOCK + 1)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, device):
    wide = make((shape[0], shape[1] + 3), torch.float32, device)
    dy = torch.rand(shape, device=device)

    def run():
        x = wide[:, 3:]
        outs = dropout(x, P, seed=SEED), dropout_add(x, dy, P, seed=SEED)
        return (*outs, *torch.autograd.grad(outs, wide, (dy, dy)))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    x, residual = make((7, 12), torch.float32, device), make((7, 12), torch.float32, device, seed=1)
    dy = torch.rand(7, 12, device=device)
    before = [t.detach().clone() for t in (x, residual, dy)]
    with use_backend("triton"):
        (dropout(x) + dropout_add(x, residual)).backward(dy)
    for a, b in zip((x, residual, dy), before, strict=True):
        assert torch.equal(a, b)


def test_nothing_of_size_is_kept_for_backward(device):
    saved = []
    x, residual = make((5, 16), torch.float32, device), make((5, 16), torch.float32, device, seed=1)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with use_backend("triton"), hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x)
        dropout_add(x, residual)
    assert [t.numel() for t in saved] == [1, 1]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_output_is_contiguous(backend, device):
    x = torch.randn(4, 6, device=device).T
    with use_backend(backend):
        assert dropout(x).is_contiguous()
        assert dropout_add(x, x).is_contiguous()
        assert dropout_add(x, x, 0.0).is_contiguous()
        assert dropout_add(x, x, P, training=False).is_contiguous()


def test_module_is_torchs(device):
    ours, torchs = Dropout(P), torch.nn.Dropout(P)
    assert isinstance(ours, torch.nn.Dropout)
    assert repr(ours) == repr(torchs)
    x = torch.ones(5, 33, device=device)
    with use_backend("triton"):
        torch.manual_seed(0)
        y = ours(x)
        torch.manual_seed(0)
        assert torch.equal(y, dropout(x, P))
        assert torch.equal(ours.eval()(x), x)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x = make((7, 12), torch.float32, torch.device("cuda"))
    seed = torch.tensor(1, device="cuda")
    dy = torch.rand_like(x)
    with no_synchronization():
        dropout(x).backward(dy)
        dropout_add(x, x, seed=seed).backward(dy)


@pytest.mark.gpu
def test_replays_of_a_graph():
    # Without a seed each replay draws anew; with one on the device it is the caller's to change.
    x = torch.ones(1000, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    dropout(x, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn, given = dropout(x), dropout(x, seed=seed)
    graph.replay()
    first = drawn.clone()
    seed.fill_(7)
    graph.replay()
    assert not torch.equal(drawn, first)
    assert torch.equal(given, dropout_reference(x, seed=7))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # One flat row, and rows with a gap, whose last offsets int32 cannot hold.
    rows, width = 2**17 + 4, 2**14
    wide = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16)
    for x in (wide, wide[:, 6:]):
        y = dropout(x, P, seed=SEED)
        last = torch.arange(x.numel() - 64, x.numel(), device="cuda") // 4
        words = philox_reference(torch.tensor(SEED, device="cuda"), last[::4]).view(-1)
        assert torch.equal(y[-1, -64:] != 0, words < round((1 - P) * 2**32))
        del y


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(make((5, 16), torch.float32, torch.device("cuda:1")))


def test_bad_input(device):
    x = make((5, 16), torch.float32, device)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"p is {p}; it is the probability of a zero"):
            dropout(x, p)
    with pytest.raises(TypeError, match=r"input is torch.int64.*to\(torch.bfloat16\)"):
        dropout(torch.ones(5, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"seed is 9223372036854775808; .*seed % 2\*\*63"):
        dropout(x, seed=2**63)
    with pytest.raises(ValueError, match=r"seed is torch.int32 of shape \(1,\).*must be 0-d int64"):
        dropout(x, seed=torch.tensor([1], dtype=torch.int32))
    for seed in (1.5, "a"):
        bad: Any = seed
        # In evaluation too, where no mask is drawn.
        for training in (True, False):
            with pytest.raises(TypeError, match=rf"seed is {seed!r}; give an integer"):
                dropout(x, P, training, seed=bad)
            with pytest.raises(TypeError, match=rf"seed is {seed!r}; give an integer"):
                dropout_add(x, x, P, training, seed=bad)
    with pytest.raises(ValueError, match=r"seed is torch.int64 .* on meta"):
        dropout(x, seed=torch.tensor(1, device="meta"))
    with pytest.raises(ValueError, match=r"\(5, 16\) and residual \(5, 8\).*expand_as"):
        dropout_add(x, x[:, :8])
    with pytest.raises(TypeError, match=r"input is torch.float32 and residual torch.float16"):
        dropout_add(x, x.half())
    with pytest.raises(ValueError, match=r"input on .*, residual on meta"):
        dropout_add(x, x.to("meta"))
    with pytest.raises(ValueError, match="inplace is True"):
        Dropout(inplace=True)
