"""Activation recomputation and dropout: the same gradients from fewer tensors."""

import dataclasses
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from tilewright_kernels import use_backend
from tilewright_model import CausalLM, ModelConfig
from tilewright_model.causal_lm import Recompute

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    max_position_embeddings=64,
)
VARIANTS = {
    "dense": CONFIG,
    "dropout": dataclasses.replace(CONFIG, residual_dropout=0.2, attention_dropout=0.1),
    "experts": dataclasses.replace(CONFIG, num_experts=3, qk_norm=True),
}


def tokens() -> Tensor:
    return torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))


def gradients(model: CausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: CausalLM) -> int:
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if (pointer := x.untyped_storage().data_ptr()) not in own:
            seen[pointer] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens(), labels=tokens()).loss
    del loss
    return sum(seen.values())


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    ("variant", "backend"), [*((v, "torch") for v in VARIANTS), ("experts", "triton")]
)
def test_gradients_are_the_same_bits(
    variant: str, mode: Literal["selective", "full"], backend: Literal["torch", "triton"]
) -> None:
    torch.manual_seed(0)
    model = CausalLM(VARIANTS[variant])
    with use_backend(backend):
        loss, expected = gradients(model)
        model.recompute = mode
        again, recomputed = gradients(model)
    assert torch.equal(again, loss)
    assert recomputed.keys() == expected.keys()
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, expected[name]), name


def test_less_is_kept() -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    kept = {}
    for mode in get_args(Recompute):
        model.recompute = mode
        kept[mode] = saved_bytes(model)
    # Between the projections of an MLP 3 · 64 numbers a token, of the residual stream 16.
    assert kept["selective"] < 0.6 * kept["none"]
    assert kept["full"] < 0.4 * kept["selective"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compile_whole(variant: str, mode: Recompute) -> None:
    torch.manual_seed(0)
    model = CausalLM(VARIANTS[variant])
    model.recompute = mode
    _, expected = gradients(model)
    torch.compiler.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    loss, compiled = gradients(model)
    assert loss.isfinite()
    assert compiled.keys() == expected.keys()
    if variant != "dropout":  # a traced mask is drawn anew, from the device's generator
        for name, gradient in compiled.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_packed_blocks_compile_whole() -> None:
    torch.manual_seed(0)
    model = CausalLM(VARIANTS["experts"])
    ids, bounds = tokens()[:1], torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = model(ids, labels=ids, cu_seqlens=bounds).loss
    torch.compiler.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(ids, labels=ids, cu_seqlens=bounds).loss, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("variant", ["dense", "experts"])
@pytest.mark.filterwarnings("ignore")
def test_blocks_compile_for_a_gpu(variant: str, mode: Recompute) -> None:
    # Wide enough for the kernels that bfloat16 products have, and for their epilogues.
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = dataclasses.replace(VARIANTS[variant], **shape)
    torch.manual_seed(0)
    model = CausalLM(config).to("cuda", torch.bfloat16)
    model.recompute = mode
    ids = torch.randint(32, (8, 64), device="cuda")

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad.float() for p in model.parameters() if p.grad is not None]

    loss, gradients = step()
    torch.compiler.reset()
    for block in model.layers:
        block.compile(fullgraph=True)
    again, compiled = step()
    torch.testing.assert_close(again, loss, rtol=1e-2, atol=0)
    assert len(compiled) == len(gradients) == len(list(model.parameters()))
    for ours, expected in zip(compiled, gradients, strict=True):
        # Sums are rounded elsewhere: 8 binary digits, a few times.
        assert (ours - expected).norm() <= 0.05 * expected.norm() + 1e-6


def test_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    model, ids = CausalLM(VARIANTS["dropout"]), tokens()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    dense = CausalLM(CONFIG)
    dense.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, dense(ids).logits)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match="recompute is 'some': choose one of none, selective, full"
    ):
        CausalLM(CONFIG).recompute = "some"  # pyrefly: ignore[bad-argument-type]
