"""Checkpoints: whole or not at all, every kind of damage named, older ones only when told."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_optim import AdamW, WarmupCosine
from tilewright_train import checkpoint
from tilewright_train.errors import InputError

FILES = [
    "config.json", "model.safetensors", "optimizer.safetensors", "random.safetensors",
    "tokenizer.json", "training.json",
]  # fmt: skip
SHAPE = preset(
    "nano", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=32,
)  # fmt: skip


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


def save(root: Path, step: int, trainee: dict[str, Any], keep: int = 3) -> Path:
    return checkpoint.save(
        root,
        step,
        **trainee,
        random_states=checkpoint.random_states(0, torch.device("cpu")),
        tokenizer="{}",
        facts={"seconds": 1.5},
        keep=keep,
    )


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
    facts, random = checkpoint.load(folder, **other)
    assert facts == {"seconds": 1.5}
    checkpoint.set_random_states(random, 0, torch.device("cpu"))
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


def test_older_ones_are_removed(tmp_path: Path) -> None:
    trainee = a_trainee(0)
    for step in range(1, 6):
        save(tmp_path, step, trainee, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000004", "step-000005"]


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
    assert checkpoint.find(three, from_older=False).step == 10
    save(three, 11, a_trainee(0))
    assert checkpoint.find(three, from_older=False).step == 11


def test_another_models_checkpoint_is_refused(three: Path) -> None:
    import dataclasses

    other = CausalLM(dataclasses.replace(SHAPE, intermediate_size=48))
    optimizer = AdamW(other.parameters())
    with pytest.raises(InputError, match="holds another model"):
        checkpoint.load(
            three / "step-000010",
            model=other,
            optimizer=optimizer,
            scheduler=WarmupCosine(optimizer, 2, 20),
        )
