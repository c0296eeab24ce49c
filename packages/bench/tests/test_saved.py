import json
import os

import pytest

from tilewright_bench.saved import (
    SavedRunError,
    baselines_of,
    find,
    load,
    newest,
    runs,
    save_baseline,
)

NAME = "0007_0123456789abcdef_20270101_000000.json"


@pytest.fixture
def storage(tmp_path, write_run):
    """Runs 3 and 7 of one platform, saved in that order."""
    folder = tmp_path / "storage"
    for second, name in enumerate(("0003_fedcba_20260101_000000.json", NAME)):
        path = write_run(folder / "Linux-CPython-3.12-64bit" / name, {"bench_op[a]": 1e-3})
        os.utime(path, (second, second))
    return folder


@pytest.fixture
def baselines(tmp_path, write_run):
    folder = tmp_path / "baselines"
    write_run(folder / "h200-norms.json", {"bench_op[a]": 2e-3})
    return folder


def test_the_newest_run_is_the_one_saved_last(storage):
    assert [path.name[:4] for path in runs(storage)] == ["0003", "0007"]
    assert newest(storage).path.name == NAME


def test_no_run_yet(tmp_path):
    with pytest.raises(SavedRunError, match=r"no saved run in .*; make one with: nox -s bench"):
        newest(tmp_path)


def test_a_run_is_found_by_name_path_and_number(storage, baselines):
    assert find("h200-norms", storage, baselines).path == baselines / "h200-norms.json"
    assert find(str(storage / "Linux-CPython-3.12-64bit" / NAME)).path.name == NAME
    assert find("7", storage, baselines).path.name == NAME
    assert find("0003", storage, baselines).path.name.startswith("0003_")


def test_an_unknown_baseline_lists_those_there(storage, baselines):
    with pytest.raises(SavedRunError) as error:
        find("h200-norm", storage, baselines)
    message = str(error.value)
    assert "'h200-norm' is no baseline" in message
    assert "did you mean 'h200-norms'?" in message
    assert "\n" not in message
    with pytest.raises(SavedRunError, match="none yet, make one with: nox -s bench -- save NAME"):
        find("8", storage, storage)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "is not a file that pytest-benchmark saved")],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(SavedRunError, match=message):
        load(path)


def test_the_baselines_of_a_device_begin_with_its_name(baselines, write_run):
    for name in ("h200", "h2000", "h200x4-norms", "a100-norms", "h200-losses"):
        write_run(baselines / f"{name}.json", {"bench_op[a]": 1.0})
    found = [run.path.stem for run in baselines_of("h200", baselines)]
    assert found == ["h200-losses", "h200-norms", "h200"]


def test_a_baseline_is_a_run_without_what_identifies_its_host(storage, baselines):
    run = newest(storage)
    target = save_baseline("h200-all.v2", run, baselines)
    assert target == baselines / "h200-all.v2.json"
    kept, original = json.loads(target.read_text()), newest(storage).content
    assert run.content == original, "the run itself is left as it was"
    assert original["machine_info"].pop("node") == "host-17"
    assert original["machine_info"]["cpu"].pop("flags")
    assert kept == original


def test_a_baseline_of_some_operators(tmp_path, write_run, info):
    infos = {name: info(operator=name) for name in ("a", "b")}
    run = load(write_run(tmp_path / "run.json", {"a": 1.0, "b": 2.0, "c": 3.0}, infos=infos))
    target = save_baseline("h200-b", run, tmp_path, operators=["b"])
    assert [b["name"] for b in load(target).content["benchmarks"]] == ["b"]
    with pytest.raises(SavedRunError, match="measured no d, but a, b"):
        save_baseline("h200-d", run, tmp_path, operators=["b", "d"])
    assert not (tmp_path / "h200-d.json").exists()


@pytest.mark.parametrize("name", ["", "7", "a/b", "../up", ".hidden", "with space"])
def test_names_that_a_file_or_a_number_could_be_taken_for(storage, baselines, name):
    with pytest.raises(SavedRunError, match="cannot name a baseline"):
        save_baseline(name, newest(storage), baselines)
    assert [path.name for path in baselines.iterdir()] == ["h200-norms.json"]


@pytest.mark.parametrize(
    ("machine", "commit", "message"),
    [
        ({"gpu": None}, {}, r"does not say its gpu; a baseline is a run on a GPU"),
        ({"driver": None, "triton": None}, {}, "does not say its driver, triton"),
        ({}, {"id": "unversioned"}, "does not name its commit; add --commit COMMIT"),
        ({}, {"id": "0123456789abcdef", "dirty": True}, "uncommitted changes on 0123456789ab;"),
    ],
)
def test_a_run_that_hides_where_it_was_made_is_no_baseline(
    tmp_path, write_run, machine, commit, message
):
    path = write_run(tmp_path / "platform" / NAME, {"bench_op[a]": 1.0})
    content = json.loads(path.read_text())
    content["machine_info"] |= machine
    content["commit_info"] |= commit
    path.write_text(json.dumps(content))
    with pytest.raises(SavedRunError, match=message):
        save_baseline("name", load(path), tmp_path)
    assert not (tmp_path / "name.json").exists()


def test_what_git_did_not_say_can_be_given(tmp_path, write_run):
    dirty = {"id": "unversioned", "dirty": True}
    run = load(write_run(tmp_path / "platform" / NAME, {"bench_op[a]": 1.0}, commit=dirty))
    with pytest.raises(SavedRunError, match="'HEAD' is not a commit"):
        save_baseline("name", run, tmp_path, commit="HEAD", allow_dirty=True)
    target = save_baseline("name", run, tmp_path, commit="abcdef0", allow_dirty=True)
    assert load(target).content["commit_info"] == {"id": "abcdef0", "dirty": True}
