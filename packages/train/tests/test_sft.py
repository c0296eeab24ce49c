"""SFT on the one loop: what it begins with, what it predicts, what it refuses, how it goes on."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM
from tilewright_train.batches import IGNORE_INDEX
from tilewright_train.chat_template import CHATML
from tilewright_train.cli import main
from tilewright_train.data import RowOptions, training_rows, validation_rows
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run
from tilewright_train.samples import Samples
from tilewright_train.stand_ins import special_tokens
from tilewright_train.start import find_start, grown_vocabulary
from tilewright_train.tokenizer import load_tokenizer


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """300 conversations; every fiftieth has no assistant."""
    path = tmp_path / "talks.jsonl"
    lines = []
    for n in range(300):
        turns = [{"role": "user", "content": f"say {n}"}]
        if n % 50:
            turns.append({"role": "assistant", "content": "yes" if n % 2 else "no"})
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def pretrained(tiny_flags: list[str]) -> Path:
    return run(parse(tiny_flags), io.StringIO())


@pytest.fixture
def sft_flags(tiny_flags: list[str], talks: Path) -> list[str]:
    own = ("--data", "--vocab-size", "--hidden-size", "--num-hidden-layers", "--intermediate-size",
           "--num-attention-heads", "--num-key-value-heads", "--seq-len")  # fmt: skip
    pairs = list(zip(tiny_flags[::2], tiny_flags[1::2], strict=True))
    kept = [word for name, value in pairs if name not in own for word in (name, value)]
    return [*kept, "--data", str(talks), "--seq-len", "64", "--tasks", "4"]


def train(flags: list[str], *more: str) -> tuple[Path, str]:
    printed = io.StringIO()
    return run(parse([*flags, *more], "sft"), printed), printed.getvalue()


def test_it_begins_with_the_latest_pretraining_and_learns_to_answer(
    pretrained: Path, sft_flags: list[str]
) -> None:
    folder, printed = train(sft_flags)
    assert folder.name == "talks-nano-sft-001"
    first, *_, last = [r.val_loss for r in read_metrics(folder / "metrics.jsonl") if r.val_loss]
    assert last < first - 0.5
    assert f"begins with  {pretrained}/checkpoints/step-000012" in printed
    assert "skipped      6 conversations in which the assistant says nothing" in printed
    assert "next         train-dpo" in printed
    saved = folder / "checkpoints" / "step-000012"
    assert "{% generation %}" in (saved / "chat_template.jinja").read_text()
    before = CausalLM.from_pretrained(pretrained / "checkpoints" / "step-000012").config
    after = CausalLM.from_pretrained(saved).config
    assert after.hidden_size == before.hidden_size == 32
    assert after.vocab_size == grown_vocabulary(before.vocab_size, before.vocab_size + 2)
    assert after.vocab_size % 8 == 0

    # A second SFT begins with the pretraining still, unless it is told to go on from the first.
    again, printed = train(sft_flags, "--init", str(folder), "--steps", "1")
    assert again.name == "talks-nano-sft-002"
    assert f"begins with  {saved}" in printed
    assert read_metrics(again / "metrics.jsonl")[0].val_loss == pytest.approx(last, rel=1e-6)
    assert f"begins with  {pretrained}" in train(sft_flags, "--steps", "1")[1]


def test_it_begins_with_random_weights_where_it_is_told_to(
    tiny_flags: list[str], talks: Path
) -> None:
    """No pretraining is there: sizes are flags, the vocabulary is of what the conversations say."""
    flags = [*tiny_flags, "--data", str(talks), "--seq-len", "64", "--init", "scratch"]
    folder, printed = train(flags)
    assert "begins with  random weights" in printed
    assert "vocabulary 300" in printed
    saved = folder / "checkpoints" / "step-000012"
    shape = CausalLM.from_pretrained(saved).config
    assert (shape.vocab_size, shape.hidden_size) == (304, 32)
    tokenizer = load_tokenizer(saved / "tokenizer.json")
    assert special_tokens(tokenizer).keys() == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert len(tokenizer.encode("assistant: yes").ids) < 5
    records = read_metrics(folder / "metrics.jsonl")
    first, *_, last = [r.val_loss for r in records if r.val_loss]
    assert first == pytest.approx(math.log(304), abs=0.2)
    assert last < first - 1

    shutil.rmtree(saved)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder.parents[1] / "cache")
    train(["--resume", "--out", str(folder.parent), "--cache-dir", str(folder.parents[1] / "new")])
    assert [r.loss for r in read_metrics(folder / "metrics.jsonl")] == [r.loss for r in records]


@pytest.mark.parametrize("entries", [257, 258, 259])
def test_a_vocabulary_of_its_own_is_as_large_as_asked_or_refused(
    tiny_flags: list[str], talks: Path, capsys: pytest.CaptureFixture[str], entries: int
) -> None:
    """An end token, 256 bytes and the two tokens of the template are the fewest there can be."""
    sizes = ["--seq-len", "128", "--vocab-size", str(entries), "--steps", "1"]
    flags = [*tiny_flags, "--data", str(talks), "--init", "scratch", *sizes]
    if entries == 259:
        folder, _ = train(flags)
        tokenizer = load_tokenizer(folder / "checkpoints" / "step-000001" / "tokenizer.json")
        assert tokenizer.get_vocab_size() == entries
        return
    assert main(flags, "sft") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --vocab-size {entries} has no room for <|im_start|> and ")
    assert line.endswith("give 257 + 2 = 259 or more")
    assert not list(Path(tiny_flags[tiny_flags.index("--out") + 1]).glob("*"))


def test_random_weights_may_have_the_tokenizer_of_a_run(
    pretrained: Path, sft_flags: list[str], tmp_path: Path
) -> None:
    sizes = ["--hidden-size", "32", "--num-hidden-layers", "1", "--num-attention-heads", "2",
             "--num-key-value-heads", "1", "--intermediate-size", "64", "--steps", "1"]  # fmt: skip
    flags = [*sft_flags, *sizes, "--init", "scratch", "--tokenizer"]
    folder, _ = train([*flags, str(pretrained)])
    saved = folder / "checkpoints" / "step-000001"
    before = find_start(pretrained)
    known = load_tokenizer(before.tokenizer_file).get_vocab()
    own = load_tokenizer(saved / "tokenizer.json").get_vocab()
    assert own == known | {"<|im_start|>": len(known), "<|im_end|>": len(known) + 1}
    weights = CausalLM.from_pretrained(saved)
    assert weights.config.vocab_size == grown_vocabulary(0, len(own))
    begun = CausalLM.from_pretrained(before.folder).embed_tokens.weight
    assert (weights.embed_tokens.weight[: len(begun)] - begun).abs().mean() > 0.01

    # A template that lies beside the tokenizer is the one to talk in.
    shutil.copytree(saved, tmp_path / "own")
    template = CHATML + "{# mine #}"
    (tmp_path / "own" / "chat_template.jinja").write_text(template)
    folder, _ = train([*flags, str(tmp_path / "own")])
    assert (find_start(folder).chat_template) == template


def test_it_is_resumed_bit_for_bit(pretrained: Path, sft_flags: list[str]) -> None:
    whole, _ = train(sft_flags)
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for done in ("step-000012", "step-000008"):
        shutil.rmtree(part / "checkpoints" / done)
    (part / "summary.json").unlink()
    train(["--resume", "--out", str(part.parent)])
    assert [r.loss for r in read_metrics(part / "metrics.jsonl")] == [
        r.loss for r in read_metrics(whole / "metrics.jsonl")
    ]
    assert main(["--resume", str(pretrained)], "sft") == 2


def test_micro_batches_of_any_size_give_the_same_run(
    pretrained: Path, sft_flags: list[str]
) -> None:
    """Rows differ in their targets: each one counts alike, whatever it is computed with."""

    def losses(folder: Path) -> list[float]:
        records = read_metrics(folder / "metrics.jsonl")
        return [r.loss for r in records if r.loss] + [r.val_loss for r in records if r.val_loss]

    whole = losses(train(sft_flags, "--micro-batch-size", "4")[0])
    for size in ("2", "1"):
        split = losses(train(sft_flags, "--micro-batch-size", size)[0])
        assert split == pytest.approx(whole, rel=2e-5)
    assert len(whole) == 12 + 3


def test_stories_are_answered_before_and_after(pretrained: Path, sft_flags: list[str]) -> None:
    place = sft_flags.index("--data")
    flags = [*sft_flags[:place], *sft_flags[place + 2 :]]
    folder, printed = train(
        flags, "--data", "stories", "--steps", "2", "--seq-len", "128", "--tasks", "2"
    )
    assert printed.count("exact match  0.0% of 2 held-out tasks, 0.0% of as many") == 2
    matches = json.loads((folder / "summary.json").read_text())["exact_match"]
    assert matches == {step: {"instances": 0.0, "templates": 0.0} for step in ("0", "2")}
    for step in (0, 2):
        lines = (folder / "samples" / f"step-{step:06d}.txt").read_text().splitlines()
        assert len(lines) == 4
        assert all("(right: " in line for line in lines)


def test_grown_rows_are_the_mean_of_the_others(pretrained: Path, sft_flags: list[str]) -> None:
    begun = CausalLM.from_pretrained(find_start(pretrained).folder).embed_tokens.weight
    folder, _ = train(sft_flags, "--steps", "1", "--lr", "1e-30", "--weight-decay", "0")
    grown = CausalLM.from_pretrained(find_start(folder).folder).embed_tokens.weight
    torch.testing.assert_close(grown[: len(begun)], begun)
    torch.testing.assert_close(grown[-1], begun.mean(dim=0))


def test_samples_with_all_targets_beyond_the_context_make_no_batch() -> None:
    """Whatever the batch, each row has something to predict: its mean loss is a number."""
    tokens = torch.arange(24, dtype=torch.int32)
    targets = torch.zeros(24, dtype=torch.uint8)
    targets[[7, 17]] = 1  # of samples of 8: in the first beyond 6 tokens, in the third within them
    samples = Samples(tokens, torch.tensor([8, 16, 24]), targets)
    options = RowOptions(packing="none", document_mask=True, seq_len=6, padding=0)
    made = training_rows([samples], (), options, 0)
    assert (made.truncated, made.dropped, made.rows.count) == (3, 2, 1)
    batch = made.rows.read([0, 1])
    assert batch.targets == 2
    assert (batch.labels != IGNORE_INDEX).sum(dim=1).tolist() == [1, 1]
    assert validation_rows([samples], options, 10).targets == 1


def test_mistakes_are_one_line(
    tiny_flags: list[str],
    sft_flags: list[str],
    talks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*more: str) -> str:
        capsys.readouterr()
        assert main([*sft_flags, *more], "sft") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no finished pretraining is in" in said()
    assert "is no finished run" in said("--init", str(tmp_path))
    assert "or «scratch» for random weights" in said()
    talks.write_text('{"messages": 1}\n' + talks.read_text())
    assert "talks.jsonl:1 has" in said("--init", "scratch")
    talks.write_text(talks.read_text().partition("\n")[2])
    pretrained = run(parse(tiny_flags), io.StringIO())
    assert "--hidden-size comes from the run of --init" in said("--hidden-size", "64")
    assert "packing concat cuts conversations anywhere" in said("--packing", "concat")
    template = tmp_path / "own.jinja"
    template.write_text("{{ raise_exception('only tools') }}")
    assert "raises TemplateError: only tools" in said("--chat-template", str(template))
    assert "is of train-pretrain: use that command" in said(
        "--config", str(pretrained / "config.toml")
    )
    silent = ({"messages": [{"role": "user", "content": f"{n}"}]} for n in range(300))
    talks.write_text("\n".join(map(json.dumps, silent)))
    assert "in no conversation for training the assistant says anything (300 were" in said()
    assert [run.name for run in pretrained.parent.iterdir()] == [pretrained.name]
