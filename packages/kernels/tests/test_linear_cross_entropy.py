"""linear_cross_entropy: chunks and kernels against float64, torch's own functions, differences."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    LinearCrossEntropyLoss,
    _logit_chunks,
    _softmax_gradient,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    use_backend,
)
from tilewright_kernels.testing import (
    FLOATING,
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
SHAPES = (
    ((1,), 1, 1),  # the smallest there is
    ((5,), 3, 7),  # odd in all
    ((2, 9), 16, 64),  # three dimensions, rows of whole lines
    ((33,), 5, 129),  # several tiles of rows, one past a power of two
    ((0,), 4, 16),  # no tokens
)
"""Leading dimensions, width H, classes V."""


def make(tokens, width, classes, dtype=torch.float32, device="cpu", seed=0):
    """Hidden states, weight, targets of which every third is ignored but for the first, bias."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    x, weight, bias = leaf(*tokens, width), leaf(classes, width), leaf(classes)
    target = torch.randint(classes, tokens, generator=generator)
    target.view(-1)[1::3] = -100
    return x, weight, target.to(device), bias


def budget(rows, classes, dtype):
    """Bytes for the logits of some rows, each of whole lines."""
    line = _logit_chunks.LINE_BYTES
    return rows * -(-classes * dtype.itemsize // line) * line


def check(x, weight, target, bias=None, chunk_bytes=None, **options):
    check_against_float64(
        partial(linear_cross_entropy, chunk_bytes=chunk_bytes, **options),
        partial(linear_cross_entropy_reference, **options),
        (x, weight, target, bias),
        operator="linear_cross_entropy",
    )


def gradients(x, weight, target, bias=None, scale=1.0, **options):
    wrt = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    return torch.autograd.grad(
        linear_cross_entropy(x, weight, target, bias, **options) * scale, wrt
    )


@pytest.fixture
def small_tiles(monkeypatch):
    # Of 8 float32 columns: a row of 21 has two whole ones and a part.
    monkeypatch.setattr(_softmax_gradient, "UNROLL", 2)
    monkeypatch.setattr(_softmax_gradient, "LEAST_THREADS", 1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tokens", "width", "classes"), SHAPES, ids=str)
def test_matches_float64(tokens, width, classes, reduction, dtype, device):
    check(*make(tokens, width, classes, dtype, device), reduction=reduction)


@pytest.mark.smoke
def test_reference_is_torchs(device):
    x, weight, target, bias = make((9,), 4, 11, torch.float64, device)
    for reduction, smoothing in product(("mean", "sum", "none"), (0.0, 0.3)):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        with use_backend("torch"):
            ours = linear_cross_entropy(x, weight, target, bias, **options)
        torchs = F.cross_entropy(F.linear(x, weight, bias), target, **options)
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_every_option_in_every_dtype(dtype, reduction, device, small_tiles):
    check(*make((3,), 5, 21, dtype, device), reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize("option", [*EVERYTHING])
def test_one_option_at_a_time(option, device, small_tiles):
    x, weight, target, _ = make((2,), 4, 11, device=device)
    check(x, weight, target, **{option: EVERYTHING[option]})


# One chunk, two, the last number that is added in half precision and the first that is not, and a
# token a chunk: gradients obey the same rule.
@pytest.mark.parametrize("rows", [36, 18, 5, 4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_chunks(dtype, rows, device):
    x, weight, target, bias = make((36,), 8, 12, dtype, device)
    check(x, weight, target, bias, chunk_bytes=budget(rows, 12, dtype))


def test_a_chunk_holds_a_token_at_least(device):
    check(*make((3,), 2, 40, device=device), chunk_bytes=1)


@pytest.mark.parametrize("needed", [*product([False, True], repeat=3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_some_inputs_only(reduction, needed, device):
    x, weight, target, bias = make((5,), 4, 9, device=device)
    for tensor, need in zip((x, weight, bias), needed, strict=True):
        tensor.requires_grad_(need)
    check(x, weight, target, bias, reduction=reduction, chunk_bytes=100)


def test_products_that_are_not_needed_are_not_made(device, monkeypatch):
    # A frozen output layer: no gradient of its weight, nor memory for one.
    x, weight, target, _ = make((4,), 3, 8, device=device)
    weight.requires_grad_(False)
    made, product = [], _logit_chunks._add_product

    def recorded(total, *args, **kwargs):
        made.append(total.shape)
        product(total, *args, **kwargs)

    monkeypatch.setattr(_logit_chunks, "_add_product", recorded)
    with use_backend("triton"):
        gradients(x, weight, target)
        assert made == [x.shape]
        with torch.no_grad():
            linear_cross_entropy(x, weight, target)
        assert made == [x.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_of_a_scaled_loss(dtype, device):
    # What accumulation over micro-batches and loss scalers do. Twice: the first backward keeps
    # what the second needs, and hands out what the second leaves alone.
    x, weight, target, bias = make((5,), 4, 9, dtype, device)
    with use_backend("triton"):
        loss = linear_cross_entropy(x, weight, target, bias)
        twice = [
            torch.autograd.grad(loss * scale, (x, weight, bias), retain_graph=True)
            for scale in (0.0, 512.0, 0.125)
        ]
        last = torch.autograd.grad(loss * 4.0, (x, weight, bias))
    with use_backend("torch"):
        once = gradients(x, weight, target, bias)
    for scale, grads in zip((0.0, 512.0, 0.125, 4.0), (*twice, last), strict=True):
        for ours, expected in zip(grads, once, strict=True):
            torch.testing.assert_close(ours, expected * scale, rtol=1e-2, atol=1e-3 * scale)


def test_gradients_of_a_loss_as_it_is_are_handed_out(device):
    # Neither multiplied nor copied: their memory is the forward's.
    x, weight, target, _ = make((5,), 4, 9, device=device)
    with use_backend("triton"):
        loss = linear_cross_entropy(x, weight, target)
        node: Any = loss.grad_fn
        addresses = [t.data_ptr() for t in node.saved_tensors[:2]]
        loss.backward()
    for leaf, address in zip((x, weight), addresses, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.data_ptr() == address


def test_scaled_loss_keeps_small_gradients_in_float16(device):
    # The gradient 1e-8 of a class is 0 in float16; 2¹⁶ times as much is not.
    x = torch.ones(64, 1, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.zeros(10, 1, dtype=torch.float16, device=device)
    weight[0] = 14
    weight.requires_grad_()
    target = torch.zeros(64, dtype=torch.int64, device=device)
    with use_backend("triton"):
        (dweight,) = torch.autograd.grad(2.0**16 * linear_cross_entropy(x, weight, target), weight)
    expected = 2.0**16 * F.softmax(weight.detach().double(), 0)[1]
    assert abs(dweight[1:].double() / expected - 1).max() < 1e-2


@pytest.mark.parametrize("where", [slice(0, 1), slice(1, 4), slice(0, 4)], ids=["0", "1-3", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_targets(where, ignore_index, device):
    x, weight, target, bias = make((4,), 3, 7, device=device)
    target[:] = torch.arange(4)
    target[where] = ignore_index
    for reduction in ("mean", "sum", "none"):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        check(x, weight, target, bias, **options, **EVERYTHING)


def test_empty(device):
    x, weight, target, _ = make((0,), 4, 5, device=device)
    with use_backend("triton"):
        assert linear_cross_entropy(x, weight, target).isnan()
        assert linear_cross_entropy(x, weight, target, reduction="sum") == 0
        for reduction in ("mean", "sum"):
            dx, dweight = gradients(x, weight, target, reduction=reduction)
            assert dx.shape == (0, 4)
            assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**40)])
def test_target_out_of_range_shows_as_nan(bad, device):
    x, weight, target, _ = make((4,), 3, 7, device=device)
    target[:] = torch.tensor([1, bad, -100, 6])
    with use_backend("triton"):
        losses = linear_cross_entropy(x, weight, target, reduction="none")
        assert linear_cross_entropy(x, weight, target).isnan()
    (dx,) = torch.autograd.grad(losses.sum(), x)
    for result in (losses, dx):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


def test_layouts(device):
    x, weight, target, bias = make((6,), 10, 8, device=device)
    for name, strided in layouts((6, 10), torch.float32, device):
        strided.requires_grad_()
        try:
            check(strided, weight, target, bias)
            check(x, strided[:, :10], target.clamp(max=5))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_three_dimensions_and_layouts_of_target(device):
    # Next-token loss as models write it: all but the last position against all but the first.
    x, weight, target, _ = make((2, 5), 4, 9, device=device)
    check(x[:, :-1], weight, target[:, 1:])
    check(x, weight, target.T.contiguous().T, reduction="none")
    check(x, weight, target.to(torch.int32))
    check(x[0, 0], weight, target[0, 0])


def test_loss_gradient_layouts(device):
    x, weight, target, _ = make((4, 4), 3, 6, device=device)
    one, wide = torch.ones((), device=device), torch.rand(4, 9, device=device)
    for dloss in (one.expand(4, 4), wide[:, :4].T, wide[:, 3:7]):
        grads = []
        for backend in ("triton", "torch"):
            with use_backend(backend):
                losses = linear_cross_entropy(x, weight, target, reduction="none")
            grads.append(torch.autograd.grad(losses, (x, weight), dloss))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 24),
    width=st.integers(1, 20),
    classes=st.integers(1, 300),
    chunk=st.integers(4, 30),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    options=st.sampled_from([{}, {"label_smoothing": 0.1}, {"reduction": "none"}, EVERYTHING]),
)
def test_any_shape_and_chunk(tokens, width, classes, chunk, dtype, options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make((tokens,), width, classes, dtype, device)
    check(*inputs, chunk_bytes=budget(chunk, classes, dtype), **options)


# Every entry of a small Jacobian, and a projection of one whose rows take several tiles.
@pytest.mark.parametrize(("tokens", "classes", "fast_mode"), [(3, 3, False), (2, 9, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, tokens, classes, fast_mode, device, request):
    if fast_mode:
        request.getfixturevalue("small_tiles")
    x, weight, target, bias = make((tokens,), 1, classes, torch.float64, device)
    chunk_bytes = budget(2, classes, torch.float64)
    options = {"reduction": reduction, "chunk_bytes": chunk_bytes, **EVERYTHING}
    check_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, target, b, **options),
        (x, weight, bias),
        operator="linear_cross_entropy",
        fast_mode=fast_mode,
    )


def test_second_derivative_is_refused(device):
    x, weight, target, _ = make((3,), 4, 5, device=device)
    for reduction in ("mean", "none"):
        with use_backend("triton"):
            loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_compiles(device):
    x, weight, target, bias = make((5,), 8, 16, device=device)
    check_compiles(
        lambda x, w, b: linear_cross_entropy(x * 1.0, w, target, b, reduction="none"),
        (x, weight, bias),
        operator="linear_cross_entropy",
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_compiles_with_gradients_in_forward(autocast, device):
    # As many launches as chunks: the graph multiplies by the gradient of the loss itself.
    x, weight, target, _ = make((5,), 8, 16, device=device)

    def function(x, weight):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return 4.0 * linear_cross_entropy(x * 1.0, weight, target)

    torch._dynamo.reset()
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"), count_launches() as launches:
            loss = f(x, weight)
            results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert launches["linear_cross_entropy"] == 1
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-2 if autocast else 1e-5, atol=1e-5)


def test_opcheck(device):
    x, weight, target, bias = make((4,), 3, 8, device=device)
    ops = torch.ops.tilewright
    options = (-100, 0.1, 0.01, 2.0, 100)
    for tensors in ((x, weight, bias, target), (x, weight, None, target)):
        needed = (True, True, tensors[2] is not None)
        torch.library.opcheck(
            ops.linear_cross_entropy_reduced.default, (*tensors, True, *options, *needed)
        )
        torch.library.opcheck(ops.linear_cross_entropy_losses.default, (*tensors, *options, True))
        with torch.no_grad():
            dlosses = torch.rand(4, device=device)
            torch.library.opcheck(
                ops.linear_cross_entropy_losses_backward.default,
                (dlosses, *tensors, *options, *needed),
            )


# On a GPU torch warns that cuBLAS may choose another algorithm next time; the test would show it.
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written_and_bits_repeat(dtype, reduction, device):
    x, weight, target, bias = make((20,), 5, 21, dtype, device)

    def run():
        options = {"reduction": reduction, "chunk_bytes": budget(2, 21, dtype)}
        loss = linear_cross_entropy(x, weight, target, bias, **options).sum()
        return loss, *torch.autograd.grad(3.0 * loss, (x, weight, bias))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    inputs = make((7,), 4, 12, device=device)
    before = [t.detach().clone() for t in inputs]
    with use_backend("triton"):
        for reduction in ("mean", "none"):
            linear_cross_entropy(*inputs, reduction=reduction).sum().backward()
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.gpu
def test_no_synchronization():
    inputs = make((64,), 8, 100, torch.bfloat16, "cuda")

    def step():
        for reduction, rows in product(("mean", "none"), (32, 6)):
            options: dict[str, Any] = {"reduction": reduction, "chunk_bytes": rows * 256}
            (linear_cross_entropy(*inputs, **options).sum() / 3).backward()

    with use_backend("triton"):
        step()  # compiles
        with no_synchronization():
            step()


# What torch.nn.functional.linear does: the product in autocast's dtype, gradients in the leaves'.
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, backend, device):
    x, weight, target, bias = make((6,), 5, 9, device=device)
    inputs = (x.detach().bfloat16().requires_grad_(), weight, target, bias)
    with torch.autocast(device.type, torch.bfloat16), use_backend(backend):
        ours = linear_cross_entropy(*inputs, reduction=reduction)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        expected = linear_cross_entropy(
            narrow[0], narrow[1], target, narrow[2], reduction=reduction
        )
    assert torch.equal(ours, expected)
    grads = torch.autograd.grad(ours.sum(), (inputs[0], weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), narrow), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_gradients_multiplied_in_place_are_not_hidden_from_autograd(device):
    x, weight, target, _ = make((5,), 4, 9, device=device)
    saved = []

    def pack(tensor):
        saved.append((tensor, tensor._version))
        return tensor

    with (
        use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = linear_cross_entropy(x, weight, target)
    loss.backward(torch.full_like(loss, 2.0))
    versions = [tensor._version - before for tensor, before in saved if tensor.numel()]
    assert versions == [1, 1]


def test_module_is_the_function(device):
    x, weight, target, bias = make((6,), 5, 9, device=device)
    options: dict[str, Any] = {"ignore_index": 2, "reduction": "sum", **EVERYTHING}
    loss = LinearCrossEntropyLoss(**options, chunk_bytes=100)
    target[0], target[1::3] = 2, 3
    with use_backend("triton"):
        ours = loss(x, weight, target, bias)
    torch.testing.assert_close(
        ours, linear_cross_entropy_reference(x, weight, target, bias, **options)
    )
    default = LinearCrossEntropyLoss()(x, weight, target)
    torch.testing.assert_close(default, F.cross_entropy(x @ weight.T, target))


# Vocabularies: a power of two, rows at odd addresses, more than any tile; chunks of a real number
# of tokens, and a few. Rounded logits make the error of a mean a matter of luck, so that a sum is
# compared with that of its tokens' losses. Not float64: over so many classes its error is the order
# of summation, for which nothing allows.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(700, 256, 32768), (300, 104, 50257), (260, 128, 131073)], ids=str
)
def test_matches_float64_at_real_widths(shape, dtype):
    tokens, width, classes = shape
    x, weight, target, bias = make((tokens,), width, classes, dtype, "cuda")
    with torch.no_grad():
        weight /= width**0.5
    for rows in (tokens, 256, 20):
        chunk_bytes = budget(rows, classes, dtype)
        check(x, weight, target, bias, chunk_bytes=chunk_bytes, reduction="none")
        losses = linear_cross_entropy(x, weight, target, reduction="none", chunk_bytes=chunk_bytes)
        loss = linear_cross_entropy(x, weight, target, reduction="sum", chunk_bytes=chunk_bytes)
        torch.testing.assert_close(loss, losses.sum())
        expected = torch.autograd.grad(losses.sum(), (x, weight))
        for ours, theirs in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    # 2³¹ logits plus some in one chunk, then as many of weight: offsets that int32 cannot hold.
    for tokens, width, classes in ((2**14 + 8, 8, 2**17), (8, 2**14, 2**17 + 8)):
        x = torch.randn(4, width, device="cuda", dtype=torch.bfloat16).repeat(tokens // 4, 1)
        weight = torch.randn(8, width, device="cuda", dtype=torch.bfloat16) / width**0.5
        weight = weight.repeat(classes // 8, 1).requires_grad_()
        target = torch.arange(4, device="cuda").repeat(tokens // 4)
        loss = linear_cross_entropy(
            x.requires_grad_(), weight, target, reduction="sum", chunk_bytes=2**40
        )
        # Twice: all of the gradients are then multiplied.
        dx, dweight = torch.autograd.grad(2.0 * loss, (x, weight))
        torch.testing.assert_close(dx[-4:], dx[:4])
        torch.testing.assert_close(dweight[-8:], dweight[-16:-8])
        assert (dx[-1].abs().max() > 0) & (dweight[-1].abs().max() > 0)


@pytest.mark.gpu
def test_memory_is_a_chunk_of_logits():
    tokens, width, classes, chunk_bytes = 4096, 256, 32768, 2**24
    x, weight, target, _ = make((tokens,), width, classes, torch.bfloat16, "cuda")
    for _ in range(2):  # the first call has cuBLAS take its workspace
        x.grad = weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_cross_entropy(x, weight, target, chunk_bytes=chunk_bytes).backward()
        peak = torch.cuda.max_memory_allocated() - before
    sums = 4 * weight.numel()  # in float32, of 16 chunks
    assert peak < x.nbytes + weight.nbytes + sums + chunk_bytes + 2**20


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(*make((5,), 4, 16, device="cuda:1"))


def test_bad_input(device):
    x, weight, target, bias = make((5,), 4, 9, device=device)
    with pytest.raises(TypeError, match=r"input is torch.int64"):
        linear_cross_entropy(x.long(), weight, target)
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16 and input torch.float32.*autoc"):
        linear_cross_entropy(x, weight.bfloat16(), target)
    with pytest.raises(TypeError, match=r"bias is torch.float64 and input"):
        linear_cross_entropy(x, weight, target, bias.double())
    with pytest.raises(TypeError, match=r"target is torch.float32.*target.long"):
        linear_cross_entropy(x, weight, target.float())
    with pytest.raises(ValueError, match=r"weight has shape \(9,\)"):
        linear_cross_entropy(x, bias, target)
    with pytest.raises(ValueError, match=r"input has shape \(5, 3\).*the 4 of weight's \(9, 4\)"):
        linear_cross_entropy(x[:, :3], weight, target)
    with pytest.raises(ValueError, match=r"target has shape \(4,\).*input's \(5, 4\)"):
        linear_cross_entropy(x, weight, target[:4])
    with pytest.raises(ValueError, match=r"bias has shape \(8,\); it must be \(9,\)"):
        linear_cross_entropy(x, weight, target, bias[:8])
    with pytest.raises(ValueError, match=r"weight on meta"):
        linear_cross_entropy(x, weight.to("meta"), target)
    with pytest.raises(TypeError, match=r"chunk_bytes is 1000\.0.*int\(chunk_bytes\)"):
        linear_cross_entropy(x, weight, target, chunk_bytes=1e3)  # pyrefly: ignore
    bad: dict[str, Any] = {
        "reduction": "average", "label_smoothing": 1.5, "z_loss": -1.0, "softcap": 0.0,
        "chunk_bytes": 0,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=rf"{name} is '?{value}"):
            linear_cross_entropy(x, weight, target, **{name: value})
