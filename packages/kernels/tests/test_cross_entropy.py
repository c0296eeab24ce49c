"""cross_entropy: the kernels against float64, torch's own function, and finite differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    CrossEntropyLoss,
    cross_entropy,
    cross_entropy_reference,
    use_backend,
)
from tilewright_kernels.cross_entropy import launches
from tilewright_kernels.cross_entropy.launches import BACKWARD_TILE
from tilewright_kernels.testing import (
    FLOATING,
    ROW_SHAPES,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    layouts,
    no_synchronization,
    poisoned_memory,
)

EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 2.0}


def make(shape, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    """Logits, targets of which every third is ignored but for the first, and class weights."""
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target.view(-1)[1::3] = -100
    weight = torch.rand(shape[-1], generator=generator) + 0.1
    return x, target.to(device), weight.to(device, dtype)


def check(x, target, weight=None, **options):
    check_against_float64(
        lambda *args: cross_entropy(*args, **options),
        lambda *args: cross_entropy_reference(*args, **options),
        (x, target, weight),
        operator="cross_entropy",
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 and of 2 columns, so that a row of 5 takes every loop."""
    tile = launches.ForwardTile(ROWS=1, LANES=2, UNROLL=1, VEC=2, num_warps=1)
    monkeypatch.setattr(launches, "forward_tile", lambda *_: tile)
    monkeypatch.setattr(launches, "BACKWARD_TILE", 2)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_matches_float64(shape, dtype, device):
    x, target, _ = make(shape, dtype, device)
    check(x, target, reduction="none")


@pytest.mark.smoke
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_is_torchs(weighted, label_smoothing, reduction, device):
    x, target, weight = make((9, 11), torch.float64, device)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for ignore_index in (-100, 3):
        args = (x, target.where(target >= 0, ignore_index), weight if weighted else None)
        with use_backend("torch"):
            ours = cross_entropy(*args, ignore_index=ignore_index, **options)
        torchs = F.cross_entropy(*args, ignore_index=ignore_index, **options)
        torch.testing.assert_close(ours, torchs)
        for a, b in zip(*(torch.autograd.grad(l.sum(), x) for l in (ours, torchs)), strict=True):
            torch.testing.assert_close(a, b)


def test_reference_z_loss_and_softcap_by_hand():
    x, weight = torch.tensor([[0.0, 40.0]], dtype=torch.float64), torch.tensor([1.0, 3.0])
    s = 5 * torch.tanh(x / 5)
    lse = torch.logsumexp(s, -1)
    ours = cross_entropy_reference(
        x, torch.tensor([1]), weight, reduction="none", z_loss=0.5, softcap=5.0
    )
    torch.testing.assert_close(ours, 3 * (lse - s[:, 1] + 0.5 * lse.square()))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_options(softcap, z_loss, label_smoothing, weighted, device, small_tiles):
    x, target, weight = make((3, 11), device=device)
    check(
        x, target, weight if weighted else None, softcap=softcap, z_loss=z_loss,
        label_smoothing=label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, weighted, return_lse, device):
    x, target, weight = make((2, 5, 6), device=device)
    weight = weight if weighted else None
    check(x, target, weight, reduction=reduction, return_lse=return_lse, **EVERYTHING)


def test_a_reduction_of_many_programs(device, small_tiles, monkeypatch):
    # One number a program, of which the reduction takes 4 at a time.
    monkeypatch.setattr(launches, "REDUCE_BLOCK", 4)
    x, target, weight = make((11, 3), device=device)
    for reduction in ("mean", "sum"):
        check(x, target, weight, reduction=reduction)


def test_launches(device):
    # The reduction is one launch more, and backward is one whatever the reduction.
    x, target, _ = make((6, 5), device=device)
    for reduction, forward in (("none", 1), ("sum", 2), ("mean", 2)):
        with use_backend("triton"), count_launches() as launched:
            loss = cross_entropy(x, target, reduction=reduction)
        assert launched["cross_entropy"] == forward
        with count_launches() as launched:
            loss.sum().backward()
        assert launched["cross_entropy"] == 1


# A single class; less than a tile, one, and one column more.
@pytest.mark.parametrize("width", [1, 2041, 2 * BACKWARD_TILE, 2 * BACKWARD_TILE + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(width, dtype, device):
    x, target, _ = make((2, width), dtype, device)
    target[:] = torch.tensor([0, width - 1])
    check(x, target, reduction="none")


# Vocabularies: a power of two, rows at odd addresses, more than any tile; one program and many.
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 32768), (33, 50257), (5, 2**17 + 1), (5000, 130)], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_vocabularies(shape, dtype):
    x, target, weight = make(shape, dtype, "cuda")
    check(x, target)
    check(x, target, weight, return_lse=True, **EVERYTHING)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_option_in_every_dtype(dtype, device):
    check(*make((4, 33), dtype, device), **EVERYTHING)


def test_loss_is_float32_for_half_precision(device):
    for dtype in FLOATING:
        x, target, _ = make((4, 9), dtype, device)
        for backend in ("triton", "torch"):
            with use_backend(backend):
                loss = cross_entropy(x, target)
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_scaled_loss_keeps_small_gradients_in_float16(device):
    # p / N = 1.3e-8 is 0 in float16; 2¹⁶ times as much, what a GradScaler asks for, is not.
    x = torch.zeros(64, 10, dtype=torch.float16, device=device)
    x[:, 0] = 14
    x.requires_grad_()
    with use_backend("triton"):
        loss = cross_entropy(x, x.new_zeros(64, dtype=torch.int64))
    (dx,) = torch.autograd.grad(2.0**16 * loss, x)
    expected = 2.0**16 / 64 * F.softmax(x[0].detach().double(), -1)[1]
    assert abs(dx[:, 1:].double() / expected - 1).max() < 1e-3


@pytest.mark.parametrize("where", [slice(0, 1), slice(1, 4), slice(0, 4)], ids=["0", "1-3", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 5, 2**40])
def test_ignored_targets(where, ignore_index, device):
    x, target, weight = make((4, 7), device=device)
    target[:] = torch.arange(4)
    target[where] = ignore_index
    for reduction in ("mean", "sum", "none"):
        check(x, target, weight, ignore_index=ignore_index, reduction=reduction, **EVERYTHING)


def test_all_targets_ignored(device):
    x, target, _ = make((4, 7), device=device)
    target[:] = -100
    with use_backend("triton"):
        mean, total = cross_entropy(x, target), cross_entropy(x, target, reduction="sum")
    assert mean.isnan()
    assert total == 0
    for loss in (mean, total):
        (dx,) = torch.autograd.grad(loss, x)
        assert (dx == 0).all()


def test_ignored_rows_are_not_read(device):
    x, target, _ = make((6, 30), device=device)
    with torch.no_grad():
        x[target == -100] = torch.nan
    with use_backend("triton"):
        losses = cross_entropy(x, target, reduction="none", **EVERYTHING)
    (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    for result in (losses, dx):
        assert result.isfinite().all()
        assert (result[target == -100] == 0).all()


def test_lse_is_of_every_row(device):
    # It depends on the logits alone: the targets may be ignored, and the loss may go unused.
    x, target, _ = make((4, 9), device=device)
    target[:2] = -100
    with use_backend("triton"):
        loss, lse = cross_entropy(x, target, return_lse=True, reduction="none")
        capped = cross_entropy(x, target, return_lse=True, softcap=2.0)[1]
    torch.testing.assert_close(lse, torch.logsumexp(x, -1))
    torch.testing.assert_close(capped, torch.logsumexp(2 * torch.tanh(x / 2), -1))
    assert (loss[:2] == 0).all()
    dlse = torch.tensor([1.0, 0.0, 0.0, -2.0], device=device)
    (dx,) = torch.autograd.grad(lse, x, dlse)
    torch.testing.assert_close(dx, torch.softmax(x, -1) * dlse[:, None])


def test_lse_where_no_target_counts(device):
    x, target, _ = make((3, 9), device=device)
    target[:] = -100
    with use_backend("triton"):
        mean, lse = cross_entropy(x, target, return_lse=True)
        (dx,) = torch.autograd.grad(mean + lse.sum(), x)
    assert mean.isnan()
    torch.testing.assert_close(dx, torch.softmax(x, -1))


def test_empty(device):
    x, target, _ = make((0, 5), device=device)
    with use_backend("triton"):
        assert cross_entropy(x, target).isnan()
        assert cross_entropy(x, target, reduction="sum") == 0
        assert cross_entropy(x, target, reduction="none").shape == (0,)
        (dx,) = torch.autograd.grad(cross_entropy(x, target), x)
    assert dx.shape == (0, 5)


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**40)])
def test_target_out_of_range_shows_as_nan(bad, device):
    x, target, weight = make((4, 7), device=device)
    target[:] = torch.tensor([1, bad, -100, 6])
    with use_backend("triton"):
        losses = cross_entropy(x, target, weight, reduction="none")
        assert cross_entropy(x, target, weight).isnan()
    (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    for result in (losses, dx):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()
    if device.type == "cpu":  # on a GPU torch's gather would end the process's CUDA context
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            cross_entropy_reference(x, target, weight)


def test_layouts(device):
    _, target, weight = make((6, 10), device=device)
    for name, x in layouts((6, 10), torch.float32, device):
        x.requires_grad_()
        try:
            check(x, target, weight, **EVERYTHING)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_three_dimensions_and_layouts_of_target(device):
    # Next-token loss as models write it: all but the last position against all but the first.
    x, target, _ = make((2, 5, 9), device=device)
    check(x[:, :-1], target[:, 1:])
    check(x, target.T.contiguous().T)
    check(x, target.to(torch.int32))
    check(x[0], target[0, 0].expand(5))
    check(x[0, 0], target[0, 0])


def test_loss_gradient_layouts(device):
    x, target, _ = make((4, 4, 6), device=device)
    ones = torch.ones((), device=device)
    for dloss in (ones.expand(4, 4), torch.rand(4, 4, device=device).T, torch.zeros(4, 4).to(x)):
        with use_backend("triton"):
            (ours,) = torch.autograd.grad(cross_entropy(x, target, reduction="none"), x, dloss)
        with use_backend("torch"):
            (torchs,) = torch.autograd.grad(cross_entropy(x, target, reduction="none"), x, dloss)
        torch.testing.assert_close(ours, torchs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 300),
    pad=st.integers(0, 5),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    options=st.sampled_from([{}, {"label_smoothing": 0.1}, EVERYTHING]),
)
def test_any_shape_and_row_stride(rows, width, pad, step, dtype, options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wide = make((rows * step, width + pad), dtype, device)[0].detach()
    target, weight = make((rows * step, width), dtype, device)[1:]
    x = wide[::step, pad:].requires_grad_()
    check(x, target[::step], weight, **options)


# numpy's word for a lane that holds nothing but NaN; a GPU has none for it.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_extreme_logits(device):
    # Target, then logits: far apart, masked classes, a masked target, and what has no answer.
    inf, nan = torch.inf, torch.nan
    rows = [
        (0, [1e4, -1e4, 0.0]),
        (1, [1e4, -1e4, 0.0]),
        (2, [1e4, 1e4, 1e4]),
        (0, [3e38, -3e38, 0.0]),
        (1, [-inf, 1.0, 2.0]),
        (1, [-inf, 1.0, -inf]),
        (0, [-inf, 1.0, 2.0]),
        (1, [inf, 1.0, 2.0]),
        (0, [inf, 1.0, 2.0]),
        (1, [inf, 1.0, inf]),
        (0, [-inf, -inf, -inf]),
        (0, [nan, 1.0, 2.0]),
        (2, [nan, 1.0, 2.0]),
    ]
    target = torch.tensor([y for y, _ in rows], device=device)
    x = torch.tensor([logits for _, logits in rows], device=device)
    torchs = F.cross_entropy(x, target, reduction="none")
    with use_backend("triton"):
        ours = cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    check(x.requires_grad_(), target, reduction="none")


def test_smoothing_over_masked_classes_is_infinite(device):
    x = torch.tensor([[-torch.inf, 1.0, 2.0], [0.0, 1.0, 2.0]], device=device).requires_grad_()
    check(x, torch.tensor([1, 1], device=device), reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("width", [3, 9])
def test_sure_predictions_keep_their_precision(offset, width, device, small_tiles):
    # Each other class has probability 1e-30: 1 - p of float32 arithmetic would be 0, and is not
    # to be one rounding off either. Float64 loses it too, so the oracle sums the others alone.
    x = torch.full((width, width), offset - 69.0, device=device)
    x.diagonal().fill_(offset)
    x.requires_grad_()
    with use_backend("triton"):
        losses = cross_entropy(x, torch.arange(width, device=device), reduction="none")
    (dx,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    others = (width - 1) * torch.exp(torch.tensor(-69.0, dtype=torch.float64)).item()
    assert abs(losses.double() / others - 1).max() < 1e-5
    assert abs(dx.diagonal().double() / -others - 1).max() < 1e-5
    assert abs(dx.double().sum(1) / others).max() < 1e-5


def check_numerically(x, target, weight=None, **options):
    check_gradients(
        lambda x: cross_entropy(x, target, weight, **options), [x], operator="cross_entropy"
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap, weighted, device):
    x, target, weight = make((2, 3), torch.float64, device)
    for smoothing, z_loss in ((0.0, 0.05), (0.1, 0.0)):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        check_numerically(x, target, weight if weighted else None, **options)


def test_gradcheck_over_several_tiles(device, small_tiles):
    x, target, weight = make((2, 5), torch.float64, device)
    target[:] = torch.tensor([4, -100])
    check_numerically(x, target, weight, reduction="none", return_lse=True, **EVERYTHING)


def test_second_derivative_is_refused(device):
    x, target, _ = make((3, 5), device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(cross_entropy(x, target), x, create_graph=True)


@pytest.mark.parametrize("option", ["inplace_backward", "return_lse"])
def test_compiles(option, device):
    x, target, weight = make((5, 16), device=device)

    options: dict[str, Any] = {option: True, **EVERYTHING}

    def function(x, target, weight):
        return cross_entropy(x * 1.0, target, weight, **options)

    check_compiles(function, (x, target, weight), operator="cross_entropy")


def test_compiled_code_follows_the_backend(device):
    x, target, _ = make((5, 16), device=device)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    for backend in ("triton", "torch", "triton"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(x, target), F.cross_entropy(x, target))


def test_opcheck(device):
    x, target, weight = make((4, 8), device=device)
    ops = torch.ops.tilewright
    for reduction, return_lse in (("mean", True), ("none", False)):
        options = (reduction, -100, 0.1, 0.01, 2.0)
        inputs = (x, target, weight, return_lse, *options)
        torch.library.opcheck(ops.cross_entropy_forward.default, inputs)
        with torch.no_grad():
            loss, lse, stats, divisor = ops.cross_entropy_forward(*inputs)
            dlse = torch.ones_like(lse) if return_lse else None
            args = (torch.ones_like(loss), dlse, x, target, weight, stats, divisor, *options)
            torch.library.opcheck(ops.cross_entropy_backward.default, args)


@pytest.mark.parametrize("shape", [(9, 65), (3, 1), (3, 2 * BACKWARD_TILE + 1)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, device):
    x, target, weight = make(shape, device=device)
    dloss = torch.rand(shape[:-1], device=device)

    def run():
        losses = cross_entropy(x, target, weight, reduction="none", **EVERYTHING)
        mean = cross_entropy(x, target, weight)
        return (
            losses,
            mean,
            *torch.autograd.grad(losses, x, dloss),
            *torch.autograd.grad(mean, x),
        )

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    inputs = make((7, 12), device=device)
    before = [t.detach().clone() for t in inputs]
    with use_backend("triton"):
        cross_entropy(*inputs, **EVERYTHING).backward()
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_no_trace(device):
    x, target, _ = make((4, 6), device=device)
    with use_backend("triton"):
        expected = cross_entropy(x, target)
        assert torch.equal(cross_entropy(x.detach(), target), expected)
        with torch.no_grad():
            assert not cross_entropy(x, target, inplace_backward=True).requires_grad


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 8)], ids=str)
def test_gradient_in_place(shape, device, small_tiles):
    leaf, target, weight = make(shape, device=device)
    # A slice of wider rows: what lies beside the logits must stay.
    around = F.pad(leaf * 1.0, (2, 3), value=7.0)
    x = around[..., 2:-3]
    before = x.detach().clone()
    with use_backend("triton"):
        (expected,) = torch.autograd.grad(
            cross_entropy(x, target, weight, **EVERYTHING), x, retain_graph=True
        )
        loss = cross_entropy(x, target, weight, inplace_backward=True, **EVERYTHING)
        assert torch.equal(x, before)
        ours, further = torch.autograd.grad(loss, (x, leaf))
    assert torch.equal(ours, expected)
    assert torch.equal(further, expected)
    assert ours.data_ptr() == x.data_ptr()
    assert (around[..., :2] == 7).all()
    assert (around[..., -3:] == 7).all()


def test_gradient_in_place_is_not_hidden_from_autograd(device):
    leaf, target, _ = make((4, 6), device=device)
    with use_backend("triton"):
        x = leaf * 1.0
        loss = cross_entropy(x, target, inplace_backward=True)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        x = leaf * 1.0
        squares = x.square().sum()
        cross_entropy(x, target, inplace_backward=True).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()


def test_gradient_in_place_is_refused(device):
    leaf, target, _ = make((4, 6), device=device)
    with use_backend("triton"):
        for x in (leaf, leaf.view(2, 2, 6).view(4, 6)):
            with pytest.raises(ValueError, match="leaf that requires grad"):
                cross_entropy(x, target, inplace_backward=True)
        for x in ((leaf * 1.0)[:, ::2], (leaf * 1.0)[:1].expand(4, 6), (leaf * 1.0).mT):
            with pytest.raises(ValueError, match=r"evenly spaced rows.*strides"):
                cross_entropy(x, target.new_zeros(x.shape[0]), inplace_backward=True)


def test_module_is_torchs(device):
    x, target, weight = make((6, 9), device=device)
    options: dict[str, Any] = {"ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    ours = CrossEntropyLoss(weight, **options, z_loss=0.0)
    torchs = torch.nn.CrossEntropyLoss(weight, **options)
    ours.load_state_dict(torchs.state_dict())
    target = target.where(target >= 0, 3)
    with use_backend("triton"):
        torch.testing.assert_close(ours(x, target), torchs(x, target))
        torch.testing.assert_close(
            CrossEntropyLoss(z_loss=0.1, softcap=3.0)(x, target),
            cross_entropy_reference(x, target, z_loss=0.1, softcap=3.0),
        )
        logits = x * 1.0
        (dx,) = torch.autograd.grad(CrossEntropyLoss(inplace_backward=True)(logits, target), x)
    assert torch.equal(logits, dx)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    x, target, weight = make((64, 1000), torch.bfloat16, "cuda")

    choices: list[dict[str, Any]] = [{}, {"reduction": "none"}, EVERYTHING]

    def run():
        for options in choices:
            cross_entropy(x, target, weight, **options).sum().backward()
            cross_entropy(x * 1.0, target, inplace_backward=True, **options).sum().backward()

    with use_backend("triton"):
        run()  # compiles
        with no_synchronization():
            run()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 2³¹ elements plus a few rows: offsets that int32 cannot hold. 4 GiB in, 4 GiB out.
    rows, width = 2**16 + 4, 2**15
    x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16).repeat(rows // 4, 1)
    target = torch.tensor([0, 5, width - 1, 17], device="cuda").repeat(rows // 4)
    x.requires_grad_()
    losses = cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(losses[-4:], losses[:4])
    torch.testing.assert_close(
        losses[-4:], F.cross_entropy(x[-4:].float(), target[-4:], reduction="none")
    )
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert torch.equal(dx[-4:], dx[:4])
    assert dx[-1, 17] < 0


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(*make((5, 16), device="cuda:1"), **EVERYTHING)


def test_bad_input(device):
    x, target, weight = make((5, 16), device=device)
    with pytest.raises(TypeError, match=r"input is torch.int64.*to\(torch.bfloat16\)"):
        cross_entropy(x.long(), target)
    with pytest.raises(TypeError, match=r"target is torch.float32.*target.long\(\)"):
        cross_entropy(x, x)
    with pytest.raises(ValueError, match=r"input has shape \(5, 0\).*V > 0"):
        cross_entropy(x[:, :0], target)
    with pytest.raises(ValueError, match=r"target has shape \(4,\).*input's \(5, 16\)"):
        cross_entropy(x, target[:4])
    with pytest.raises(ValueError, match=r"movedim\(1, -1\)"):
        cross_entropy(torch.randn(2, 7, 3, device=device), target.new_zeros(2, 3))
    with pytest.raises(ValueError, match=r"weight has shape \(15,\); it must be \(16,\)"):
        cross_entropy(x, target, weight[1:])
    with pytest.raises(ValueError, match=r"give weight.detach\(\)"):
        cross_entropy(x, target, weight.requires_grad_())
    with pytest.raises(ValueError, match=r"input on .*, target on meta"):
        cross_entropy(x, target.to("meta"))
    options: list[tuple[str, Any]] = [
        ("reduction", "average"),
        ("label_smoothing", 1.5),
        ("label_smoothing", float("nan")),
        ("z_loss", -1e-4),
        ("softcap", 0.0),
        ("softcap", -30.0),
    ]
    for name, value in options:
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            cross_entropy(x, target, **{name: value})
