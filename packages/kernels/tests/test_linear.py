"""linear: all three products against float64, torch's own layer, and finite differences."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import (
    Linear,
    _linear_products,
    backend_report,
    linear,
    linear_reference,
    use_backend,
)
from tilewright_kernels._linear_products import PRODUCTS, Measured, choose, is_faster
from tilewright_kernels.linear import _OP
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    layouts,
    poisoned_memory,
)

SHAPES = (
    ((1,), 1, 1),  # the smallest there is
    ((), 5, 3),  # a vector
    ((37,), 19, 23),  # odd in all, several partial tiles
    ((2, 9), 64, 16),  # three dimensions, whole tiles
    ((0,), 4, 16),  # no tokens
    ((3,), 0, 4),  # no features in: the bias alone
    ((3,), 4, 0),  # none out
)
"""Leading dimensions, in_features, out_features."""

REAL_SHAPES = (((2048,), 1536, 1536), ((4, 500), 1536, 4096), ((1000,), 4095, 513))


def make(rows, in_features, out_features, dtype=torch.float32, device="cpu", seed=0):
    """Input, weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    return leaf(*rows, in_features), leaf(out_features, in_features), leaf(out_features)


def check(x, weight, bias=None):
    check_against_float64(linear, linear_reference, (x, weight, bias), operator="linear")


@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES, ids=str)
def test_matches_float64(rows, in_features, out_features, dot_dtype, device):
    check(*make(rows, in_features, out_features, dot_dtype, device))


def test_without_bias(device):
    x, weight, _ = make((5,), 7, 9, device=device)
    check(x, weight)


@pytest.mark.parametrize("needed", [*product([False, True], repeat=3)], ids=str)
def test_gradients_of_some_inputs_only(needed, device):
    tensors = make((5,), 7, 9, device=device)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    check(*tensors)


def test_only_what_backward_needs_is_kept(device):
    x, weight, bias = make((6,), 10, 8, device=device)
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    for frozen, expected in ((weight, [weight]), (x, [x])):
        kept.clear()
        for tensor in (x, weight):
            tensor.requires_grad_(tensor is not frozen)
        # A frozen weight needs no input, a frozen input no weight.
        with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear(x, weight, bias)
        assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]


def test_layouts_of_every_operand(device):
    _, _, bias = make((6,), 10, 8, device=device)
    for name, x in layouts((6, 10), torch.float32, device):
        for weight_name, w in layouts((8, 10), torch.float32, device, seed=1):
            try:
                check(x.requires_grad_(), w.requires_grad_(), bias)
            except AssertionError as error:
                raise AssertionError(f"{name}, weight {weight_name}: {error}") from error


def test_layouts_in_three_dimensions(device):
    _, weight, bias = make((1,), 10, 8, device=device)
    for name, x in layouts((3, 4, 10), torch.float32, device):
        try:
            check(x.requires_grad_(), weight, bias)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_output_gradient_layouts(device):
    x, weight, bias = make((8,), 6, 8, device=device)
    one, wide = torch.ones((), device=device), torch.rand(8, 19, device=device)
    for dy in (one.expand(8, 8), wide[:, :8].T, wide[:, 3:11]):
        with use_backend("triton"):
            ours = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), dy)
        expected = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [((2,), 3, 5), ((2, 2), 1, 2), ((), 4, 3)], ids=str)
def test_gradcheck(shape):
    check_gradients(linear, make(*shape, dtype=torch.float64), operator="linear")


def test_second_derivative_is_refused(device):
    x, weight, bias = make((3,), 5, 2, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(linear(x, weight, bias).sum(), x, create_graph=True)


def test_compiles(device):
    check_compiles(linear, make((5,), 16, 8, device=device), operator="linear")


def test_opcheck(device):
    x, weight, bias = make((5,), 16, 8, device=device)
    ours, buffer = [True] * 3, torch.zeros_like(weight)
    ops = torch.ops.tilewright
    torch.library.opcheck(ops.linear_forward.default, (x, weight, bias, None, ours))
    with torch.no_grad():
        dy = torch.rand(5, 8, device=device)
        torch.library.opcheck(ops.linear_backward.default, (dy, x, weight, ours, True))
        torch.library.opcheck(ops.linear_backward.default, (dy, None, weight, ours, False))
        torch.library.opcheck(ops.linear_accumulate.default, (dy, x, buffer, True))


def test_every_element_is_written_and_bits_repeat(device):
    tensors = make((37,), 19, 23, device=device)
    dy = torch.rand(37, 23, device=device)

    def run():
        y = linear(*tensors)
        return y, *torch.autograd.grad(y, tensors, dy)

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    tensors = make((7,), 12, 5, device=device)
    dy = torch.rand(7, 5, device=device)
    before = [t.detach().clone() for t in (*tensors, dy)]
    with use_backend("triton"):
        linear(*tensors).backward(dy)
    for a, b in zip((*tensors, dy), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_buffer_takes_the_sum_of_several_backwards(dtype, backend, device):
    _, weight, bias = make((1,), 12, 8, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = torch.full_like(weight, 0.5, dtype=wide, requires_grad=False)
    expected = buffer.double().clone()
    with use_backend(backend):
        for seed in range(3):
            x, _, _ = make((2, 9), 12, 8, dtype, device, seed=seed)
            dy = torch.rand(2, 9, 8, device=device, dtype=dtype)
            linear(x, weight, bias, weight_grad_buffer=buffer).backward(dy)
            expected = expected + torch.einsum("btn,btk->nk", dy.double(), x.detach().double())
            dx = torch.einsum("btn,nk->btk", dy.double(), weight.detach().double())
            assert x.grad is not None
            torch.testing.assert_close(x.grad.double(), dx, rtol=2e-3, atol=2e-3)
    assert weight.grad is None
    assert bias.grad is not None
    # Not rounded to float16 in between: float32's own error.
    torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-5)


def test_buffer_is_not_rounded_to_the_weights_dtype(device):
    # 1 is lost in 4096 in float16, whose sums stop there: 4 096 + 1 = 4 096.
    weight = torch.ones(1, 1, device=device, dtype=torch.float16, requires_grad=True)
    buffer = torch.full((1, 1), 4096.0, device=device)
    x = torch.ones(1, 1, device=device, dtype=torch.float16)
    with use_backend("triton"):
        for _ in range(3):
            linear(x, weight, weight_grad_buffer=buffer).sum().backward()
    assert buffer.item() == 4099


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_buffer_of_a_weight_that_is_used_twice(backend, device):
    # Between a use's forward and its backward another use writes the buffer.
    x, weight, _ = make((5,), 6, 6, device=device)
    buffer = torch.zeros_like(weight, requires_grad=False)
    with use_backend(backend):
        y = linear(linear(x, weight, weight_grad_buffer=buffer), weight, weight_grad_buffer=buffer)
    (expected,) = torch.autograd.grad(F.linear(F.linear(x, weight), weight).sum(), weight)
    y.sum().backward()
    torch.testing.assert_close(buffer, expected)


def test_buffer_takes_no_batch_of_gradients(device):
    x, weight, _ = make((5,), 6, 4, device=device)
    buffer = torch.zeros(4, 6, device=device)
    dys = torch.ones(3, 5, 4, device=device)
    with use_backend("triton"):
        y = linear(x, weight, weight_grad_buffer=buffer)
        with pytest.raises(RuntimeError, match="weight_grad_buffer=None"):
            torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="weight_grad_buffer=None"):
            torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy))(dys)
    assert not buffer.any()


def test_buffer_takes_the_gradient_under_autocast(device):
    x, weight, _ = make((5,), 16, 8, device=device)
    buffer = torch.zeros(8, 16, device=device)
    with use_backend("triton"), torch.autocast(device.type, torch.float16):
        y = linear(x, weight, weight_grad_buffer=buffer)
        y.sum().backward()
    assert y.dtype == torch.float16
    assert weight.grad is None
    expected = x.detach().half().float().sum(0).expand(8, 16)
    torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-5)


def test_meta_tensors():
    x, weight, bias = (t.to("meta") for t in make((2, 5), 16, 8))
    with use_backend("auto"):
        y = linear(x, weight, bias)
    assert (y.shape, y.device.type) == ((2, 5, 8), "meta")


def test_buffer_of_a_frozen_weight_stays_as_it_is(device):
    x, weight, _ = make((5,), 6, 4, device=device)
    buffer = torch.zeros(4, 6, device=device)
    with use_backend("triton"):
        linear(x, weight.requires_grad_(False), weight_grad_buffer=buffer).sum().backward()
    assert not buffer.any()
    assert x.grad is not None


def test_hooks_of_a_weight_with_a_buffer(device):
    # They are called when the buffer holds the gradient, and are given none themselves.
    x, _, _ = make((5,), 6, 4, device=device)
    layer, called = Linear(6, 4, device=device), []
    buffer = layer.weight_grad_buffer = torch.zeros(4, 6, device=device)

    def hook(name):
        return lambda given, *_: called.append((name, given is None, buffer.any().item()))

    layer.weight.register_hook(hook("hook"))
    layer.weight.register_post_accumulate_grad_hook(lambda w: hook("accumulated")(w.grad))
    with use_backend("triton"):
        layer(x).sum().backward()
    assert called == [("hook", True, True), ("accumulated", True, True)]


def test_buffer_compiles(device):
    x, weight, bias = make((5,), 16, 8, device=device)
    buffers = [torch.zeros(8, 16, device=device) for _ in range(2)]

    def run(function, buffer):
        function(x, weight, bias, weight_grad_buffer=buffer).square().sum().backward()

    torch._dynamo.reset()
    with use_backend("triton"):
        run(torch.compile(linear, fullgraph=True, backend="aot_eager"), buffers[0])
        run(linear, buffers[1])
    assert weight.grad is None
    torch.testing.assert_close(*buffers)
    assert buffers[0].any()


def test_the_table_decides_under_auto(monkeypatch):
    # Widths 64 to 128 and all nearer than a factor 2; ours is faster in dgrad alone.
    slower, faster = Measured(1.0, 2.0), Measured(3.0, 2.0)
    table = {(64, 128): {"forward": slower, "dgrad": faster}}
    monkeypatch.setattr(_linear_products, "_LINEAR_TABLE", table)
    monkeypatch.setattr(_linear_products, "LEAST_TOKENS", 8)
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    with use_backend("auto"):
        assert choose(_OP, x, 64, 128) == [False, True, False], "wgrad was not measured"
        assert choose(_OP, x, 96, 104) == [False, True, False], "the nearest"
        assert choose(_OP, x, 128, 128) == [False] * 3, "too far"
        assert choose(_OP, x, 65, 128) == choose(_OP, x, 64, 127) == [False] * 3, "odd widths"
        assert choose(_OP, x[:7], 64, 128) == [False] * 3, "too few tokens"
        assert choose(_OP, x.float(), 64, 128) == [False] * 3, "another dtype"
    with use_backend("triton"):
        assert choose(_OP, x, 1, 1) == [True] * 3
    with use_backend("torch"):
        assert choose(_OP, x, 64, 128) == [False] * 3


def test_every_measured_shape_decides_for_itself():
    for (in_features, out_features), measured in _linear_products._LINEAR_TABLE.items():
        x = torch.empty(16384, in_features, dtype=torch.bfloat16, device="meta")
        for name in PRODUCTS:
            ours, cublas = measured[name]
            assert is_faster(name, x, in_features, out_features) == (ours >= 1.01 * cublas)


@pytest.mark.parametrize(("tokens", "k", "n"), [(4096, 0, 64), (4096, 64, 0), (3, 0, 4)])
def test_auto_takes_layers_without_features(tokens, k, n):
    x, weight, bias = make((tokens,), k, n, torch.bfloat16)
    with use_backend("auto"):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_table_is_read_while_compiling(dynamic):
    # Widths and tokens that were measured, in the dtype that was: else nothing is looked up.
    def chosen(x):
        return x + 1, choose(_OP, x, x.shape[1], 1536)

    torch._dynamo.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with use_backend("auto"):
        for tokens in (4096, 5000, 4095):
            x = torch.empty(tokens, 1536, dtype=torch.bfloat16)
            assert compiled(x)[1] == chosen(x)[1]
        assert any(chosen(torch.empty(4096, 1536, dtype=torch.bfloat16))[1])


@pytest.mark.gpu
def test_auto_says_why_it_takes_torch():
    x, weight, bias = make((4,), 16, 8, torch.bfloat16, "cuda")
    backend_report(reset=True)
    with use_backend("auto"):
        linear(x, weight, bias)
    row = backend_report()["linear"]
    assert row.reasons == ("torch (auto: cuBLAS is faster for 16 to 8 features)",)
    assert (row.torch, row.fell_back) == (1, 0)


@pytest.mark.parametrize("ours", [*product([False, True], repeat=3)], ids=str)
def test_products_mix(ours, device):
    x, weight, bias = make((5,), 7, 9, device=device)
    dy = torch.rand(5, 9, device=device)
    with use_backend("triton"), count_launches() as launches:
        y = torch.ops.tilewright.linear_forward(x, weight, bias, None, list(ours))
        grads = torch.autograd.grad(y, (x, weight, bias), dy)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert launches["linear"] == sum(ours)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_is_torchs(backend, device):
    # CPU autocast takes bfloat16 unless told; the interpreter multiplies float16 only.
    x, weight, bias = make((5,), 16, 8, device=device)
    dy = torch.rand(5, 8, device=device, dtype=torch.float16)
    with torch.autocast(device.type, torch.float16):
        with use_backend(backend):
            y = linear(x, weight, bias)
        expected = F.linear(x, weight, bias)
    assert y.dtype == expected.dtype == torch.float16
    ours = torch.autograd.grad(y, (x, weight, bias), dy)
    torchs = torch.autograd.grad(expected, (x, weight, bias), dy)
    for a, b in zip((y, *ours), (expected, *torchs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_module_is_torchs(backend, device):
    ours, torchs = Linear(24, 10, device=device), torch.nn.Linear(24, 10, device=device)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(device)
    with use_backend(backend):
        torch.testing.assert_close(ours(x), torchs(x))


def test_module_leaves_its_buffer_alone(device):
    layer = Linear(6, 4, device=device)
    buffer = layer.weight_grad_buffer = torch.zeros(4, 6, device=device)
    assert "weight_grad_buffer" not in layer.state_dict()
    assert layer.half().weight_grad_buffer is buffer


# Not float64: the oracle would be torch's product in float64, which is no better than ours.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize(("rows", "in_features", "out_features"), REAL_SHAPES, ids=str)
def test_matches_float64_at_real_shapes(rows, in_features, out_features, dtype):
    check(*make(rows, in_features, out_features, dtype, "cuda"))


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(*make((5,), 16, 8, device="cuda:1"))


def test_bad_input(device):
    x, weight, bias = make((5,), 16, 8, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 12\).*\(5, 16\).*\(8, 16\)"):
        linear(x, weight[:, :12])
    with pytest.raises(ValueError, match=r"weight has shape \(16,\).*out_features, in_features"):
        linear(x, weight[0])
    with pytest.raises(ValueError, match=r"bias has shape \(5,\).*\(8,\)"):
        linear(x, weight, bias[:5])
    with pytest.raises(ValueError, match="input is a scalar"):
        linear(x[0, 0], weight)
    with pytest.raises(TypeError, match=r"weight is torch.float16 and input torch.float32"):
        linear(x, weight.half())
    with pytest.raises(TypeError, match=r"input is torch.int64"):
        linear(torch.ones(5, 16, dtype=torch.int64, device=device), weight)
    with pytest.raises(ValueError, match=r"input on .*, weight on meta"):
        linear(x, weight.to("meta"))


def test_bad_buffers(device):
    x, weight, _ = make((5,), 16, 8, device=device)
    buffer = torch.zeros(8, 16, device=device)
    with pytest.raises(TypeError, match=r"weight_grad_buffer is torch.float16.*torch.float32"):
        linear(x, weight, weight_grad_buffer=buffer.half())
    with pytest.raises(ValueError, match=r"shape \(16, 8\).*\(8, 16\)"):
        linear(x, weight, weight_grad_buffer=buffer.T)
    with pytest.raises(ValueError, match=r"requires a gradient"):
        linear(x, weight, weight_grad_buffer=buffer.requires_grad_())
    with pytest.raises(ValueError, match=r"weight_grad_buffer on meta"):
        linear(x, weight, weight_grad_buffer=torch.zeros(8, 16, device="meta"))
