"""What a training step waits for data, by workers and pinning: `python data_loading.py OUT.json`.

The 0.5 B preset, 8 rows of 2048 tokens a step, forward, backward and SGD in bf16 on one GPU. Tokens
are random, in documents of e^(6 ± 1) tokens. Three steps are thrown away and ten are timed.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tilewright_model import CausalLM, preset
from tilewright_train.batches import BatchSampler
from tilewright_train.data import Packing, RowOptions, training_rows
from tilewright_train.loading import BatchLoader, LoadingOptions
from tilewright_train.samples import Encoded, Samples, open_samples, write_samples

ROWS, SEQ_LEN, UNTIMED, TIMED = 8, 2048, 3, 10
VARIANTS: list[tuple[Packing, int, bool]] = [
    ("concat", 0, False), ("concat", 0, True), ("concat", 1, True), ("concat", 2, False),
    ("concat", 2, True), ("concat", 4, True), ("best_fit", 0, True), ("best_fit", 2, True),
]  # fmt: skip


def documents(folder: Path, count: int = 40_000) -> Samples:
    """Random documents on the disk."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) + 6).exp().clamp(10, 20_000).long()
    pool = torch.randint(1, 32768, (20_000,), generator=generator).tolist()
    write_samples((Encoded(False, [*pool[: n - 1], 0]) for n in lengths.tolist()), folder)
    return open_samples(folder, "train")


def measure(model: CausalLM, sampler: BatchSampler, options: LoadingOptions) -> dict[str, float]:
    """Seconds of a step, and of waiting in it."""
    device = model.embed_tokens.weight.device
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loader = BatchLoader(sampler, range(UNTIMED + TIMED), device, options)
    begin = 0.0
    for step, batch in enumerate(loader):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch.inputs, num_items=batch.targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == UNTIMED - 1:
            torch.cuda.synchronize()
            loader.take_waited()
            begin = time.perf_counter()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / TIMED
    waited = loader.take_waited() / TIMED
    loader.close()
    return {"step_seconds": seconds, "data_seconds": waited, "data_share": waited / seconds}


def main(out: Path) -> None:
    """Measure all variants and write them to `out`."""
    torch.manual_seed(0)
    model = CausalLM(preset("0.5b")).cuda()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        samples = documents(Path(folder))
        for packing, workers, pin_memory in VARIANTS:
            options = RowOptions(packing=packing, document_mask=True, seq_len=SEQ_LEN, padding=0)
            rows = training_rows([samples], (), options, seed=0)
            sampler = BatchSampler(rows.rows, batch_size=ROWS)
            how = {"workers": workers, "pin_memory": pin_memory}
            figures = measure(model, sampler, LoadingOptions(**how))
            runs.append({"packing": packing, **how, **figures})
            print(runs[-1], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit.stdout.strip(),
        "command": "python packages/train/benchmarks/data_loading.py OUT.json",
        "runs": runs,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
