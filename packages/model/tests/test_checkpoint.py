import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tilewright_model import CausalLM, ModelConfig
from tilewright_model.checkpoint import MAX_SHARD_BYTES, _shards

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=28,
    max_position_embeddings=16,
)


def build(config: ModelConfig = CONFIG) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config)


def assert_same(first: CausalLM, second: CausalLM) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.cpu(), theirs[name].cpu()), name


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_is_bit_exact(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = build(dataclasses.replace(CONFIG, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    restored = CausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert restored.config == model.config
    assert_same(restored, model)
    ids = torch.randint(40, (2, 7))
    assert torch.equal(restored(ids).logits, model(ids).logits)


def test_device_and_dtype_may_be_chosen(device: torch.device, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    restored = CausalLM.from_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
    assert_same(restored, build().to(torch.bfloat16))
    assert {t.device.type for t in (*restored.parameters(), *restored.buffers())} == {device.type}
    assert restored.rotary is not None
    assert restored.rotary.cos.dtype == torch.float32


def test_a_restored_model_trains(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = CausalLM.from_pretrained(tmp_path)
    ids = torch.randint(40, (2, 7))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_restored_model_does_not_hold_the_file(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = CausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(model, build())


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    shards: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards["ab"[index % 2] + ".safetensors"][name] = tensor
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index_path = tmp_path / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(CausalLM.from_pretrained(tmp_path), build())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        CausalLM.from_pretrained(tmp_path)


def test_files_replace_older_ones_and_leave_nothing_beside(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    newer = build().to(torch.bfloat16)
    newer.save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same(CausalLM.from_pretrained(tmp_path), newer)
    mode = (tmp_path / "tokenizer.json").stat().st_mode
    assert (tmp_path / "model.safetensors").stat().st_mode == mode


@pytest.mark.parametrize("failing", ["checkpoint.save_file", "staged_files.os.fsync"])
def test_a_failed_save_leaves_the_older_files(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"tilewright_model.{failing}", fail)
    with pytest.raises(OSError, match="No space left"):
        build().to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(CausalLM.from_pretrained(tmp_path), build())


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        build().save_pretrained(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no model directory .*file"):
        CausalLM.from_pretrained(tmp_path / "file")


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "safetensors is missing"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), ValueError, "config.json holds a list"),
        (
            lambda d: os.truncate(d / "model.safetensors", 5000),
            ValueError,
            "model.safetensors is damaged",
        ),
        (
            _edit(lambda t: t.pop(Q1)),
            ValueError,
            rf"{Q1} is missing \(closest: model\.layers\..*_proj\.weight\)$",
        ),
        (
            _edit(lambda t: t.update({Q0.replace("q_proj", "query"): t.pop(Q0)})),
            ValueError,
            rf"{Q0} is missing \(closest: .*query.weight\); tensor .*query.weight is unexpected "
            rf"\(closest: {Q0}\)$",
        ),
        (
            _edit(lambda t: t.update({"lm_head.weight": torch.zeros(40, 24)})),
            ValueError,
            r"lm_head.weight is not model.embed_tokens.weight, .* tie_word_embeddings to false",
        ),
        (
            _edit(lambda t: t.update({Q0: torch.zeros(8, 24)})),
            ValueError,
            rf"{Q0} is \(8, 24\), config.json asks for \(24, 24\)",
        ),
        (_edit(lambda t: t.clear()), ValueError, "embed_tokens.weight is missing; .*17 more"),
    ],
    ids=[
        "no config",
        "no weights",
        "bad json",
        "not an object",
        "truncated",
        "missing",
        "renamed",
        "unexpected",
        "misshaped",
        "empty",
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        CausalLM.from_pretrained(tmp_path)


def test_tensors_that_follow_from_others_are_ignored(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    _edit(add)(tmp_path)
    assert_same(CausalLM.from_pretrained(tmp_path), model)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model directory .*nowhere"):
        CausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_config_error_names_the_file(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(ValueError, match=r"config\.json: hidden_act is 'gelu'"):
        CausalLM.from_pretrained(tmp_path)


def test_large_weights_are_split_and_a_small_save_removes_the_parts(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_bytes=8000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in files]
    assert max(sizes) <= 8000  # no single tensor is larger
    assert sum(sizes) == index["metadata"]["total_size"]
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(CausalLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(CausalLM.from_pretrained(tmp_path), model)


def test_five_gigabytes_are_one_file_and_more_are_two() -> None:
    # On the meta device nothing is held.
    gigabyte = torch.empty(10**9, dtype=torch.uint8, device="meta")
    assert list(_shards({str(i): gigabyte for i in range(5)}, MAX_SHARD_BYTES)) == [
        "model.safetensors"
    ]
    six = _shards({str(i): gigabyte for i in range(6)}, MAX_SHARD_BYTES)
    assert list(six) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert six["model-00002-of-00002.safetensors"] == ["5"]


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, max_shard_bytes=8000)
    next(iter(sorted(tmp_path.glob("model-00002-*")))).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-.* is missing"):
        CausalLM.from_pretrained(tmp_path)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "first")
    for name, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "{{ x }}"), ("x.py", "")):
        (tmp_path / "first" / name).write_text(text)
    path = tmp_path / "first" / "config.json"
    path.write_text(path.read_text().replace('"eos_token_id": null', '"eos_token_id": 7'))
    CausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = sorted(p.name for p in (tmp_path / "second").iterdir())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "second" / "config.json").read_text())["eos_token_id"] == 7


def test_max_shard_bytes_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        build().save_pretrained(tmp_path, max_shard_bytes=0)


@pytest.mark.parametrize("failing", [2, 3])
def test_a_failed_save_of_shards_leaves_the_older_ones(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path, max_shard_bytes=8000)
    before = sorted(path.name for path in tmp_path.iterdir())
    newer, calls = build(), 0
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(1)

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr("tilewright_model.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        newer.save_pretrained(tmp_path, max_shard_bytes=8000)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_same(CausalLM.from_pretrained(tmp_path), build())


@pytest.mark.parametrize("shard_bytes", [8000, 10**9], ids=["shards to shards", "shards to one"])
def test_a_save_that_ends_between_renames_is_not_read(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build().save_pretrained(tmp_path, max_shard_bytes=8000)
    replace, calls = Path.replace, 0

    def fail(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        build().save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], "weight_map must be an object"),
        (None, "weight_map must be an object"),
        ({"a": 3}, "weight_map must be an object"),
        ({"a": "../model.safetensors"}, r"'\.\./model\.safetensors' is not the name of a file"),
        ({"a": "/model.safetensors"}, "is not the name of a file"),
        ({"a": ".."}, "is not the name of a file"),
    ],
    ids=str,
)
def test_a_damaged_index_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        CausalLM.from_pretrained(tmp_path / "model")
