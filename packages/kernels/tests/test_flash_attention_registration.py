"""Attention as an operator of torch's: compiled, in a graph, repeated, poisoned, under autocast."""

import pytest
import torch
import torch.utils.checkpoint

from tilewright_kernels import (
    attention_reference,
    flash_attn_decode,
    flash_attn_varlen_func,
    scaled_dot_product_attention,
    use_backend,
)
from tilewright_kernels._operator import Operator
from tilewright_kernels.flash_attention import registration
from tilewright_kernels.testing import check_compiles, check_deterministic, poisoned_memory

OP = "scaled_dot_product_attention"


def make(device, lengths=(20, 24), dtype=torch.float32, *, heads=(2, 2), dims=(16, 16)):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, length, dim, generator=generator).to(device, dtype).requires_grad_()
        for n, length, dim in (
            (heads[0], lengths[0], dims[0]),
            (heads[1], lengths[1], dims[0]),
            (heads[1], lengths[1], dims[1]),
        )
    )
    return q, k, v


def make_packed(device):
    """Three sequences of (5, 5), (0, 3) and (20, 30) queries and keys."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(tokens, heads, 16, generator=generator).to(device).requires_grad_()
        for tokens, heads in ((25, 2), (38, 1), (38, 1))
    ]
    cu_q, cu_k = torch.tensor([[0, 5, 5, 25], [0, 5, 8, 38]], dtype=torch.int32, device=device)
    return *inputs, cu_q, cu_k, 20, 30


def make_cache(device):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, 4, 16, generator=generator).to(device)
    k, v = torch.randn(2, 3, 70, 2, 16, generator=generator).to(device)
    return q, k, v, torch.tensor((1, 33, 70), dtype=torch.int32, device=device)


def test_second_derivative_is_refused(device):
    q, k, v = make(device)
    with use_backend("triton"):
        out = scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_compiles(device):
    check_compiles(
        lambda q, k, v: scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, window_size=(7, -1), return_lse=True
        ),
        make(device, heads=(4, 2)),
        operator=OP,
    )


def test_packed_compiles(device):
    check_compiles(
        lambda *inputs: flash_attn_varlen_func(*inputs, is_causal=True),
        make_packed(device),
        operator="flash_attn_varlen_func",
    )


def test_dropout_and_decode_compile(device):
    q, k, v = make(device)
    cache = make_cache(device)

    def function(q, k, v, *cache):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5), flash_attn_decode(*cache)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with use_backend("triton"), torch.no_grad():
        first, again = compiled(q, k, v, *cache), compiled(q, k, v, *cache)
        assert not torch.equal(first[0], again[0])  # a seed of its own each call
        torch.testing.assert_close(first[1], flash_attn_decode(*cache))


def test_opcheck(device):
    seed = torch.tensor(7, device=device)
    options = ([1, 0, -1, -1], 0.25, 1.5, 0.2, True)
    q, k, v = (
        t.detach().transpose(1, 2).requires_grad_() for t in make(device, (9, 12), heads=(2, 1))
    )
    inputs = (q, k, v, seed, None, None, 0, 0, *options)
    torch.library.opcheck(torch.ops.tilewright.attention_forward.default, inputs)
    with torch.no_grad():
        out, lse = torch.ops.tilewright.attention_forward(*inputs)
        for wanted in ((True, True), (False, True)):
            torch.library.opcheck(
                torch.ops.tilewright.attention_backward.default,
                (out, None, q, k, v, out, lse, *inputs[3:], *wanted),
            )
    packed = make_packed(device)
    torch.library.opcheck(
        torch.ops.tilewright.varlen_attention_forward.default,
        (*packed[:3], seed, *packed[3:], *options),
    )
    torch.library.opcheck(
        torch.ops.tilewright.decode_attention_forward.default,
        (*make_cache(device), 0.25, 0.0, -1),
    )


def test_deterministic_backward_gives_the_same_bits(device):
    size, dim = (20, 16) if device.type == "cpu" else (1000, 64)
    inputs = make(device, (size, size), torch.float16, heads=(4, 2), dims=(dim, dim))
    dout = torch.randn_like(inputs[0])

    def run():
        out = scaled_dot_product_attention(
            *inputs, is_causal=True, enable_gqa=True, deterministic=True
        )
        return out, *torch.autograd.grad(out, inputs, dout)

    with use_backend("triton"):
        check_deterministic(run, runs=10)


def test_deterministic_follows_torch(device, monkeypatch):
    asked = []
    launch = registration.launch_backward
    monkeypatch.setattr(
        registration,
        "launch_backward",
        lambda *args, **kwargs: (asked.append(kwargs["deterministic"]), launch(*args, **kwargs)),
    )
    q, k, v = make(device)
    with use_backend("triton"):
        scaled_dot_product_attention(q, k, v).sum().backward()
        with poisoned_memory():  # turns torch's setting on
            scaled_dot_product_attention(q, k, v).sum().backward()
            scaled_dot_product_attention(q, k, v, deterministic=False).sum().backward()
    assert asked == [False, True, False]


@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "atomic"])
@pytest.mark.parametrize("lengths", [(45, 77), (77, 45)], ids=str)
def test_every_element_is_written(lengths, deterministic, device):
    inputs = make(device, lengths, heads=(4, 2), dims=(20, 12))
    with use_backend("triton"), poisoned_memory():
        out, lse = scaled_dot_product_attention(
            *inputs, is_causal=True, causal_alignment="bottom_right", enable_gqa=True,
            return_lse=True, deterministic=deterministic,
        )  # fmt: skip
        grads = torch.autograd.grad(out.sum(), inputs)
    assert not any(t.isnan().any() for t in (out, lse, *grads))


@pytest.mark.parametrize("wanted", [(0,), (1,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("deterministic", [True, False], ids=["split", "atomic"])
def test_gradients_that_nobody_wants(deterministic, wanted, monkeypatch, device):
    check_gradients_that_nobody_wants(
        make(device, (45, 77), heads=(4, 2)), deterministic, wanted, monkeypatch
    )


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_that_nobody_wants_of_longer_sequences(width, wanted, monkeypatch):
    # On Hopper the kernels of 16 bits; for the gradients of keys alone, after the one of the rows.
    inputs = make("cuda", (145, 277), heads=(4, 2), dims=(width, width), dtype=torch.bfloat16)
    check_gradients_that_nobody_wants(inputs, True, wanted, monkeypatch)


def check_gradients_that_nobody_wants(inputs, deterministic, wanted, monkeypatch):
    kernels: list[str] = []
    launch = Operator.launch

    def record(operator, kernel, *args, **meta):
        kernels.append(kernel.__name__)
        launch(operator, kernel, *args, **meta)

    def gradients(wanted):
        q, k, v = some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, deterministic=deterministic
        )
        kernels.clear()
        return torch.autograd.grad(out, [some[i] for i in wanted], torch.ones_like(out))

    monkeypatch.setattr(Operator, "launch", record)
    with use_backend("triton"):
        every = gradients((0, 1, 2))
        some = gradients(wanted)
    assert all(not x.isnan().any() and (x != 0).any() for x in some)
    torch.testing.assert_close(some, tuple(every[i] for i in wanted))
    # dq is one kernel's, or is added up by that of the keys and then finished.
    writes_dq = any("queries" in name or "finish" in name for name in kernels)
    assert writes_dq == (0 in wanted)
    assert any("keys" in name for name in kernels) == (1 in wanted or 2 in wanted)


def test_inputs_are_left_alone(device):
    inputs = make(device)
    before = [t.detach().clone() for t in inputs]
    dout = torch.ones_like(inputs[0])
    with use_backend("triton"):
        scaled_dot_product_attention(*inputs).backward(dout)
    for a, b in zip((*inputs, dout), (*before, torch.ones_like(dout)), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_lse_alone(device):
    inputs = make(device)
    with use_backend("triton"):
        _, lse = scaled_dot_product_attention(*inputs, return_lse=True)
        grads = torch.autograd.grad(lse.sum(), inputs[:2])
    _, lse = attention_reference(*inputs, return_lse=True)
    torch.testing.assert_close(grads, torch.autograd.grad(lse.sum(), inputs[:2]))


def test_gradient_of_lse_alone_under_checkpoint(device):
    # Checkpointing hands out what was saved once.
    q, k, v = make(device)

    def lse(q, k):
        return scaled_dot_product_attention(q, k, v, return_lse=True)[1]

    with use_backend("triton"):
        expected = torch.autograd.grad(lse(q, k).sum(), (q, k))
        recomputed = torch.utils.checkpoint.checkpoint(lse, q, k, use_reentrant=False)
        assert recomputed is not None
        torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), (q, k)), expected)


def test_autocast(device):
    q, k, v = make(device)
    dtype = torch.float16
    with use_backend("triton"), torch.autocast(device.type, dtype):
        out = scaled_dot_product_attention(q, k, v)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.gpu
def test_replays_of_a_graph_draw_dropout_anew():
    q, k, v = (t.detach() for t in make(torch.device("cuda"), (64, 64), torch.bfloat16))
    scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
