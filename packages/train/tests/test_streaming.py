"""Whole runs on files that are larger than the memory they may take."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tilewright_train.config import Objective

LIMIT = 12_000_000
"""Bytes beyond what the same commands take on a small file; each large one holds more."""

KINDS: tuple[tuple[Objective, str], ...] = (
    ("pretrain", ".parquet"),
    ("sft", ".jsonl.zst"),
    ("dpo", ".jsonl"),
)

RUNS = """
import ctypes, gc, io, json, resource, sys, threading
from pathlib import Path

from tilewright_train import bigram, record_files, record_groups, tokenizer
from tilewright_train.layers import parse
from tilewright_train.pretraining import run

# What is in memory at once depends on these alone.
tokenizer._BATCH = record_groups._CHARACTERS = record_files._ROW_BYTES = 1 << 16
bigram._TOGETHER = 1 << 14
threading.stack_size(1 << 18)  # not 8 MB, which count although they are not touched

folder, limit, kinds = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])

def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmData"].split()[0]) * 1024

def train(size, objective, ending):
    flags = "--threads 1 --device cpu --seq-len 48 --batch-size 4 --steps 2 --eval-tokens 200"
    if objective == "pretrain":
        flags += (" --vocab-size 600 --hidden-size 32 --num-hidden-layers 1 --intermediate-size 64"
                  " --num-attention-heads 2 --num-key-value-heads 1")
    places = {"data": f"{size}-{objective}{ending}", "out": "runs", "cache-dir": "cache"}
    for name, place in places.items():
        flags += f" --{name} {folder / place}"
    return run(parse(flags.split(), objective), io.StringIO())

for objective, ending in kinds:  # what is imported, compiled and allocated once
    train("small", objective, ending)
for objective, ending in kinds:
    # Everything that is mapped privately counts: allocations, threads, but not the mapped shards.
    resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + limit, resource.RLIM_INFINITY))
    made = train("large", objective, ending)
    print(json.loads((made / "run.json").read_text())["tokens"]["train_tokens"],
          (made / "summary.json").exists())
"""


def records(objective: Objective, size: int) -> Iterator[dict[str, Any]]:
    """Records whose texts have `size` characters in all, or a few more."""
    made = number = 0
    while made < size:
        text = f"the cat sat on a red mat {number} days ago and tomorrow. " * 80
        asked, chosen, rejected = (
            {"role": role, "content": content}
            for role, content in (("user", "say"), ("assistant", text), ("assistant", text[:-9]))
        )
        if objective == "pretrain":
            yield {"text": text}
        elif objective == "sft":
            yield {"messages": [asked, chosen]}
        else:
            yield {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]}
        made += len(text) * (2 if objective == "dpo" else 1)
        number += 1


def write(path: Path, objective: Objective, size: int) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        # One group of rows, which would not fit; pages, which have to, are small.
        table = pyarrow.Table.from_pylist(list(records(objective, size)))
        parquet.write_table(table, path, use_dictionary=False, write_batch_size=8)
        return
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records(objective, size))
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and RLIMIT_DATA")
def test_a_run_of_each_objective_on_more_than_fits_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    for objective, ending in KINDS:
        write(tmp_path / f"small-{objective}{ending}", objective, 300_000)
        write(tmp_path / f"large-{objective}{ending}", objective, LIMIT)
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # mimalloc reserves a gigabyte
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(tmp_path), str(LIMIT), json.dumps(KINDS)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    trained = [line.split() for line in done.stdout.splitlines()]
    assert [finished for _, finished in trained] == ["True"] * 3
    # What a number for each token would take.
    assert all(8 * int(tokens) > LIMIT for tokens, _ in trained)
