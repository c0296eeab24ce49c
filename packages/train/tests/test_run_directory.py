"""A run's folder: a free name, and room for what is to come."""

import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tilewright_train.errors import InputError
from tilewright_train.run_directory import check_room, create
from tilewright_train.whole_files import write_whole


def test_new_runs_are_numbered(tmp_path: Path) -> None:
    names = [create(tmp_path, None, "my data é-nano").root.name for _ in range(2)]
    assert names == ["my-data--nano-001", "my-data--nano-002"]


def test_a_name_that_is_taken_is_an_error(tmp_path: Path) -> None:
    run = create(tmp_path, "mine", "x")
    assert create(tmp_path, "mine", "x") == run  # empty: nothing is lost
    run.metrics.touch()
    with pytest.raises(InputError, match=r"mine is not empty: give another --name, or .*--resume"):
        create(tmp_path, "mine", "x")


def test_what_a_run_was_killed_over_at_its_start_is_in_nobodys_way(tmp_path: Path) -> None:
    run = create(tmp_path, "mine", "x")
    run.facts.touch()
    (run.root / "config.toml.partial").touch()
    assert create(tmp_path, "mine", "x") == run
    run.config.touch()
    with pytest.raises(InputError, match="mine is not empty"):
        create(tmp_path, "mine", "x")


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    write_whole(file, "before")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "after")
    assert file.read_text() == "before"
    monkeypatch.undo()
    write_whole(file, "after")
    assert file.read_text() == "after"
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 20_000_000))
    check_room(tmp_path, 10_000_000)
    with pytest.raises(InputError, match="has 20 MB free and this run needs 21 MB"):
        check_room(tmp_path, 13_000_000)


def test_a_disk_without_a_free_block_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path} is full: give another --out")):
        check_room(tmp_path, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "/proc/nothing/can/be/made/here"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written \(.*\): give another --out"):
        check_room(tmp_path / place / "runs", 0)
