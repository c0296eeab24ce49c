"""What data may bring to train-sft: each is one line with the remedy and status 2, or a rule.

A rule is what happens to input that is odd and still says something; it is told and counted.
"""

import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tilewright_dist import init_from_environment
from tilewright_train import automatic
from tilewright_train.batches import IGNORE_INDEX
from tilewright_train.chat_template import CHATML
from tilewright_train.cli import main
from tilewright_train.config import Objective
from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.preparation import prepare
from tilewright_train.pretraining import run
from tilewright_train.progress import Reporter


def turns(*contents: Any, roles: tuple[Any, ...] = ("user", "assistant")) -> dict[str, Any]:
    """A conversation whose speakers take turns."""
    pairs = zip(itertools.cycle(roles), contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


GOOD = [turns("the cat", "sat"), turns("a red", "mat", "on", "a cat")] * 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "talks.jsonl"


@pytest.fixture
def flags(tmp_path: Path, data: Path, model_folder: Path) -> list[str]:
    """Flags of one step that begins with a small model."""
    sizes = {
        "--init": model_folder, "--data": data, "--out": tmp_path / "runs", "--steps": 1,
        "--cache-dir": tmp_path / "cache", "--batch-size": 2, "--seq-len": 64, "--eval-tokens": 50,
        "--threads": 1, "--device": "cpu", "--validation-fraction": 0.3,
    }  # fmt: skip
    return [str(word) for pair in sizes.items() for word in pair]


def write(path: Path, records: list[dict[str, Any]], *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in (*map(json.dumps, records), *lines)))


def train(flags: list[str], objective: Objective = "sft") -> tuple[Path, str]:
    printed = io.StringIO()
    return run(parse(flags, objective), printed), printed.getvalue()


def complaint(
    flags: list[str], capsys: pytest.CaptureFixture[str], objective: Objective = "sft"
) -> str:
    """The one line of a command that ends with 2, begins no run and shows no traceback."""
    capsys.readouterr()
    assert main(flags, objective) == 2
    (line,) = capsys.readouterr().err.splitlines()
    out = Path(flags[flags.index("--out") + 1])
    assert not list(out.glob("[!.]*"))
    return line


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({"messages": []}), 'has "messages" without a message'),
        (json.dumps({"conversations": []}), 'has "conversations" without a message'),
        (json.dumps(turns("a", "b", roles=("user", "bot"))), "the unknown role 'bot': use system,"),
        (json.dumps(turns("a", roles=("usr",))), "unknown role 'usr' (did you mean 'user'?)"),
        (json.dumps(turns("a", roles=(None,))), "that is not a string but null"),
        (json.dumps(turns(3)), "that is not a string but a number"),
        (json.dumps(turns(None)), "that is not a string but null"),
        (json.dumps(turns([{"type": "text", "text": "a"}])), "that is not a string but a list"),
        (json.dumps({"messages": "hi"}), "that is not a list of messages but a string"),
        (json.dumps({"messages": [{"role": "user"}]}), 'without "content" (its keys: role)'),
        ('{"messages": [{"role": "user", "content": "a\0b"}]}', "is not JSON (Invalid control"),
        ('{"messages": [', "is not JSON"),
    ],
)
def test_a_bad_conversation_is_named_with_its_line_or_skipped(
    flags: list[str], data: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    write(data, GOOD, line)
    said = complaint(flags, capsys)
    assert said.startswith(f"error: {data}:41 ")
    assert reason in said
    assert said.endswith('mend it, or skip such lines with "--on-bad-line skip"')


def test_skipped_lines_are_counted_and_shown(flags: list[str], data: Path) -> None:
    bad = (json.dumps({"messages": []}), json.dumps(turns(3)), "{")
    write(data, GOOD, *bad)
    _, printed = train([*flags, "--on-bad-line", "skip"])
    assert f'skipped      3 lines: {data}:41 has "messages" without a message; {data}:42' in printed


def test_byte_order_mark_and_line_ends_change_nothing(
    flags: list[str], data: Path, tmp_path: Path
) -> None:
    """Nor does packing the file: the same tokens, so the same losses."""
    losses = []
    write(data, GOOD)
    plain = data.read_bytes()
    odd = b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n\r\n"
    for content in (plain, odd):
        data.write_bytes(content)
        losses.append([r.val_loss for r in read_metrics(train(flags)[0] / "metrics.jsonl")])
    (tmp_path / "odd.jsonl.gz").write_bytes(gzip.compress(odd))
    packed, _ = train([*flags, "--data", str(tmp_path / "odd.jsonl.gz")])
    losses.append([r.val_loss for r in read_metrics(packed / "metrics.jsonl")])
    assert losses[0] == losses[1] == losses[2]


def test_nul_that_json_spells_is_a_character(flags: list[str], data: Path) -> None:
    write(data, [turns("a\0b", "c\0d")] * 40)
    folder, _ = train(flags)
    assert read_metrics(folder / "metrics.jsonl")[-1].val_loss


def test_nul_bytes_and_other_encodings_of_plain_text_are_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    for content, reason in (
        (b"fine\nno\0t\n", "text.txt:2 holds a NUL byte, so it is no UTF-8 text"),
        ("the cat".encode("utf-16-le"), "text.txt:1 holds a NUL byte"),
        (b"fine\n\xff\xfe\n", "text.txt:2 is not UTF-8 text"),
    ):
        text.write_bytes(content)
        said = complaint([*flags, "--data", str(text)], capsys, "pretrain")
        assert reason in said
        assert "convert it, or leave it out" in said


def test_a_conversation_of_ten_megabytes_is_cut_off_and_counted(
    flags: list[str], data: Path
) -> None:
    """It is one record like any other; what does not fit in a row is not trained on."""
    long = [turns("the cat", "today" * 2_000_000), turns("the cat " * 60, "sat")]
    write(data, [*long, *GOOD])
    assert max(map(len, data.read_text().splitlines())) > 10_000_000
    _, printed = train(flags)
    assert "2 samples cut off, 1 left out: nothing to predict" in printed


def test_a_batch_always_has_something_to_predict(flags: list[str], data: Path) -> None:
    """Rows of which all is masked are never made, or a run ends before it begins."""
    write(data, [turns("the cat " * 60, "sat"), *GOOD])
    with init_from_environment("cpu") as environment:
        chosen = automatic.choose(parse(flags, "sft"))
        prepared = prepare(chosen, environment, Reporter())
        for step in range(2 * prepared.sampler.rows.count):
            batch = prepared.sampler.batch(step)
            masked = (batch.labels != IGNORE_INDEX).sum(dim=1)
            assert masked.min() > 0
            assert batch.targets == int(masked.sum()) == prepared.sampler.targets(step)


def test_conversations_of_which_nothing_can_be_predicted_are_refused(
    flags: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, [turns(f"the cat {n}") for n in range(40)])
    said = complaint(flags, capsys)
    assert "in no conversation for training the assistant says anything (40 were skipped)" in said
    write(data, [turns(f"{n} the cat " * 60, "sat") for n in range(40)])
    said = complaint(flags, capsys)
    assert "no sample has a token to predict within 64 tokens: give --data more, or a" in said


def test_plain_text_in_a_folder_of_conversations_is_left_out_and_counted(
    flags: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    (folder / "README.md").write_text("What this is.")
    _, printed = train([*flags, "--data", str(folder)])
    assert f"corpus       {folder}, 1 file, 0.0 MB, 1 others left out" in printed


def pair(chosen: Any, rejected: Any, prompt: str = "the cat", role: str = "assistant") -> Any:
    sides = {"chosen": chosen, "rejected": rejected}
    turns = {s: [{"role": role, "content": content}] for s, content in sides.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **turns}


def test_pairs_of_which_one_side_of_the_split_is_left_out_are_refused(
    flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few are split by place: the first 28 of 40 are for training."""
    good, silent, long = pair("sat", "on"), pair("a", "b", role="user"), pair("a", "b", "the " * 90)
    for side, records in (
        ("training", [silent] * 28 + [good] * 12),
        ("validation", [good] * 28 + [silent] * 12),
    ):
        write(data, records)
        said = complaint(flags, capsys, "dpo")
        assert f"in no pair for {side} the assistant says something on both sides (" in said
        assert "give --data more whose chosen and rejected end with turns of the role" in said
    write(data, [good] * 28 + [long] * 12)
    said = complaint(flags, capsys, "dpo")
    assert "within 64 tokens on both sides, of the 12 for validation: give --data more" in said
    picky = tmp_path / "picky.jinja"
    refusal = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    picky.write_text(refusal + CHATML)
    skipping = ["--chat-template", str(picky), "--on-bad-line", "skip"]
    write(data, [pair("sat", "on", "no")] * 40)
    refused = "the chat template raises on all records for training (40 were skipped): mend the"
    assert refused in complaint([*flags, *skipping], capsys, "dpo")
    write(data, [turns("no", "sat")] * 40)
    assert refused in complaint([*flags, *skipping], capsys)


def test_a_run_that_cannot_begin_is_not_the_one_to_resume(
    flags: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, GOOD)
    begun, _ = train(flags)
    (begun / "summary.json").unlink()
    write(data, [turns(f"{n} the cat " * 60, "sat") for n in range(40)])
    assert main([*flags, "--name", "late"], "sft") == 2
    assert [folder.name for folder in begun.parent.glob("[!.]*")] == [begun.name]
    write(data, GOOD)
    again, _ = train(["--resume", "--out", str(begun.parent)])
    assert again == begun


def test_a_template_that_raises_on_the_data_names_them(
    flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picky = tmp_path / "picky.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    picky.write_text(refusal + CHATML)
    odd = turns("Be brief.", "the cat", "sat", roles=("system", "user", "assistant"))
    write(data, [*GOOD, odd, odd])
    flags = [*flags, "--chat-template", str(picky)]
    said = complaint(flags, capsys)
    assert "the chat template raises TemplateError: no system: mend the data, or give" in said
    assert said.endswith("(in the conversation that begins system: 'Be brief.')")
    _, printed = train([*flags, "--on-bad-line", "skip"])
    assert "skipped      2 conversations on which the chat template raises" in printed


def test_a_template_without_marks_trains_on_the_same_tokens(
    flags: list[str], data: Path, tmp_path: Path
) -> None:
    write(data, GOOD)
    losses = []
    plain = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    for source in (CHATML, plain):
        template = tmp_path / "own.jinja"
        template.write_text(source)
        folder, _ = train([*flags, "--chat-template", str(template)])
        losses.append([r.val_loss for r in read_metrics(folder / "metrics.jsonl")])
        assert (
            folder / "checkpoints" / "step-000001" / "chat_template.jinja"
        ).read_text() == source
    assert losses[0] == losses[1]
