"""Forward and backward of a whole decoder, its loss included, over [parameters, batch, tokens].

Ours runs as it is; its peers are the same module on torch's operators, as it is and compiled block
by block. A mixture of experts stands beside a dense model of its active size: at equal tokens the
ratio of their times is that of their tokens a second.

Results are compared with float64 in float32 and on few tokens: in bfloat16 a router's near ties
fall as they like.
"""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright_bench import Case, Work, by_device, run, variants
from tilewright_kernels import use_backend
from tilewright_model import (
    CausalLM,
    ModelConfig,
    count_parameters,
    flops_per_token,
    preset,
)

HALF_BILLION = preset("0.5b")
MIXTURE = preset("moe-0.5b-a0.15b")
OF_ACTIVE_SIZE = dataclasses.replace(MIXTURE, num_experts=0)
TINY = preset("nano", num_hidden_layers=1, vocab_size=64, hidden_size=32, intermediate_size=48)

CONFIGS = by_device(gpu=[HALF_BILLION, MIXTURE, OF_ACTIVE_SIZE], cpu=[TINY])
BATCH, TOKENS = by_device(gpu=(16, 2048), cpu=(1, 16))
CHECKED_TOKENS = 128


def decoder(config: ModelConfig, parameters: tuple[Tensor, ...]) -> CausalLM:
    """A model that has these tensors themselves for parameters."""
    with torch.device("meta"):
        model = CausalLM(config)
    for (name, _), tensor in zip(list(model.named_parameters()), parameters, strict=True):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(tensor, torch.nn.Parameter):
            setattr(module, leaf, tensor)
        else:  # of the float64 oracle: no leaf, which a parameter would have to be
            delattr(module, leaf)
            setattr(module, leaf, tensor)
    assert model.rotary is not None
    model.rotary.to_empty(device=parameters[0].device)
    return model


def loss_of(config: ModelConfig, backend: Literal["auto", "torch"], *, compiled: bool):
    """(ids, *parameters) to the loss; each set of parameters has a model of its own."""
    models: Any = WeakTensorKeyDictionary()

    def build(parameters: tuple[Tensor, ...]) -> CausalLM:
        model = decoder(config, parameters)
        for block in model.layers if compiled else ():
            block.compile(fullgraph=True, dynamic=False)
        return model

    def loss(ids: Tensor, *parameters: Tensor) -> Tensor:
        if parameters[0] not in models:
            models[parameters[0]] = build(parameters)
        with use_backend(backend):
            return models[parameters[0]](ids, labels=ids).loss

    return loss


def case(config: ModelConfig, batch: int, tokens: int) -> Case:
    def inputs_of(batch, tokens, dtype, device, generator):
        with torch.device("meta"):
            model = CausalLM(config)
        ids = torch.randint(config.vocab_size, (batch, tokens), device=device, generator=generator)
        options = {"device": device, "dtype": dtype, "generator": generator}
        return ids, *(
            torch.nn.Parameter(
                torch.ones(p.shape, device=device, dtype=dtype)
                if p.ndim == 1
                else 0.02 * torch.randn(p.shape, **options)
            )
            for p in model.parameters()
        )

    size, of_step = batch * tokens, flops_per_token(config, tokens)
    weights = 2 * count_parameters(config).total
    return Case(
        operator="causal_lm",
        shape=(count_parameters(config).total, batch, tokens),
        dtype=torch.bfloat16,
        make_inputs=lambda device, generator: inputs_of(
            batch, tokens, torch.bfloat16, device, generator
        ),
        check_inputs=lambda device, generator: inputs_of(
            1, min(tokens, CHECKED_TOKENS), torch.float32, device, generator
        ),
        reference=loss_of(config, "torch", compiled=False),
        forward=Work(bytes=weights, flops=size * of_step // 3),
        backward=Work(bytes=2 * weights, flops=size * of_step * 2 // 3),
    )


def providers(config: ModelConfig) -> dict[str, Any]:
    """Whose code; of a mixture and its dense neighbour ours alone."""
    ours: dict[str, Any] = {"tilewright": lambda: loss_of(config, "auto", compiled=False)}
    if config in (MIXTURE, OF_ACTIVE_SIZE):
        return ours
    return ours | {
        "torch": lambda: loss_of(config, "torch", compiled=False),
        "compile": lambda: loss_of(config, "torch", compiled=True),
    }


MEASURED = [
    (case(config, BATCH, TOKENS), variant)
    for config in CONFIGS
    for variant in variants(providers(config), ("fwd+bwd",))
]


@pytest.mark.parametrize(("case", "variant"), MEASURED, ids=str)
def bench_causal_lm(benchmark, case: Case, variant):
    run(benchmark, case, variant)
