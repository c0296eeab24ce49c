"""A step's memory in closed form: against what autograd packs, and on a GPU against its peak."""

import dataclasses
import gc
from typing import Literal

import pytest
import torch
from torch import Tensor

from tilewright_kernels import use_backend
from tilewright_model import CausalLM, ModelConfig, preset
from tilewright_optim import AdamW
from tilewright_train.memory_plan import (
    MARGIN,
    MemoryPlan,
    Optim,
    Recompute,
    StepShape,
    at_the_loss,
    largest_micro_batch,
    plan_memory,
)
from tilewright_train.precision import arithmetic, cast_weights

Backend = Literal["auto", "torch", "triton"]

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
STEP = StepShape(rows=2, seq_len=16, fused_mlp=True)


def kept_by_autograd(
    config: ModelConfig,
    precision: str,
    recompute: Recompute = "none",
    gated_mlp: Backend = "triton",
) -> int:
    """Bytes that a forward keeps besides parameters, each storage once."""
    model = CausalLM(config)
    cast_weights(model, precision)
    model.recompute = recompute
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (pointer := x.untyped_storage().data_ptr()) not in own:
            kept[pointer] = x
        return x

    ids = torch.zeros(STEP.rows, STEP.seq_len, dtype=torch.int64)
    forward = arithmetic(precision).autocast("cpu")
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with use_backend("triton", gated_mlp=gated_mlp), saving, forward:
        loss = model(ids, labels=ids).loss
    head = model.embed_tokens.weight.shape  # the loss's gradient by it
    found = sum(x.untyped_storage().nbytes() for x in kept.values() if x.shape != head)
    del loss
    return found


def kept_by_plan(plan: MemoryPlan, config: ModelConfig, precision: str) -> int:
    """The same of a plan: without the cast of the output projection, which the loss forgets."""
    dtypes = arithmetic(precision)
    head = config.vocab_size * config.hidden_size * dtypes.products.itemsize
    return plan.activations + plan.casts - (head if dtypes.autocasts else 0)


# Values in bfloat16 are wrong in the interpreter; sizes are not.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_activations_and_casts_are_what_autograd_keeps(precision: str) -> None:
    loss = at_the_loss(CONFIG, dataclasses.replace(STEP, precision=precision))
    found = kept_by_autograd(CONFIG, precision)
    assert kept_by_plan(loss, CONFIG, precision) == pytest.approx(found, rel=0.03)


def test_a_plain_mlp_keeps_more() -> None:
    step = dataclasses.replace(STEP, precision="fp32", fused_mlp=None)
    found = kept_by_autograd(CONFIG, "fp32", gated_mlp="torch")
    assert at_the_loss(CONFIG, step).activations == pytest.approx(found, rel=0.03)
    # As the operator itself chooses: in float32, and of few tokens.
    config, long = preset("0.5b"), StepShape(rows=2, seq_len=2048)
    unsaid = plan_memory(config, long)
    assert unsaid == plan_memory(config, dataclasses.replace(long, fused_mlp=True))
    short = dataclasses.replace(long, rows=1)
    assert 2 * at_the_loss(config, short).activations > at_the_loss(config, long).activations


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_anew_is_not_kept(recompute: Recompute) -> None:
    step = dataclasses.replace(STEP, precision="bf16", recompute=recompute)
    loss = at_the_loss(CONFIG, step)
    found = kept_by_autograd(CONFIG, "bf16", recompute)
    assert kept_by_plan(loss, CONFIG, "bf16") == pytest.approx(found, rel=0.06)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights", "fp16"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_weights_and_states_are_what_is_stored(precision: str, optim: Optim) -> None:
    parameters = sum(p.numel() for p in CausalLM(CONFIG).parameters())
    step = dataclasses.replace(STEP, precision=precision, optim=optim)
    plan = plan_memory(CONFIG, step)
    assert plan.weights == parameters * (2 if precision == "bf16-weights" else 4)
    if optim == "adamw":
        assert plan.optimizer == parameters * (10 if precision == "bf16-weights" else 8)
    else:
        assert plan.optimizer < parameters * (10 if precision == "bf16-weights" else 8)


def test_gradients_stay_where_they_are_summed_or_averaged() -> None:
    config = preset("0.5b")
    alone = plan_memory(config, StepShape(rows=4, seq_len=2048))
    assert alone.moment == "backward"
    assert alone.gradients < alone.weights / 4
    for parts, world_size in ((2, 1), (1, 2)):
        step = StepShape(rows=4, seq_len=2048, parts=parts, world_size=world_size)
        plan = plan_memory(config, step)
        assert plan.gradients == plan.weights
    # With few tokens the update is highest: all gradients, no activations.
    few = plan_memory(config, StepShape(rows=1, seq_len=128))
    assert (few.moment, few.activations, few.gradients) == ("update", 0, few.weights)


def test_zero1_divides_the_states_alone() -> None:
    step = StepShape(rows=4, seq_len=2048, world_size=4)
    ddp = plan_memory(preset("0.5b"), step)
    zero1 = plan_memory(preset("0.5b"), dataclasses.replace(step, parallel="zero1"))
    assert zero1.optimizer == ddp.optimizer // 4
    assert zero1.total == ddp.total - ddp.optimizer + zero1.optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_fsdp_divides_weights_gradients_and_states(precision: str) -> None:
    config = preset("0.5b")
    step = StepShape(rows=1, seq_len=256, parts=2, world_size=4, precision=precision)
    ddp = plan_memory(config, step)
    fsdp = plan_memory(config, dataclasses.replace(step, parallel="fsdp"))
    assert fsdp.weights == ddp.weights // 4
    assert fsdp.optimizer == ddp.optimizer // 4
    assert (ddp.gathered, ddp.gradients) == (0, ddp.weights)
    # What is whole at a time: embedding and head, and a few of 16 blocks.
    assert 0 < fsdp.gathered < ddp.weights
    assert fsdp.casts <= ddp.casts
    assert fsdp.total < 0.75 * ddp.total
    # One process has nothing to divide.
    alone = dataclasses.replace(step, world_size=1)
    assert plan_memory(config, dataclasses.replace(alone, parallel="fsdp")) == plan_memory(
        config, alone
    )


def test_pairs_are_two_sequences_and_a_reference_is_a_second_model() -> None:
    config, step = preset("0.5b"), StepShape(rows=4, seq_len=2048)
    pairs = plan_memory(config, dataclasses.replace(step, rows=2, sequences=2))
    assert pairs == plan_memory(config, step)
    compared = plan_memory(config, dataclasses.replace(step, has_reference=True))
    assert compared.weights == 2 * plan_memory(config, step).weights
    divided = dataclasses.replace(step, has_reference=True, parallel="fsdp", world_size=4)
    assert plan_memory(config, divided).weights == compared.weights // 4


def test_the_largest_micro_batch_divides_the_rows_and_fits() -> None:
    config, step = preset("0.5b"), StepShape(rows=1, seq_len=2048)
    memory = 40 * 2**30
    found = largest_micro_batch(config, step, memory, rows=48)
    assert found is not None
    rows, plan = found
    assert 48 % rows == 0
    assert plan.total <= (1 - MARGIN) * memory
    following = min(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48) if n > rows)
    more = dataclasses.replace(step, rows=following, parts=48 // following)
    assert plan_memory(config, more).total > (1 - MARGIN) * memory
    assert largest_micro_batch(config, step, 2**30, rows=48) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "rows", "seq_len", "precision"),
    [
        ("26m", 32, 512, "bf16"),
        ("100m", 8, 1024, "bf16"),
        ("0.5b", 4, 1024, "bf16"),
        ("0.5b", 4, 1024, "bf16-weights"),
        ("100m", 4, 1024, "fp32"),
    ],
)
def test_the_plan_is_within_a_tenth_of_the_peak(
    name: str, rows: int, seq_len: int, precision: str
) -> None:
    config, dtypes = preset(name), arithmetic(precision)
    with torch.device("meta"):
        model = CausalLM(config)
    model.materialize("cuda")
    cast_weights(model, precision)
    optimizer = AdamW(model.parameters(), 1e-4, master=dtypes.master)
    before = torch.cuda.memory_allocated() - sum(p.numel() * p.itemsize for p in model.parameters())
    ids = torch.randint(config.vocab_size, (rows, seq_len), device="cuda")
    for _ in range(2):  # states are made by the first
        torch.cuda.reset_peak_memory_stats()
        with dtypes.autocast("cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    del model, optimizer, loss
    gc.collect()
    plan = plan_memory(config, StepShape(rows=rows, seq_len=seq_len, precision=precision))
    assert plan.total == pytest.approx(peak, rel=0.1)
