"""What a run may begin with: a model made elsewhere, a checkpoint; and what does not fit."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM
from tilewright_train.chat_template import ChatTemplate
from tilewright_train.cli import main
from tilewright_train.config import Objective
from tilewright_train.errors import InputError
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run
from tilewright_train.records import Message
from tilewright_train.start import find_start, load_start, saved_config
from tilewright_train.tokenizer import load_tokenizer, train_tokenizer

TALK = [Message("user", "the cat"), Message("assistant", "sat")]


@pytest.fixture
def flags(tmp_path: Path, corpus_file: Path, model_folder: Path) -> list[str]:
    """Flags of a run of 2 steps that begins with that model."""
    sizes = {
        "--init": model_folder, "--data": corpus_file, "--out": tmp_path / "runs",
        "--cache-dir": tmp_path / "cache", "--steps": 2, "--batch-size": 2, "--seq-len": 16,
        "--eval-tokens": 100, "--sample-tokens": 4, "--threads": 1, "--device": "cpu",
    }  # fmt: skip
    return [str(word) for pair in sizes.items() for word in pair]


def train(flags: list[str], objective: Objective = "pretrain") -> tuple[Path, str]:
    printed = io.StringIO()
    return run(parse(flags, objective), printed), printed.getvalue()


def test_pretraining_begins_with_a_model_made_elsewhere(
    flags: list[str], model_folder: Path
) -> None:
    folder, printed = train(flags)
    assert f"begins with  {model_folder}" in printed
    assert "nearest in size to the model of --init" in printed
    saved = folder / "checkpoints" / "step-000002"
    before, after = (CausalLM.from_pretrained(f).config for f in (model_folder, saved))
    assert after == before
    assert (after.vocab_size, after.rope_theta, after.tie_word_embeddings) == (304, 500.0, False)
    text = (saved / "tokenizer.json").read_text()
    assert json.loads(text) == json.loads((model_folder / "tokenizer.json").read_text())
    kept = (saved / "chat_template.jinja").read_text()
    assert kept == find_start(model_folder).chat_template  # for whoever fine-tunes it next

    # That run, and one of its checkpoints, can be begun with in turn.
    again = [*flags[2:], "--init", str(folder), "--steps", "1"]
    second, _ = train(again)
    third, _ = train([*flags[2:], "--init", str(saved), "--steps", "1"])
    first = read_metrics(folder / "metrics.jsonl")
    for other in (second, third):
        start = read_metrics(other / "metrics.jsonl")[0].val_loss
        assert start == pytest.approx(first[-1].val_loss, rel=1e-6)


def test_sft_takes_the_template_and_its_named_tokens(
    flags: list[str], model_folder: Path, tmp_path: Path
) -> None:
    talks = tmp_path / "talks.jsonl"
    turns = [{"role": role, "content": content} for role, content in TALK]
    talks.write_text(
        (json.dumps({"messages": turns}) + "\n") * 300
        + json.dumps({"messages": [turns[0], {"role": "assistant", "content": "on a mat"}]})
    )
    more = ["--data", str(talks), "--seq-len", "48", "--validation-fraction", "0.5"]
    folder, _ = train([*flags, *more], "sft")
    saved = (folder / "checkpoints" / "step-000002" / "chat_template.jinja").read_text()
    assert saved.startswith('{% set eos_token = "<|im_end|>" %}{% for')
    assert ChatTemplate(saved).render(TALK)[1].text == "sat<|im_end|>"
    assert CausalLM.from_pretrained(folder / "checkpoints" / "step-000002").config.vocab_size == 304


def test_dpo_begins_with_a_model_made_elsewhere(flags: list[str], tmp_path: Path) -> None:
    """Its first loss is ln 2: the reference is the same model."""
    pairs = tmp_path / "pairs.jsonl"
    lines = ({"prompt": f"the cat {n}", "chosen": "sat", "rejected": "red"} for n in range(300))
    pairs.write_text("\n".join(map(json.dumps, lines)))
    folder, _ = train([*flags, "--data", str(pairs), "--seq-len", "64"], "dpo")
    assert read_metrics(folder / "metrics.jsonl")[0].val_loss == pytest.approx(math.log(2))


def test_weights_are_those_of_the_folder_and_more_rows_their_mean(model_folder: Path) -> None:
    start = find_start(model_folder)
    config = saved_config(str(model_folder))
    assert config is not None
    saved = CausalLM.from_pretrained(model_folder).state_dict()
    model = CausalLM(dataclasses.replace(config, vocab_size=312))
    load_start(start, model)
    for name, tensor in model.state_dict().items():
        rows = saved[name].shape[0]
        assert torch.equal(tensor[:rows], saved[name].float()), name
        if rows < tensor.shape[0]:
            mean = saved[name].float().mean(dim=0).bfloat16().float()
            torch.testing.assert_close(tensor[-1], mean, rtol=1e-2, atol=1e-4)


def test_mistakes_are_one_line(
    flags: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        assert main([*flags, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is no finished run and no model: give the folder" in said("--init", str(tmp_path))
    for name, value in (("hidden-size", "64"), ("preset", "nano"), ("vocab-size", "304"),
                        ("tokenizer", str(model_folder))):  # fmt: skip
        assert f"--{name} comes from the model of --init, {model_folder}" in said(
            f"--{name}", value
        )
    tokenizer = (model_folder / "tokenizer.json").read_text()
    larger = load_tokenizer(model_folder / "tokenizer.json")
    larger.add_tokens([f"word{n}" for n in range(30)])
    (model_folder / "tokenizer.json").write_text(larger.to_str())
    assert "has 309 entries and the model a vocabulary of 304: they do not fit; put" in said()
    (model_folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json cannot be read as a tokenizer" in said()
    (model_folder / "tokenizer.json").unlink()
    assert f"{model_folder} holds no tokenizer.json, the only form" in said()
    (model_folder / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "<|stop|>"))
    assert "has no token that ends a document (<|endoftext|>, <|end_of_text|>, </s>" in said()
    (model_folder / "tokenizer.json").write_text(tokenizer)
    config = model_folder / "config.json"
    shape = config.read_text()
    config.write_text(shape.replace('"llama"', '"mamba"'))
    assert "config.json: model_type is 'mamba': known are llama" in said()
    config.write_text(shape)
    (model_folder / "model.safetensors").unlink()
    assert "model.safetensors is missing: the checkpoint is incomplete" in said()
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_a_much_smaller_tokenizer_is_refused_and_a_padded_vocabulary_is_not(
    model_folder: Path,
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    for rows, fits in ((1303, True), (1304, False)):
        config["vocab_size"] = rows
        (model_folder / "config.json").write_text(json.dumps(config))
        if fits:
            find_start(model_folder)
            continue
        with pytest.raises(InputError, match="has 279 entries and the model a vocabulary of 1,304"):
            find_start(model_folder)


def test_a_damaged_checkpoint_is_named(flags: list[str]) -> None:
    folder, _ = train([*flags, "--steps", "1"])
    moved = folder.parent / "moved"
    shutil.copytree(folder / "checkpoints" / "step-000001", moved)
    assert find_start(moved).folder == moved
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"model\.safetensors does not match its checksum"):
        find_start(moved)


def test_a_tokenizer_of_ones_own_is_used_and_has_to_fit(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_text(train_tokenizer(["zebra " * 50], 262).to_str())
    at = tiny_flags.index("--vocab-size")
    flags = [*tiny_flags[:at], *tiny_flags[at + 2 :], "--tokenizer", str(own), "--steps", "1"]
    (own / "chat_template.jinja").write_text("{{ messages }}")
    folder, printed = train(flags)
    assert "vocab_size   262" in printed
    saved = folder / "checkpoints" / "step-000001"
    assert (saved / "chat_template.jinja").read_text() == "{{ messages }}"
    assert CausalLM.from_pretrained(saved).config.vocab_size == 262
    assert (
        load_tokenizer(saved / "tokenizer.json").get_vocab()
        == load_tokenizer(own / "tokenizer.json").get_vocab()
    )
    assert main([*flags, "--vocab-size", "300"]) == 2
    assert "has 262 entries and --vocab-size is 300: the tokenizer does not fit" in (
        capsys.readouterr().err
    )
