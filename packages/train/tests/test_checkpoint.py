"""Checkpoints: whole or not at all, every kind of damage named, older ones only when told."""

import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tilewright_model import CausalLM, preset
from tilewright_optim import AdamW, WarmupCosine
from tilewright_train import checkpoint, checkpoint_state, random_states
from tilewright_train.errors import InputError
from tilewright_train.snapshot import HostMemory, Snapshot, reserve, take

FILES = [
    "config.json", "model.safetensors", "optimizer.safetensors", "random.safetensors",
    "tokenizer.json", "training.json",
]  # fmt: skip
SHAPE = preset(
    "nano", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=32,
)  # fmt: skip

CPU = torch.device("cpu")


def a_trainee(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = CausalLM(SHAPE)
    optimizer = AdamW(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": WarmupCosine(optimizer, 2, 20),
    }


def train(trainee: dict[str, Any], seed: int) -> float:
    rows = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(seed))
    loss = trainee["model"](rows, labels=rows).loss
    loss.backward()
    trainee["optimizer"].step()
    trainee["scheduler"].step()
    trainee["optimizer"].zero_grad()
    return loss.item()


def a_snapshot(step: int, trainee: dict[str, Any], memory: HostMemory | None = None) -> Snapshot:
    return take(
        step,
        **trainee,
        random_states=random_states.random_states(0, CPU),
        tokenizer="{}",
        facts={"seconds": 1.5, "processes": 1},
        memory=memory,
    )


def save(root: Path, step: int, trainee: dict[str, Any], keep: int = 3) -> Path:
    checkpoint_state.save(root, a_snapshot(step, trainee), keep=keep)
    return root / f"step-{step:06d}"


@pytest.fixture
def three(tmp_path: Path) -> Path:
    trainee = a_trainee(0)
    for step in (8, 9, 10):
        train(trainee, step)
        save(tmp_path, step, trainee)
    return tmp_path


def test_what_is_loaded_goes_on_bit_for_bit(tmp_path: Path) -> None:
    trainee = a_trainee(0)
    for seed in range(3):
        train(trainee, seed)
    folder = save(tmp_path, 3, trainee)
    state = torch.get_rng_state()
    expected = [train(trainee, seed) for seed in range(3, 6)]

    other = a_trainee(1)
    facts, random = checkpoint_state.load(folder, **other)
    assert facts == {"seconds": 1.5, "processes": 1}
    random_states.set_random_states(random, 0, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert [train(other, seed) for seed in range(3, 6)] == expected
    rates = [t["optimizer"].param_groups[0]["lr"] for t in (trainee, other)]
    assert rates[0] == rates[1]


def test_it_holds_a_model_that_loads_by_itself_and_lists_its_files(three: Path) -> None:
    folder = three / "step-000010"
    assert sorted(f.name for f in folder.iterdir()) == ["MANIFEST.json", *FILES]
    assert sorted(json.loads((folder / "MANIFEST.json").read_text())["files"]) == FILES
    assert CausalLM.from_pretrained(folder).config == SHAPE


def test_the_newest_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path / "no", from_older=False) == checkpoint.Found(None)
    trainee = a_trainee(0)
    for step in (999_999, 1_000_000):
        save(tmp_path, step, trainee)
    found = checkpoint.find(tmp_path, from_older=False)
    assert (found.step, found.damaged) == (1_000_000, ())


@pytest.mark.parametrize(("keep_every", "left"), [(None, [6, 7]), (3, [3, 6, 7]), (7, [6, 7])])
def test_older_ones_are_removed(tmp_path: Path, keep_every: int | None, left: list[int]) -> None:
    trainee = a_trainee(0)
    for step in range(1, 8):
        checkpoint_state.save(tmp_path, a_snapshot(step, trainee), keep=2, keep_every=keep_every)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"step-{step:06d}" for step in left]


def test_large_tensors_are_spread_over_files_and_every_one_is_needed(tmp_path: Path) -> None:
    trainee = a_trainee(0)
    train(trainee, 0)
    checkpoint_state.save(tmp_path, a_snapshot(1, trainee), keep=1, max_shard_bytes=4000)
    folder = tmp_path / "step-000001"
    parts = sorted(folder.glob("optimizer-*.safetensors"))
    assert len(parts) > 2
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    other = a_trainee(1)
    checkpoint_state.load(folder, **other)
    assert train(other, 5) == train(trainee, 5)
    # A manifest that does not list a part would hide that it is gone.
    manifest = folder / "MANIFEST.json"
    listed = json.loads(manifest.read_text())["files"]
    del listed[parts[1].name]
    manifest.write_text(json.dumps({"files": listed}))
    with pytest.raises(InputError, match="does not list a checkpoint's files"):
        checkpoint.find(tmp_path, from_older=False)


def test_a_snapshot_holds_still_while_the_training_goes_on(tmp_path: Path) -> None:
    trainee, memory = a_trainee(0), HostMemory(CPU)
    train(trainee, 0)
    expected = save(tmp_path / "at once", 1, trainee)
    snapshot = a_snapshot(1, trainee, memory)
    for seed in range(1, 4):
        train(trainee, seed)
    checkpoint_state.save(tmp_path / "later", snapshot, keep=1)
    for file in expected.iterdir():
        other = tmp_path / "later" / expected.name / file.name
        assert other.read_bytes() == file.read_bytes(), file.name
    first = snapshot.weights["embed_tokens.weight"].data_ptr()
    again = a_snapshot(4, trainee, memory)
    assert again.weights["embed_tokens.weight"].data_ptr() == first


def test_without_page_locked_memory_copies_go_to_plain_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocate, asked = torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return allocate(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    memory = HostMemory(torch.device("cuda"))
    first, second = torch.arange(3), torch.arange(4)
    assert torch.equal(memory.copy("first", first), first)
    assert torch.equal(memory.copy("second", second), second)
    assert asked == [True, False, False]


def test_memory_is_ready_before_the_first_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, threads = torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            threads.append(threading.current_thread())
        return allocate(*shape, **options)

    trainee = a_trainee(0)
    train(trainee, 3)
    memory = HostMemory(torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", empty)
    model, optimizer = trainee["model"], trainee["optimizer"]
    reserve(memory, model=model, optimizer=optimizer, reference={"one": torch.ones(2)})
    a_snapshot(3, trainee, memory)
    assert threading.main_thread() not in threads
    assert len(threads) == 4 * len(model.state_dict()) + 1  # weights, two moments, steps
    held = {t.data_ptr() for t in memory._held.values()}
    again = a_snapshot(3, trainee, memory)
    assert {t.data_ptr() for t in (*again.weights.values(), *again.optimizer.values())} <= held


def test_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        legacy = float(np.random.rand())  # noqa: NPY002
        return [random.random(), legacy, float(torch.rand(()))]

    states = random_states.random_states(3, CPU)
    first = draw()
    random_states.set_random_states(states, 2, CPU)  # of another rank: left alone
    assert draw() != first
    random_states.set_random_states(states, 3, CPU)
    assert draw() == first


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_every_damage_is_named(three: Path, name: str, how: str) -> None:
    file = three / "step-000010" / name
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    remedy = "step-000009, the newest whole checkpoint, add --resume-from-older"
    with pytest.raises(InputError, match=remedy) as caught:
        checkpoint.find(three, from_older=False)
    assert str(caught.value).startswith(str(file))
    found = checkpoint.find(three, from_older=True)
    assert (found.folder, found.damaged) == (three / "step-000009", (three / "step-000010",))


def test_a_byte_that_flipped_anywhere_is_named_with_its_file(three: Path) -> None:
    """In every file: its first bytes, the end of a header, the middle, the last ones."""
    folder = three / "step-000010"
    for name in [*FILES, "MANIFEST.json"]:
        file = folder / name
        data = file.read_bytes()
        size = len(data)
        # Of safetensors 8 bytes are the header's length, and so many follow.
        header = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else 8
        places = {0, 1, 7, 8, header - 1, header, size // 4, size // 2, size - 2, size - 1}
        if name == "MANIFEST.json":
            places = set(range(size))  # names, sizes, checksums of files, its own, what is between
        for place in sorted(p for p in places if p < size):
            for bit in (0, 5, 7):
                flipped = bytes([data[place] ^ 1 << bit])
                file.write_bytes(data[:place] + flipped + data[place + 1 :])
                found = checkpoint.damage(folder)
                assert found is not None, (name, place, bit)
                assert found.startswith(f"{file} "), (found, place, bit)
        file.write_bytes(data)
    assert checkpoint.damage(folder) is None


def test_a_manifest_from_before_it_held_its_own_checksum_is_read(three: Path) -> None:
    folder = three / "step-000010"
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}, indent=1))
    assert checkpoint.find(three, from_older=False).folder == folder
    file = folder / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert (checkpoint.damage(folder) or "").startswith(f"{file} ")


def test_a_manifest_that_is_json_but_no_manifest_is_named(three: Path) -> None:
    folder = three / "step-000010"
    manifest = folder / "MANIFEST.json"
    listed = json.loads(manifest.read_text())["files"]
    (folder / "optimizer.safetensors").unlink()  # what a manifest that lists nothing would hide
    wrong: list[Any] = [
        [], {"files": []}, {"files": {}}, {"files": None}, {"files": {"config.json": {}}},
        {"files": listed | {"config.json": None}},
        {"files": {name: facts for name, facts in listed.items() if name[:3] != "opt"}},
        {"files": listed | {"config.json": listed["config.json"] | {"size": "12"}}},
        {"files": listed | {"config.json": listed["config.json"] | {"sha256": 0}}},
    ]  # fmt: skip
    for content in wrong:
        manifest.write_text(json.dumps(content))
        with pytest.raises(InputError, match="step-000009, the newest whole") as caught:
            checkpoint.find(three, from_older=False)
        assert str(caught.value).startswith(f"{manifest} "), content
        assert checkpoint.find(three, from_older=True).step == 9


def test_without_a_whole_one_there_is_nothing_to_fall_back_to(three: Path) -> None:
    for folder in checkpoint.all_checkpoints(three):
        (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no other checkpoint .* is whole: start a new run"):
        checkpoint.find(three, from_older=True)


def test_a_damaged_one_that_is_set_aside_does_not_count(three: Path) -> None:
    aside = checkpoint.set_aside(three / "step-000010")
    assert aside.name == "step-000010.damaged"
    assert (aside / "model.safetensors").exists()
    assert checkpoint.find(three, from_older=False).step == 9


def test_a_failed_save_leaves_the_others_and_no_rest(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "training.json")

    monkeypatch.setattr(Path, "write_text", full)
    remedy = (
        rf"{three} cannot be written \(.*no space left.*\): make room, .* --resume {three.parent}"
    )
    with pytest.raises(OSError, match=remedy):
        save(three, 11, a_trainee(0), keep=1)
    monkeypatch.undo()
    assert [checkpoint.step_of(f) for f in checkpoint.all_checkpoints(three)] == [8, 9, 10]
    assert not list(three.glob(".*"))
    assert checkpoint.find(three, from_older=False).step == 10


@pytest.mark.parametrize("limit", [100, 4000])
def test_a_disk_that_is_full_for_tensors_is_named_with_a_remedy(three: Path, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainee = a_trainee(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written \(.*ile too large.*\): make room"):
            save(three, 11, trainee, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(three.glob(".*"))
    assert checkpoint.find(three, from_older=False).step == 10


def test_the_rest_of_a_killed_save_is_no_checkpoint(three: Path) -> None:
    (three / ".step-000011.partial").mkdir()
    (three / ".step-000011.partial" / "config.json").touch()
    (three / ".step-000007.partial").mkdir()
    assert checkpoint.find(three, from_older=False).step == 10
    save(three, 11, a_trainee(0))
    assert checkpoint.find(three, from_older=False).step == 11
    assert not list(three.glob(".*"))


def test_another_optimizers_checkpoint_is_refused(three: Path) -> None:
    trainee = a_trainee(0)
    optimizer = torch.optim.SGD(trainee["model"].parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"step-000010: .* is AdamW and this run's is SGD: give"):
        checkpoint_state.load(three / "step-000010", **trainee | {"optimizer": optimizer})
    norms = [p for p in trainee["model"].parameters() if p.ndim < 2]
    some = AdamW([{"params": norms}], lr=0.1)
    with pytest.raises(InputError, match=r"step-000010: .* other parameters or groups than"):
        checkpoint_state.load(three / "step-000010", **trainee | {"optimizer": some})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, r"training.json has no 'facts': another version of tilewright-train wrote it; go on"),
        ({"facts": {"seconds": 1.0}}, r"training.json has no 'facts.processes': .* --init .*10$"),
        ({"optimizer": {"groups": []}}, r"training.json has no 'optimizer.plain'"),
        ({"scheduler": None, "facts": 3}, r"training.json has no 'facts.seconds'"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(
    three: Path, training: dict[str, Any], message: str
) -> None:
    file = three / "step-000010" / "training.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | training if training else {}))
    with pytest.raises(InputError, match=message):
        checkpoint_state.load(file.parent, **a_trainee(0))


def test_an_optimizers_state_of_an_unknown_parameter_is_refused(three: Path) -> None:
    file = three / "step-000010" / "optimizer.safetensors"
    save_file({"elsewhere.weight.exp_avg": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"10: .* state 'elsewhere.weight.exp_avg', and no param"):
        checkpoint_state.load(file.parent, **a_trainee(0))


def test_without_a_ranks_random_states_nothing_goes_on_with_other_ones(three: Path) -> None:
    file = three / "step-000010" / "random.safetensors"
    save_file({"rank1.cpu": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"random.safetensors has no state rank0.cpu, and 1 proc"):
        checkpoint_state.load(file.parent, **a_trainee(0))


def test_another_models_checkpoint_is_refused(three: Path) -> None:
    import dataclasses

    other = CausalLM(dataclasses.replace(SHAPE, intermediate_size=48))
    optimizer = AdamW(other.parameters())
    with pytest.raises(InputError, match=r"another model than .*: intermediate_size 32, not 48;"):
        checkpoint_state.load(
            three / "step-000010",
            model=other,
            optimizer=optimizer,
            scheduler=WarmupCosine(optimizer, 2, 20),
        )
