"""Losses of one model trained with AdamW's averages in float32, bfloat16 and 8 bits.

    python packages/bench/benchmarks/averages_in_training.py --steps 500 --out FILE

The model has 85 M parameters and reads bytes; the corpus is Python's own library. All runs see the
same batches from the same weights, which are bfloat16 with exact masters. What is saved are means
of 50 steps, by the storage of the averages.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from tilewright_model import CausalLM, ModelConfig
from tilewright_optim import AdamW

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

STORAGES = {"float32": None, "int8": "int8", "bfloat16": torch.bfloat16}


def corpus() -> tuple[Tensor, int]:
    """The modules beside `os` as one run of bytes, and how many they are."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8), len(files)


def train(state_dtype, data: Tensor, steps: int, device: torch.device) -> Tensor:
    """Losses of all steps."""
    torch.manual_seed(0)
    model = CausalLM(CONFIG).to(device, torch.bfloat16)
    lr = torch.tensor(0.0, device=device)
    optimizer = AdamW(
        model.parameters(),
        lr,
        weight_decay=0.1,
        max_grad_norm=1.0,
        master="exact",
        state_dtype=state_dtype,
    )
    generator = torch.Generator().manual_seed(1)
    length = CONFIG.max_position_embeddings
    losses = []
    for step in range(steps):
        lr.fill_(LR * min(1.0, (step + 1) / WARMUP_STEPS))
        starts = torch.randint(len(data) - length - 1, (BATCH,), generator=generator)
        batch = torch.stack([data[i : i + length] for i in starts]).long().to(device)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="[500] of each run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, files = corpus()
    means = {}
    for name, state_dtype in STORAGES.items():
        losses = train(state_dtype, data, options.steps, device)
        means[name] = [round(part.mean().item(), 4) for part in losses.split(MEAN_OF)]
        print(f"{name:9s}", *(f"{mean:.3f}" for mean in means[name]), flush=True)
    record = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": f"Python {platform.python_version()}'s modules, {files} files, as bytes",
        "steps": options.steps,
        "mean_of": MEAN_OF,
        "losses": means,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
