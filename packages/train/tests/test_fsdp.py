"""What two processes compute under FSDP is what one computes on the joined batch (gloo)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tilewright_dist import DistributedEnvironment
from tilewright_dist.testing import run_ranks
from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW
from tilewright_train.batches import WindowRows
from tilewright_train.cli import main
from tilewright_train.config import DpoOptions
from tilewright_train.data import ValidationRows
from tilewright_train.dpo import SequenceLogProbs
from tilewright_train.evaluation import validate
from tilewright_train.guilty import find_guilty_together
from tilewright_train.objectives import NextToken
from tilewright_train.precision import arithmetic, cast_weights
from tilewright_train.preference_run import make_objective
from tilewright_train.replicas import own_rows, replicate, whole_model, whole_weights
from tilewright_train.samples import Samples
from tilewright_train.start import Start

# Five rows of heads and 21 of the vocabulary: two processes have unequal parts of both.
CONFIG = ModelConfig(
    vocab_size=21,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=5,
    intermediate_size=24,
    max_position_embeddings=16,
)
# Without losses of routers, which are means within a micro-batch.
MOE = dataclasses.replace(
    CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router_aux_loss_coef=0.0
)
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "experts": {"config": MOE},
    "bf16": {"precision": "bf16"},
    "bf16-weights": {"precision": "bf16-weights"},
    "fp16": {"precision": "fp16"},
    "pairs": {"pairs": True},
}


def environment(rank: int) -> DistributedEnvironment:
    place = {"rank": rank, "world_size": dist.get_world_size(), "distributed": True}
    return DistributedEnvironment(device=torch.device("cpu"), **place)


def made(
    here: DistributedEnvironment, *, config: ModelConfig = CONFIG, precision: str = "fp32",
    recompute: Any = "none", pairs: bool = False,
) -> tuple[CausalLM, nn.Module, Any]:  # fmt: skip
    """A model, what is called, and the optimizer; of one process where `here` has no group."""
    torch.manual_seed(0)
    model = CausalLM(config)
    cast_weights(model, precision)
    model.recompute = recompute
    module, optimizer = replicate(
        SequenceLogProbs(model) if pairs else model,
        lambda _: AdamW(model.parameters(), 0.01, master=arithmetic(precision).master),
        parallel="fsdp",
        precision=precision,
        environment=here,
        max_grad_norm=1.0,
    )
    return model, module, optimizer


def loss_of(module: nn.Module, ids: Tensor, precision: str, pairs: bool) -> Tensor:
    with arithmetic(precision).autocast("cpu"):
        if not pairs:
            return module(ids, labels=ids, num_items=8 * 7).loss
        places = torch.arange(ids.numel())
        rows, lengths = places // 8, torch.full((len(ids),), 8)
        return -module(ids, ids.flatten(), places, rows, lengths)[0].sum() / 8


def trained(here: DistributedEnvironment, **case: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps over eight rows, and the weights after them."""
    model, module, optimizer = made(here, **case)
    losses = []
    how = case.get("precision", "fp32"), case.get("pairs", False)
    for step in range(3):
        torch.manual_seed(step)
        mine = torch.randint(21, (8, 8))[here.rank :: here.world_size]
        losses.append(0.0)
        for ids in mine.chunk(2):
            loss = loss_of(module, ids, *how)
            (loss * here.world_size).backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    weights = whole_weights(model, optimizer)
    return losses, dict(model.state_dict()) if weights is None else weights


def each_case(rank: int) -> dict[str, Any]:
    return {name: trained(environment(rank), **case) for name, case in CASES.items()}


def test_two_processes_take_the_steps_of_one() -> None:
    first, second = run_ranks(each_case, timeout=300)
    for name, case in CASES.items():
        losses, weights = trained(DistributedEnvironment(device=torch.device("cpu")), **case)
        # In 16 bits weights of norms are rounded, too; an update of Adam's is as long as ever.
        exact = case.get("precision", "fp32") == "fp32"
        rounding = 1e-5 if exact else 2e-2
        for one, other, both in zip(first[name][0], second[name][0], losses, strict=True):
            assert one + other == pytest.approx(both, rel=rounding), name
        assert second[name][1] == {}
        for key, tensor in weights.items():
            found = first[name][1][key]
            assert found.dtype == tensor.dtype
            limit = 1e-4 if exact else 0.06
            torch.testing.assert_close(found, tensor, rtol=rounding, atol=limit, msg=name)


def compared(rank: int, folder: Path, precision: str) -> dict[str, Any]:
    """What a frozen reference gives for this process's rows, and what is kept of it."""
    policy, module, optimizer = made(environment(rank), precision=precision, pairs=True)
    chosen: Any = SimpleNamespace(
        config=SimpleNamespace(dpo=DpoOptions()), settled=SimpleNamespace(precision=precision)
    )
    objective = make_objective(chosen, Start(folder), policy, 21, optimizer.wait_for_parameters)
    reference: Any = objective.reference
    found, own = [], []
    for step in range(2):
        batch: Any = SimpleNamespace(
            inputs=scored(torch.randint(21, (2, 8), generator=seeded(rank)))
        )
        with arithmetic(precision).autocast("cpu"):
            found.append(reference.log_probs(batch))
            gains, _ = module(**batch.inputs)
        own.append(gains.detach())
        gains.sum().backward()
        if step == 0:
            optimizer.step()
    kept = [(p.numel(), own_rows(p).numel()) for p in reference.scorer.parameters()]
    return {"found": found, "own": own, "kept": kept}


def seeded(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(rank)


def scored(ids: Tensor) -> dict[str, Tensor]:
    """Inputs of `SequenceLogProbs` that predict every token."""
    places = torch.arange(ids.numel())
    lengths = torch.full((len(ids),), 8)
    return {"input_ids": ids, "labels": ids.flatten(), "places": places, "sequences": places // 8,
            "lengths": lengths}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_reference_is_divided_as_the_policy_is(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(CONFIG)
    model.save_pretrained(tmp_path)
    ranks = run_ranks(compared, tmp_path, precision, timeout=120)
    for rank, of in enumerate(ranks):
        with torch.no_grad(), arithmetic(precision).autocast("cpu"):
            inputs = scored(torch.randint(21, (2, 8), generator=seeded(rank)))
            alone = SequenceLogProbs(model)(**inputs)[0]
        before, after = of["found"]
        limit = 1e-5 if precision == "fp32" else 2e-2
        torch.testing.assert_close(before, alone, rtol=limit, atol=limit)
        # It computes as the policy does, bit for bit (the loss begins at ln 2), and never changes.
        assert torch.equal(before, of["own"][0])
        assert torch.equal(before, after)
        assert not torch.equal(of["own"][0], of["own"][1])
    # Not even embedding and head are whole behind a forward pass.
    first, second = (of["kept"] for of in ranks)
    for (whole, one), (_, other) in zip(first, second, strict=True):
        assert one + other == whole
        assert one < whole


class Marred(torch.autograd.Function):
    """Passes on what it gets; its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * torch.nan


def looked_at(rank: int) -> tuple[list[str | None], list[float], list[bool]]:
    """What is found guilty, the validation loss of five rows, and whether a whole model is it."""
    here = environment(rank)
    model, module, optimizer = made(here)
    ids = torch.arange(8).view(1, 8)

    def anyone(found: str | None) -> bool:
        everyone: list[str | None] = [None, None]
        dist.all_gather_object(everyone, found)
        return any(everyone)

    def guilty(mar: Callable[[Any, Any, Any], Any] | None = None) -> str | None:
        """With one module's output changed on rank 1 alone."""
        handle = None
        if mar is not None and rank == 1:
            handle = model.layers[1].get_submodule("mlp").register_forward_hook(mar)
        found = find_guilty_together(model, lambda: module(ids, labels=ids).loss, anyone)
        optimizer.wait_for_parameters()
        if handle is not None:
            handle.remove()
        return found

    found = [
        guilty(),
        guilty(lambda module, inputs, output: output * torch.nan),
        guilty(lambda module, inputs, output: Marred.apply(output)),
    ]
    parameters: Any = dict(model.named_parameters())
    assert all(p.grad is None for p in parameters.values())

    tokens = torch.randint(21, (5 * 8 + 1,), generator=torch.Generator().manual_seed(0))
    rows = WindowRows(
        Samples(tokens, torch.tensor([41])), seq_len=9, seed=None, document_mask=False
    )
    losses = []
    # Of five rows in all, or of a single one, which the second process has no part of.
    for numbers in ((0, 1, 2, 3, 4), (0,)):
        several = ValidationRows(parts=((rows, numbers),))
        losses.append(
            validate(
                NextToken(), module, several, batch_size=1, environment=here,
                autocast=torch.autocast("cpu", enabled=False),
            ).loss
        )  # fmt: skip
        optimizer.wait_for_parameters()
    weights = whole_weights(model, optimizer)
    same = []
    if weights:
        alone, _, _ = made(DistributedEnvironment(device=torch.device("cpu")))
        written = whole_model(CONFIG, weights, torch.device("cpu"))
        with torch.no_grad():
            same = [torch.equal(written(ids).logits, alone(ids).logits)]
    with torch.no_grad():
        weight = parameters["layers.0.mlp.down_proj.weight"]
        assert isinstance(weight, DTensor)
        if rank == 1:
            weight.to_local()[0, :3] = torch.nan
    return [*found, guilty()], losses, same


def test_what_is_looked_at_between_steps() -> None:
    (mine, losses, same), (theirs, others, _) = run_ranks(looked_at, timeout=300)
    mlp = "layers.1.mlp"
    assert mine == [None, None, None, None]
    assert theirs == [
        None,
        f"output of {mlp}",
        "gradient of the output of layers.1.post_attention_layernorm",
        "parameter layers.0.mlp.down_proj.weight (3 of 240 values not finite)",
    ]
    model, _, _ = made(DistributedEnvironment(device=torch.device("cpu")))
    tokens = torch.randint(21, (5 * 8 + 1,), generator=torch.Generator().manual_seed(0))
    ids = tokens.unfold(0, 9, 8)
    assert losses == others
    for loss, rows in zip(losses, (ids, ids[:1]), strict=True):
        assert loss == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)
    assert same == [True]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--optim", "muon"], "optim muon orthogonalizes whole matrices"),
        (["--compile"], "compile would trace the exchanges"),
    ],
)
def test_what_needs_whole_parameters_is_refused_before_a_run_is_made(
    flags: list[str], told: str, tiny_flags: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*tiny_flags, "--parallel", "fsdp", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")
    assert "use --parallel zero1 or ddp, or " in line
    assert not (tmp_path / "runs").exists()
