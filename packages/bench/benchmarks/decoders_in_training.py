"""Small decoders trained alike on Python's own library, to compare what a configuration chooses.

    python packages/bench/benchmarks/decoders_in_training.py positions --out FILE

    positions   trained on 128 bytes and read up to 512: losses by position, for every encoding, and
                for rotary frequencies that are stretched after training
    heads       losses with 4, 2 and 1 key/value heads
    experts     loads of a mixture of experts, with the balance loss and without

Minutes on one CPU core. All runs of one kind see the same batches from the same seed;
`tilewright_bench.decoders` draws the records.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tilewright_model import Block, CausalLM, ModelConfig, RopeScaling, preset

LENGTH, LONGEST, BATCH = 128, 512, 8
LR, WARMUP_STEPS = 3e-3, 30
MEAN_OF = 20
EVALUATED = 32
"""Sequences of LONGEST bytes that no training batch touches."""

BALANCE = 0.05
"""Weight of the balance loss. After 300 steps 0.01 leaves the busiest expert at 1.5 of the mean."""

BIN = 32
"""Positions that a point of the plot is the mean of."""

DENSE = preset("nano", vocab_size=256, num_key_value_heads=4, max_position_embeddings=LONGEST)
MIXTURE = preset("moe-nano", vocab_size=256, max_position_embeddings=LENGTH)

ENCODINGS = ("rope", "learned", "sinusoidal", "none")
FACTOR = LONGEST / LENGTH
STRETCHED: dict[str, dict[str, Any]] = {
    "rope, linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=FACTOR)},
    "rope, ntk": {"rope_scaling": RopeScaling(rope_type="ntk", factor=FACTOR)},
    "rope, yarn": {
        "rope_scaling": RopeScaling(
            rope_type="yarn", factor=FACTOR, original_max_position_embeddings=LENGTH
        )
    },
    "rope, window of 128": {"sliding_window": LENGTH},
}
"""What is changed after training, by name."""


def corpus() -> tuple[Tensor, Tensor, int]:
    """Bytes of the modules beside `os` to train on and to evaluate, and how many files they are."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], len(files)


def train(
    config: ModelConfig,
    data: Tensor,
    steps: int,
    watch: Callable[[CausalLM, Tensor], None] | None = None,
) -> tuple[CausalLM, list[float]]:
    """A trained model and its losses, means of MEAN_OF steps.

    Args:
        config: of the model.
        data: what it reads.
        steps: of BATCH sequences of LENGTH bytes.
        watch: called with the model and every batch before its step.
    """
    torch.manual_seed(0)
    model = CausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.1)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS) * max(cosine, 0.05)
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=generator)
        batch = data[starts + torch.arange(LENGTH)]
        if watch is not None:
            watch(model, batch)
        output = model(batch, labels=batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        aux = None if output.aux_loss is None else output.aux_loss.item()
        losses.append(output.loss.item() - config.router_aux_loss_coef * (aux or 0.0))
    parts = [losses[i : i + MEAN_OF] for i in range(0, steps, MEAN_OF)]
    return model.eval(), [round(sum(part) / len(part), 4) for part in parts]


@torch.no_grad()
def losses_by_position(model: CausalLM, data: Tensor) -> list[float]:
    """Mean loss of predicting byte t + 1, of bins of BIN positions."""
    starts = torch.linspace(0, len(data) - LONGEST - 1, EVALUATED).long()[:, None]
    batch = data[starts + torch.arange(LONGEST)]
    losses = []
    for rows in batch.split(8):
        log_p = model(rows).logits[:, :-1].float().log_softmax(-1)
        losses.append(-log_p.gather(-1, rows[:, 1:, None])[..., 0])
    by_position = torch.cat(losses).mean(0)
    return [round(part.mean().item(), 4) for part in by_position.split(BIN)]


def positions(data: Tensor, held_out: Tensor, steps: int) -> dict[str, list[float]]:
    """Losses by position, by encoding."""
    found = {}
    for encoding in ENCODINGS:
        config = dataclasses.replace(DENSE, position_embedding=encoding)
        model, _ = train(config, data, steps)
        found[encoding] = losses_by_position(model, held_out)
        print(f"{encoding:20s}", *found[encoding], flush=True)
        for name, change in STRETCHED.items() if encoding == "rope" else ():
            other = CausalLM(dataclasses.replace(config, **change)).eval()
            other.load_state_dict(model.state_dict())
            found[name] = losses_by_position(other, held_out)
            print(f"{name:20s}", *found[name], flush=True)
    return found


def heads(data: Tensor, held_out: Tensor, steps: int) -> dict[str, list[float]]:
    """Training losses and, last, that of held-out bytes, by key/value heads."""
    found = {}
    for count in (4, 2, 1):
        config = dataclasses.replace(DENSE, num_key_value_heads=count)
        model, losses = train(config, data, steps)
        at_end = losses_by_position(model, held_out)[: LENGTH // BIN]
        found[str(count)] = [*losses, round(sum(at_end) / len(at_end), 4)]
        print(f"{count} heads", *found[str(count)], flush=True)
    return found


def experts(data: Tensor, held_out: Tensor, steps: int) -> dict[str, dict[str, list[float]]]:
    """Losses and the load of the busiest expert ÷ the mean, of the worst layer."""
    found = {}
    for name, coefficient in (("balance loss", BALANCE), ("no balance loss", 0.0)):
        config = dataclasses.replace(
            MIXTURE, router_aux_loss_coef=coefficient, router_aux_loss_layers="mean"
        )
        counts: list[Tensor] = []

        def watch(model: CausalLM, _: Tensor, counts: list[Tensor] = counts) -> None:
            if not counts:
                for block in model.layers:
                    cast(Block, block).mlp.register_forward_hook(
                        lambda _module, _args, out: counts.append(out[1].tokens_per_expert)
                    )
                counts.append(torch.zeros(0))

        _, losses = train(config, data, steps, watch)
        loads = torch.stack(counts[1:]).view(steps, config.num_hidden_layers, -1).float()
        ratios = [
            round((part.mean(0).amax(-1) / part.mean(0).mean(-1)).max().item(), 4)
            for part in loads.split(MEAN_OF)
        ]
        found[name] = {"losses": losses, "busiest ÷ mean": ratios}
        print(name, *losses, "|", *ratios, flush=True)
    return found


def main() -> None:
    """Train, print and save."""
    kinds: dict[str, Any] = {"positions": positions, "heads": heads, "experts": experts}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--steps", type=int, default=400, help="[400] of each run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, held_out, files = corpus()
    found = kinds[options.kind](data, held_out, options.steps)
    record = {
        "device": "one CPU core",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": f"Python {platform.python_version()}'s modules, {files} files, as bytes",
        "steps": options.steps,
        "batch": [BATCH, LENGTH],
        "mean_of": MEAN_OF,
        "bin": BIN,
        options.kind: found,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
