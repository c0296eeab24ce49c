"""train-generate: what it writes is what the engine generates, and how it is told."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM, Engine, SamplingParams
from tilewright_train.chat_template import ChatTemplate
from tilewright_train.conversations import tokenize
from tilewright_train.generate_command import main
from tilewright_train.records import Message
from tilewright_train.start import Start
from tilewright_train.streaming import prompt_tokens, stream_reply
from tilewright_train.tokenizer import decode, end_token, load_tokenizer

SPEED = r"\d+ tokens, the first after [\d.,]+ ms(, then [\d.,]+ tokens/s)?"


def words(folder: Path) -> list[str]:
    return ["--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "12"]


def greedy(folder: Path, tokens: list[int], ends: tuple[str, ...]) -> str:
    """What follows, by the engine alone."""
    model = CausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    stop = tuple(n for text in ends if (n := tokenizer.token_to_id(text)) is not None)
    params = SamplingParams(max_new_tokens=12, temperature=0, stop_token_ids=stop)
    (completion,) = Engine(model).generate([tokens], params)
    return decode(tokenizer, [t for t in completion.token_ids if t not in stop])


def test_a_prompt_is_continued(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(model_folder), "--prompt", "the cat", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    tokenizer = load_tokenizer(model_folder / "tokenizer.json")
    tokens = [end_token(tokenizer), *tokenizer.encode("the cat").ids]
    assert prompt_tokens(tokenizer, "the cat") == tokens
    expected = greedy(model_folder, tokens, ("<|endoftext|>", "<|im_end|>"))
    assert captured.out == f"the cat{expected}\n"
    assert re.fullmatch(f"{SPEED}\n", captured.err)


def test_a_conversation_goes_on_turn_by_turn(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer is of all turns before it; blank lines are none."""
    lines = ["the cat\n", "\n", "sat on\n"]
    asked = [*words(model_folder), "--temperature", "0", "--system", "red", "--chat"]
    assert main(asked, lines) == 0
    captured = capsys.readouterr()
    source = Start(model_folder).chat_template
    assert source is not None
    template, tokenizer = ChatTemplate(source), load_tokenizer(model_folder / "tokenizer.json")
    messages, expected = [Message("system", "red")], ""
    for line in ("the cat", "sat on"):
        messages.append(Message("user", line))
        ((tokens, _),) = tokenize(tokenizer, template, [messages], add_generation_prompt=True)
        text = greedy(model_folder, tokens, ("<|endoftext|>", "<|im_end|>"))
        messages.append(Message("assistant", text))
        expected += f"{text}\n"
    assert captured.out == expected
    assert re.fullmatch(f"({SPEED}\n){{2}}", captured.err)
    # The bare flag and no flag at all say the same of a model that chats; text is one turn.
    assert main([*words(model_folder), "--temperature", "0", "--system", "red"], lines) == 0
    assert capsys.readouterr().out == expected
    assert main([*asked[:-1], "--chat", "the cat"], lines) == 0
    assert expected.startswith(capsys.readouterr().out)


@pytest.mark.gpu
def test_on_a_gpu_the_graphs_tokens_are_those_of_the_forward(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32, so that the likeliest token is the same one."""
    asked = ["--prompt", "the cat", "--temperature", "0", "--precision", "fp32"]
    written = []
    for device in ("cpu", "cuda"):
        assert main([*words(model_folder), *asked, "--device", device]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


def test_a_seed_draws_the_same_text(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for seed in ("1", "1", "2"):
        assert main([*words(model_folder), "--prompt", "", "--seed", seed, "--top-k", "0"]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_that_stops_is_not_written_even_in_part(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder / "tokenizer.json")
    engine = Engine(CausalLM.from_pretrained(model_folder, dtype=torch.float32))
    tokens = prompt_tokens(tokenizer, "the cat")
    params = SamplingParams(max_new_tokens=12, temperature=0)

    def reply(*stop: str) -> tuple[str, list[str]]:
        written: list[str] = []
        chosen = SamplingParams(max_new_tokens=12, temperature=0, stop=stop)
        made = stream_reply(engine, tokenizer, tokens, chosen, written.append)
        assert "".join(written) == made.text
        return made.text, written

    whole = stream_reply(engine, tokenizer, tokens, params, lambda text: None)
    assert (whole.tokens, whole.text) == (12, greedy(model_folder, tokens, ()))
    assert 0 < whole.first_seconds < whole.seconds
    middle = whole.text[4:8]
    cut, written = reply(middle)
    assert cut == whole.text[: whole.text.find(middle)]
    assert all(middle[0] not in part or part in whole.text for part in written)
    # What only begins like it comes late, and whole.
    assert reply(whole.text[-1:] + "never")[0] == whole.text


def test_half_a_character_in_an_argument_is_none(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the shell hands on bytes that are not UTF-8."""
    assert main([*words(model_folder), "--prompt", "the \udcff cat"]) == 0
    assert capsys.readouterr().out.startswith("the \ufffd cat")


def test_weights_that_are_not_finite_and_input_that_is_no_text_are_one_line(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"the cat\n\xff\n"), encoding="utf-8")
    assert main([*words(model_folder), "--chat"], lines) == 2
    assert "error: the standard input is not UTF-8 text" in capsys.readouterr().err
    model = CausalLM.from_pretrained(model_folder)
    model.norm.weight.data[0] = math.nan
    model.save_pretrained(model_folder)
    assert main([*words(model_folder), "--prompt", "the cat"]) == 2
    assert "are not finite: check the model's weights" in capsys.readouterr().err


def test_a_bad_environment_is_one_line(model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tilewright_train.generate_command import generate; generate()",
         *words(model_folder)],
        capture_output=True, text=True, env=os.environ | {"TILEWRIGHT_BACKEND": "tritn"},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: TILEWRIGHT_BACKEND='tritn' is not a backend")


def test_mistakes_are_one_line(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        assert main([*words(model_folder), *more], []) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    assert "--prompt and --chat exclude each other" in said("--prompt", "a", "--chat", "b")
    assert "--system is for a conversation" in said("--prompt", "a", "--system", "b")
    assert "temperature is -1.0: give 0 (greedy)" in said("--temperature", "-1")
    assert "top_k is -1: give 1 or more" in said("--top-k", "-1")
    assert "max_new_tokens is 0: give 1 or more" in said("--max-new-tokens", "0")
    assert "tokens and the model 160 positions: give a shorter" in said("--prompt", "x" * 170)
    assert f"no run in {tmp_path} has saved" in said("--model", "auto", "--out", str(tmp_path))
    assert "unknown flag '--top-kk' (did you mean '--top-k'?)" in said("--top-kk", "3")
    (model_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"}))
    assert "has no chat template: give --prompt" in said("--chat", "b")
    assert main([*words(model_folder)]) == 0  # the beginning of a text
