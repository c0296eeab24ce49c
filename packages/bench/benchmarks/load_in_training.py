"""How evenly the experts of one model are used as it trains, with three ways to balance them.

    python packages/bench/benchmarks/load_in_training.py --steps 300 --out FILE

A decoder of mixtures of experts reads bytes of Python's own library. All runs see the same batches
from the same weights: one leaves the router alone, one adds the load-balance loss, one moves the
bias of the choice against the load. What is saved are the loads of every layer, means of 10 steps,
and the losses.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright_kernels import (
    RMSNorm,
    Routing,
    balanced_bias,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    scaled_dot_product_attention,
)

MEAN_OF = 10
LR, WARMUP_STEPS = 1e-3, 30
LAYERS, HIDDEN, HEADS, EXPERTS, K, WIDTH = 4, 256, 4, 32, 4, 128
BATCH, LENGTH = 32, 256

LOSS_WEIGHT = 0.01
"""Switch's."""

BIAS_RATE = 1e-3
"""DeepSeek-V3's."""

Balance = str
BALANCES: tuple[Balance, ...] = ("nothing", "loss", "bias")


class Block(nn.Module):
    """Causal attention, then a mixture of experts.

    Attributes:
        bias: [EXPERTS], added to the scores for choosing only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = (nn.Linear(HIDDEN, n * HIDDEN, bias=False) for n in (3, 1))
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.w_down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.bias = nn.Buffer(torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """[BATCH, LENGTH, HIDDEN] to the same, the router's logits and its routing."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        logits = self.router(h).flatten(0, 1)
        routing = moe_route(logits, K, correction_bias=self.bias)
        return x + moe_mlp(h, self.w_gate_up, self.w_down, routing), logits, routing


class Model(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, bytes_: Tensor) -> tuple[Tensor, list[Tensor], list[Routing]]:
        """Mean loss of the batch, and what each block says of its router."""
        x, logits, routings = self.embedding(bytes_[:, :-1]), [], []
        for block in self.blocks:
            x, of_router, routing = block(x)
            logits.append(of_router)
            routings.append(routing)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), bytes_[:, 1:].flatten())
        return loss, logits, routings


def corpus() -> tuple[Tensor, int]:
    """The modules beside `os` as one run of bytes, and how many they are."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8), len(files)


def batches(data: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Gives one random batch after another, the same ones in every run."""
    generator, data = torch.Generator().manual_seed(1), data.to(device)

    def batch() -> Tensor:
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
        return data[(starts + torch.arange(LENGTH + 1)).to(device)].long()

    return batch


def train(
    balance: Balance, data: Tensor, steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Losses [steps] and loads [steps, LAYERS, EXPERTS], in assignments."""
    torch.manual_seed(0)
    model, next_batch = Model().to(device), batches(data, device)
    biases = [module.bias for module in model.modules() if isinstance(module, Block)]
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    losses, loads = [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, logits, routings = model(next_batch())
        total = loss
        if balance == "loss":
            counts = [routing.tokens_per_expert for routing in routings]
            balancing = load_balancing_loss(logits, K, tokens_per_expert=counts, layers="mean")
            total = loss + LOSS_WEIGHT * balancing
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if balance == "bias":
            for bias, routing in zip(biases, routings, strict=True):
                bias.copy_(balanced_bias(bias, routing.tokens_per_expert, BIAS_RATE))
        losses.append(loss.detach())
        loads.append(torch.stack([routing.tokens_per_expert for routing in routings]))
    return torch.stack(losses).cpu(), torch.stack(loads).cpu()


def main() -> None:
    """Train, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="[300] of each run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, files = corpus()
    runs = {}
    for balance in BALANCES:
        losses, loads = train(balance, data, options.steps, device)
        shares = torch.stack([part.double().mean(0) for part in loads.split(MEAN_OF)])
        shares = shares / (BATCH * LENGTH * K / EXPERTS)  # of the mean load
        runs[balance] = {
            "losses": [round(part.mean().item(), 4) for part in losses.split(MEAN_OF)],
            "largest": [round(s.amax(-1).mean().item(), 4) for s in shares],
            "last_loads": [[round(v, 4) for v in layer] for layer in shares[-1].tolist()],
        }
        last = runs[balance]
        print(f"{balance:8s} loss {last['losses'][-1]:.3f}  largest load {last['largest'][-1]:.2f}")
    record = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": f"Python {platform.python_version()}'s modules, {files} files, as bytes",
        "layers": LAYERS,
        "experts": EXPERTS,
        "k": K,
        "tokens_a_step": BATCH * LENGTH,
        "steps": options.steps,
        "mean_of": MEAN_OF,
        "runs": runs,
    }
    text = json.dumps(record)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
