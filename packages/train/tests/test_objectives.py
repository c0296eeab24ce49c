"""SFT's loss against its formula, and SFT and DPO in two processes and in parts of one row against
one process at once; DPO's formulas are in test_dpo.py.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_train.batches import BatchSampler
from tilewright_train.config import Objective
from tilewright_train.data import Packing, RowOptions, training_rows
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.objectives import NextToken
from tilewright_train.pretraining import run
from tilewright_train.samples import Samples


@pytest.fixture
def data(tmp_path: Path) -> dict[Objective, Path]:
    """Answers of unequal lengths, and pairs of them: rows differ in what they have to predict."""
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "today"]
    files: dict[Objective, Path] = {"sft": tmp_path / "sft.jsonl", "dpo": tmp_path / "dpo.jsonl"}
    talks, pairs = [], []
    for n in range(300):
        answers = (" ".join(words[: 1 + n % 7]), " ".join(words[n % 3 :]))
        turns = [[{"role": "assistant", "content": answer}] for answer in answers]
        prompt = [{"role": "user", "content": f"say {n}"}]
        talks.append(json.dumps({"messages": prompt + turns[0]}))
        pairs.append(json.dumps({"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}))
    files["sft"].write_text("\n".join(talks))
    files["dpo"].write_text("\n".join(pairs))
    return files


def numbers(folder: Path) -> list[float]:
    """Losses, norms and metrics, but for accuracies: a margin of zero is above it by rounding."""
    made: list[float] = []
    for r in read_metrics(folder / "metrics.jsonl"):
        made += [r.loss or 0.0, r.val_loss or 0.0, r.grad_norm or 0.0]
        made += [value for name, value in r.metrics.items() if "accurac" not in name]
    return made


@pytest.mark.parametrize(
    ("packing", "rows", "splits"),  # (processes, parts of each)
    [
        ("none", 16, [(1, 1), (1, 4), (1, 16), (2, 2), (4, 1)]),
        ("best_fit", 10, [(1, 1), (1, 5), (1, 10), (2, 1), (5, 2)]),
    ],
)
def test_sft_is_the_mean_over_the_answers_tokens_at_any_split(
    packing: Packing, rows: int, splits: list[tuple[int, int]]
) -> None:
    """Σ -log p(token | conversation so far) / number of such tokens, one conversation at a time in
    float64; a row with many targets counts for more than one with few.
    """
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 16, (16,), generator=draw)
    tokens = torch.randint(1, 50, (int(lengths.sum()),), generator=draw).int()
    targets = (torch.rand(tokens.numel(), generator=draw) < 0.4).byte()
    targets[lengths.cumsum(0) - 1] = 1  # each conversation has one at least
    samples = Samples(tokens, lengths.cumsum(0), targets)
    options = RowOptions(packing=packing, document_mask=True, seq_len=16, padding=0)
    made = training_rows([samples], (), options, 0)
    torch.manual_seed(0)
    shape = preset(
        "nano", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model = CausalLM(shape).double()
    total, count = 0.0, 0
    for ids, wanted in zip(
        tokens.split(lengths.tolist()), targets.split(lengths.tolist()), strict=True
    ):
        log_p = model(ids[None].long()).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if wanted[place]:
                total -= float(log_p[place - 1, ids[place]].detach())
                count += 1
    assert made.rows.count == rows
    objective = NextToken()
    for world_size, parts in splits:
        loss = 0.0
        for rank in range(world_size):
            sampler = BatchSampler(made.rows, batch_size=rows, rank=rank, world_size=world_size)
            items = sampler.targets(0)
            assert items == count
            for part in range(parts):
                of_part, sums = objective.loss(model, sampler.batch(0, part, parts), items)
                assert sums.numel() == 0
                loss += float(of_part.detach())
        assert loss == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("sft", ["--packing", "best_fit", "--parallel", "ddp"]),
        # The moving reference reads weights that travel between the processes.
        ("dpo", ["--packing", "best_fit", "--parallel", "zero1", "--reference", "ema"]),
    ],
)
def test_two_processes_in_parts_are_one_process_at_once(
    objective: Objective,
    more: list[str],
    data: dict[Objective, Path],
    tiny_flags: list[str],
    tmp_path: Path,
) -> None:
    run(parse(tiny_flags), io.StringIO())
    flags = [
        *("--data", str(data[objective]), "--seq-len", "64", "--batch-size", "8", "--steps", "4"),
        *("--lr", "0.01", "--eval-every", "2", "--eval-tokens", "500", "--max-grad-norm", "0.05"),
        *("--threads", "1", "--device", "cpu"),
        *("--out", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"), *more),
    ]
    alone = run(
        parse([*flags, "--name", "alone", "--micro-batch-size", "8"], objective), io.StringIO()
    )
    two = ["--objective", objective, "--name", "two", "--micro-batch-size", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tilewright_train", *flags, *two),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "processes    2" in done.stdout
    expected = numbers(alone)
    assert len(expected) >= 15
    assert numbers(tmp_path / "runs" / "two") == pytest.approx(expected, rel=1e-4, abs=1e-5)
