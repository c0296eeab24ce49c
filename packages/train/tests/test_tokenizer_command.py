"""train-tokenizer: what it saves, what it measures, who reads it."""

import json
from pathlib import Path

import pytest

from tilewright_train.chat_template import CHATML
from tilewright_train.tokenizer import load_tokenizer
from tilewright_train.tokenizer_command import TokenizerOptions, main, make


@pytest.fixture
def saved(tmp_path: Path, corpus_file: Path) -> Path:
    folder = tmp_path / "made"
    make(TokenizerOptions(data=(str(corpus_file),), vocab_size=280, out=folder), lambda line: None)
    return folder


def test_bytes_per_token_are_counted_on_both_sides(tmp_path: Path, corpus_file: Path) -> None:
    said: list[str] = []
    other = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat é"}]
    other.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    sources = (str(corpus_file), str(other))
    options = TokenizerOptions(
        data=sources, vocab_size=300, out=tmp_path / "made", validation_fraction=0.3
    )
    densities = make(options, said.append)
    tokenizer = load_tokenizer(tmp_path / "made" / "tokenizer.json")
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    texts += ["user: the cat\nassistant: sat é"] * 20
    assert sum(d.bytes for d in densities.values()) == sum(len(t.encode()) for t in texts)
    assert sum(d.tokens for d in densities.values()) == sum(
        len(tokenizer.encode(text).ids) for text in texts
    )
    held_out = densities["held-out"]
    assert 0.2 < held_out.bytes / sum(len(t.encode()) for t in texts) < 0.4
    assert held_out.bytes_per_token == held_out.bytes / held_out.tokens > 2
    assert any(
        line.startswith(f"held-out     {held_out.bytes_per_token:.3f} bytes") for line in said
    )


def test_it_has_as_many_entries_as_were_asked_for_with_the_special_ones(saved: Path) -> None:
    tokenizer = load_tokenizer(saved / "tokenizer.json")
    assert tokenizer.get_vocab_size() == 280
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    assert special == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (saved / "chat_template.jinja").read_text() == CHATML


def test_transformers_reads_it(saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    ours = load_tokenizer(saved / "tokenizer.json")
    text = "the cat é\n\U0001f600"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(ours.encode(text).ids) == text
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>")
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    written = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    assert theirs.apply_chat_template(turns, tokenize=False) == written


def test_mistakes_are_one_line(
    saved: Path, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        words = ["--data", str(corpus_file), "--out", str(tmp_path / "new"), *more]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"{saved} holds a tokenizer already: give another --out" in said("--out", str(saved))
    assert "vocab_size 200 is out of range: it must be at least 259" in said("--vocab-size", "200")
    assert "does not exist: give --data" in said("--data", str(tmp_path / "no"))
    assert "validation_fraction 0.9 is out of range" in said("--validation-fraction", "0.9")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "ends the assistant's turns with text" in said("--chat-template", str(template))
    corpus_file.write_text('{"txt": 1}\n')
    assert 'corpus.jsonl:1 has no "text" (its keys: txt)' in said()
    assert not (tmp_path / "new").exists()
