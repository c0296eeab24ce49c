"""Checkpoints beside the training: who waits for what, and what a failure does."""

import threading
from pathlib import Path

import pytest

from tilewright_train import saver
from tilewright_train.saver import Saver
from tilewright_train.snapshot import Snapshot


def a_snapshot(step: int) -> Snapshot:
    from tilewright_model import preset

    return Snapshot(
        step=step, config=preset("nano"), weights={}, optimizer={}, optimizer_record={},
        scheduler={}, random={}, tokenizer="{}", chat_template=None, facts={},
    )  # fmt: skip


def a_saver(tmp_path: Path, said: list[str], *, background: bool = True, go_on: bool = False):
    return Saver(
        tmp_path,
        keep=1,
        keep_every=None,
        background=background,
        before=lambda: said.append("metrics"),
        after=lambda: said.append("there"),
        go_on=go_on,
        say=said.append,
    )


def test_it_writes_while_the_caller_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, written, said = threading.Event(), [], []

    def write(root: Path, snapshot: Snapshot, **_: object) -> None:
        assert may_write.wait(10)
        written.append(snapshot.step)

    monkeypatch.setattr(saver, "save", write)
    saves = a_saver(tmp_path, said)
    saves.start(a_snapshot(4))
    assert written == []
    may_write.set()
    saves.wait()
    assert written == [4]
    assert said == ["metrics", "there"]  # on the disk before the checkpoint
    saves.start(a_snapshot(8))
    saves.wait(last=True)
    assert written == [4, 8]


@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_raised_where_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(saver, "save", full)
    said: list[str] = []
    saves = a_saver(tmp_path, said, background=background)
    saves.on_failure = lambda: said.append("asked to stop")
    saves.start(a_snapshot(4))
    with pytest.raises(OSError, match="No space left"):
        saves.wait()
    saves.wait()  # said once
    assert said == ["metrics", "asked to stop"]
    going_on = a_saver(tmp_path, said, background=background, go_on=True)
    going_on.start(a_snapshot(4))
    going_on.wait()
    assert said[-1].startswith("not saved    step 4: x: no space left on device; training goes on")
    assert going_on.failed == 1
    going_on.start(a_snapshot(8))
    with pytest.raises(OSError, match="No space left"):
        going_on.wait(last=True)


def test_a_mistake_of_ours_is_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(saver, "save", wrong)
    saves = a_saver(tmp_path, [], go_on=True)
    saves.start(a_snapshot(4))
    with pytest.raises(RuntimeError, match="a mistake"):
        saves.wait()
