"""metrics.jsonl: whole lines, no step twice, a fair figure for the throughput."""

import json
import resource
from pathlib import Path

import pytest

from tilewright_train.errors import InputError
from tilewright_train.metrics import (
    MetricsFile,
    Record,
    data_share,
    read_metrics,
    steady_tokens_per_second,
    truncate_metrics,
)

KEYS = [
    "step", "loss", "val_loss", "lr", "grad_norm", "skipped_steps", "loss_scale",
    "tokens", "tokens_per_second", "data_seconds", "mfu", "peak_memory_bytes", "time",
]  # fmt: skip


def write(path: Path, steps: range) -> list[Record]:
    records = [Record(step=step, loss=1 / (step + 3)) for step in steps]
    file = MetricsFile(path)
    for record in records:
        file.write(record)
        assert json.loads(path.read_text().splitlines()[-1])["step"] == record.step
    file.close()
    return records


def test_numbers_come_back_bit_for_bit_under_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = write(path, range(5))
    assert read_metrics(path) == records
    assert list(json.loads(path.read_text().splitlines()[0])) == KEYS


def test_metrics_of_an_objective_stand_beside_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(step=1, loss=0.5, metrics={"rewards/chosen": 1 / 3, "val_logps/chosen": -2.0})
    file = MetricsFile(path)
    file.write(record)
    file.close()
    assert json.loads(path.read_text())["rewards/chosen"] == 1 / 3
    assert read_metrics(path) == [record]
    truncate_metrics(path, 1)
    assert read_metrics(path) == [record]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = write(path, range(5))
    path.write_text(path.read_text()[:-20])
    assert read_metrics(path) == records[:4]
    assert read_metrics(tmp_path / "no") == []


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"step": 2, "los": 1}', b"{}", b'{"step": "2"}', b"\xff\x00"]
)
def test_a_damaged_line_is_named_and_nothing_is_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics\.jsonl:3 is not a record of a step: mend"):
        truncate_metrics(path, 1)
    assert path.read_bytes() == before


def test_a_full_disk_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = write(path, range(5))
    file = MetricsFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    full = rf"{tmp_path} cannot be written \(file too large\): make room, .* --resume {tmp_path}"
    try:
        with pytest.raises(OSError, match=full):
            file.write(Record(step=5))
        with pytest.raises(OSError, match=full):
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(path) == records


def test_truncation_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = write(path, range(8))
    path.write_text(path.read_text() + '{"step": 8, "lo')
    truncate_metrics(path, 5)
    assert read_metrics(path) == records[:6]
    write(path, range(6, 8))
    assert [record.step for record in read_metrics(path)] == list(range(8))
    truncate_metrics(path, 0)  # no checkpoint: the run measures step 0 again
    assert read_metrics(path) == []


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        file.write(Record(step=1, loss=float("nan")))
    file.close()


def test_throughput_leaves_out_the_first_steps() -> None:
    rates = [1.0] * 10 + [5.0, 7.0, 100.0] * 5
    records = [Record(step=0), *(Record(step=i, tokens_per_second=r) for i, r in enumerate(rates))]
    assert steady_tokens_per_second(records) == 7.0
    assert steady_tokens_per_second(records[:5]) == 1.0
    assert steady_tokens_per_second(records[:1]) is None


def test_the_share_of_waiting_is_that_of_later_steps() -> None:
    # Steps of 100 tokens take 0.5 s, of which 0.05 s is waiting; the first ten are slower.
    slow = [Record(step=n, tokens=100 * n, tokens_per_second=10.0, data_seconds=9.0)
            for n in range(1, 11)]  # fmt: skip
    quick = [Record(step=n, tokens=100 * n, tokens_per_second=200.0, data_seconds=0.05)
             for n in range(11, 31)]  # fmt: skip
    assert data_share([Record(step=0), *slow, *quick]) == pytest.approx(0.1)
    assert data_share([Record(step=0)]) is None
