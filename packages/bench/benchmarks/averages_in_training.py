"""Losses of one model trained with AdamW's averages in float32 and in 8 bits, several times each.

    python packages/bench/benchmarks/averages_in_training.py --out FILE

The model has 85 M parameters and reads bytes; the corpus is Python's own library, of whose end a
twentieth is held out. All runs see the same batches; weights are bfloat16 with exact masters. Two
runs of one storage differ in the last bit of one weight in 4096 at the beginning: how far apart
they end is what a difference between storages has to be measured by. What is saved of a run are
means of 50 steps and the loss on what was held out.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW
from tilewright_optim._states import StateDtype

MEAN_OF = 50
LR = 6e-4
WARMUP_STEPS = 50

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    intermediate_size=2048,
    max_position_embeddings=512,
)
BATCH = 8
HELD_OUT_BATCHES = 20
PERTURBED = 4096

STORAGES: dict[str, StateDtype] = {"float32": None, "int8": "int8"}


def corpus() -> tuple[Tensor, Tensor]:
    """The modules beside `os` as one run of bytes: to train on, and held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    end = len(data) * 19 // 20
    return data[:end], data[end:]


def model_of(beginning: int, device: torch.device) -> CausalLM:
    """The same weights, but for the last bits of a few from beginning 1 on."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG).to(device, torch.bfloat16)
    if beginning:
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[beginning::PERTURBED].mul_(1 + 2**-7)
    return model


def batches(data: Tensor, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Token ids [BATCH, T], without end."""
    generator = torch.Generator().manual_seed(seed)
    length = CONFIG.max_position_embeddings
    while True:
        starts = torch.randint(len(data) - length - 1, (BATCH,), generator=generator)
        yield torch.stack([data[i : i + length] for i in starts]).long().to(device)


def train(state_dtype: StateDtype, model: CausalLM, data: Tensor, steps: int) -> Tensor:
    """Losses of all steps."""
    device = next(model.parameters()).device
    lr = torch.tensor(0.0, device=device)
    optimizer = AdamW(
        model.parameters(),
        lr,
        weight_decay=0.1,
        max_grad_norm=1.0,
        master="exact",
        state_dtype=state_dtype,
    )
    losses = []
    for step, batch in enumerate(islice(batches(data, 1, device), steps)):
        lr.fill_(LR * min(1.0, (step + 1) / WARMUP_STEPS))
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@torch.no_grad()
def held_out_loss(model: CausalLM, data: Tensor) -> float:
    """Mean over the same batches for every run."""
    device = next(model.parameters()).device
    some = islice(batches(data, 2, device), HELD_OUT_BATCHES)
    return statistics.mean(model(batch, labels=batch).loss.item() for batch in some)


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="[500] of each run")
    parser.add_argument("--beginnings", type=int, default=3, help="[3] runs of each storage")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, held_out = corpus()
    runs = []
    for beginning in range(options.beginnings):
        for name, state_dtype in STORAGES.items():
            model = model_of(beginning, device)
            losses = train(state_dtype, model, data, options.steps).float()
            means = [round(part.mean().item(), 4) for part in losses.split(MEAN_OF)]
            loss = round(held_out_loss(model, held_out), 4)
            print(f"{name:8s} {beginning}", *(f"{m:.3f}" for m in means), f"held out {loss:.4f}")
            runs.append(
                {"averages": name, "beginning": beginning, "losses": means, "held_out": loss}
            )
    record = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": f"Python {platform.python_version()}'s modules, as bytes",
        "steps": options.steps,
        "mean_of": MEAN_OF,
        "runs": runs,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
