"""Whole runs in every precision: they learn alike, resume bit for bit, and say their loss scale."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tilewright_model import CausalLM, ModelConfig
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.precision import arithmetic, cast_weights
from tilewright_train.pretraining import run


def train(flags: list[str], *more: str) -> Path:
    return run(parse([*flags, *more]), io.StringIO())


def last_loss(folder: Path) -> float:
    loss = read_metrics(folder / "metrics.jsonl")[-1].val_loss
    assert loss is not None
    return loss


def test_runs_in_every_precision_learn_alike(tiny_flags: list[str]) -> None:
    exact = last_loss(train(tiny_flags, "--precision", "fp32"))
    for precision in ("bf16", "bf16-weights", "fp16"):
        folder = train(tiny_flags, "--precision", precision)
        assert last_loss(folder) == pytest.approx(exact, rel=0.02), precision
        saved = load_file(folder / "checkpoints" / "step-000012" / "model.safetensors")
        stored = {tensor.dtype for tensor in saved.values()}
        assert stored == {torch.bfloat16 if precision == "bf16-weights" else torch.float32}
        scales = {record.loss_scale for record in read_metrics(folder / "metrics.jsonl")[1:]}
        assert scales == ({65536.0} if precision == "fp16" else {None})


@pytest.mark.parametrize(
    ("precision", "optim"),
    [("fp16", "adamw"), ("bf16-weights", "adamw"), ("bf16-weights", "muon")],
)
def test_a_resumed_run_is_the_same_run(
    tiny_flags: list[str], tmp_path: Path, precision: str, optim: str
) -> None:
    flags = [*tiny_flags, "--precision", precision, "--optim", optim]
    whole = train(flags, "--name", "whole")
    halfway = train(flags, "--name", "halfway")
    for name in ("summary.json", "checkpoints/step-000012", "checkpoints/step-000008"):
        place = halfway / name
        place.rename(tmp_path / place.name)
    out = tiny_flags[tiny_flags.index("--out") + 1]
    resumed = train(["--resume", str(halfway), "--out", out])
    assert resumed == halfway
    one, other = (read_metrics(folder / "metrics.jsonl") for folder in (whole, halfway))
    assert [(r.step, r.loss, r.grad_norm, r.loss_scale, r.val_loss) for r in one] == [
        (r.step, r.loss, r.grad_norm, r.loss_scale, r.val_loss) for r in other
    ]
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = (
            load_file(folder / "checkpoints" / "step-000012" / file) for folder in (whole, halfway)
        )
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name
    states = load_file(whole / "checkpoints" / "step-000012" / "optimizer.safetensors")
    masters = [name for name in states if name.endswith("master_low")]
    assert bool(masters) == (precision == "bf16-weights")
    facts = json.loads((whole / "checkpoints" / "step-000012" / "training.json").read_text())
    scale = facts["facts"]["guard"]["loss_scale"]
    assert (scale is not None) == (precision == "fp16")


def test_recomputation_changes_no_bit(tiny_flags: list[str]) -> None:
    losses = [
        [r.loss for r in read_metrics(train(tiny_flags, "--recompute", mode) / "metrics.jsonl")]
        for mode in ("none", "selective", "full")
    ]
    assert losses[0] == losses[1] == losses[2]


# Of the hidden states, as torch's own tracing looks at them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("more", [[], ["--document-mask", "on", "--recompute", "full"]])
def test_compiled_blocks_learn_alike(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """As traced; what the compiler makes of it is torch's, and takes a minute on a CPU."""
    compile_module, compiled = nn.Module.compile, []

    def traced(self: nn.Module, **options: Any) -> None:
        compiled.append(type(self).__name__)
        compile_module(self, **options, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    flags = [*tiny_flags, *more]
    exact, traced_loss = (last_loss(train(flags, *flag)) for flag in ([], ["--compile"]))
    assert compiled == ["Block"]
    assert traced_loss == pytest.approx(exact, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_learn_alike_on_a_gpu(tiny_flags: list[str]) -> None:
    flags = [*tiny_flags, "--device", "cuda", "--hidden-size", "64"]
    exact, compiled = (last_loss(train(flags, *flag)) for flag in ([], ["--compile"]))
    assert compiled == pytest.approx(exact, rel=0.01)


def test_weights_are_cast_and_tables_are_not() -> None:
    model = CausalLM(
        ModelConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    )
    cast_weights(model, "bf16-weights")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float32}


def test_an_unknown_precision_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"fp8.*fp32, bf16, bf16-weights, fp16"):
        arithmetic("fp8")


def test_tf32_is_torchs_switch_and_put_back(tiny_flags: list[str]) -> None:
    from tilewright_train.machine import configured

    before = torch.backends.cuda.matmul.allow_tf32
    options = {"threads": 1, "deterministic": False, "backend": "auto", "device": "cpu"}
    with configured(**options, tf32=True):
        assert torch.backends.cuda.matmul.allow_tf32 is True
    with configured(**options, tf32=False):  # what a caller chose stays
        assert torch.backends.cuda.matmul.allow_tf32 is before
    assert torch.backends.cuda.matmul.allow_tf32 is before
