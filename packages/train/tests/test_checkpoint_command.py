"""`train-checkpoint`: what is damaged is named, what differs is found, what is written loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_optim import AdamW, WarmupCosine
from tilewright_train import checkpoint, checkpoint_state
from tilewright_train.chat_template import CHATML, ChatTemplate
from tilewright_train.checkpoint_command import main
from tilewright_train.conversations import chat_tokenizer
from tilewright_train.random_states import random_states
from tilewright_train.snapshot import take
from tilewright_train.tokenizer import load_tokenizer, train_tokenizer

SHAPE = preset(
    "nano", vocab_size=264, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=32,
)  # fmt: skip
TEXT = "the cat sat on a red mat today"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of two steps."""
    torch.manual_seed(0)
    model = CausalLM(SHAPE)
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = WarmupCosine(optimizer, 2, 20)
    tokenizer = train_tokenizer([TEXT], 260)
    for step in (1, 2):
        rows = torch.randint(264, (2, 8))
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        snapshot = take(
            step,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            random_states=random_states(0, torch.device("cpu")),
            tokenizer=tokenizer.to_str(),
            facts={"seconds": step / 3, "rows": 2 * step, "processes": 1},
        )
        checkpoint_state.save(tmp_path / "run" / "checkpoints", snapshot, keep=2)
    return tmp_path / "run"


def of_step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_verify_names_every_file_that_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("whole ") == 2
    assert not printed.err
    flipped, missing = of_step(run, 1) / "random.safetensors", of_step(run, 2) / "training.json"
    flip(flipped)
    missing.unlink()
    assert main(["verify", str(of_step(run, 1)), str(of_step(run, 2))]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {flipped} does not match its checksum: ")
    assert second.startswith(f"error: {missing} is missing: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "/no/run"], "/no/run holds no checkpoint: give the folder of one"),
        (["verify", "/no/step-000001"], "/no/step-000001 does not exist: give the folder"),
        (["export", "RUN", "RUN"], "is not empty: give another folder"),
        (["reshard", "RUN", "RUN/checkpoints"], "step-000002 is there already: give another"),
        (["reshard", "RUN", "OUT", "--max-shard-size", "2 pounds"], "'2 pounds' is no size:"),
        (["export", "RUN", "OUT", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["verfy", "RUN"], "invalid choice: 'verfy'"),
        ([], "required: COMMAND: see train-checkpoint --help"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"RUN": str(run), "RUN/checkpoints": f"{run}/checkpoints", "OUT": f"{run}/out"}
    assert main([places.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (run / "out").exists()


def test_nothing_is_made_of_a_damaged_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(of_step(run, 2) / "model.safetensors")
    for words in (["export", str(run), f"{run}/out"], ["diff", str(of_step(run, 1)), str(run)]):
        assert main(words) == 2
        assert "model.safetensors does not match its checksum" in capsys.readouterr().err
    assert not (run / "out").exists()


def test_diff_finds_what_differs_and_by_how_much(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(run), str(of_step(run, 2))]) == 0
    assert capsys.readouterr().out.startswith("the same ")
    assert main(["diff", str(of_step(run, 1)), str(of_step(run, 2))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "training   step  1 and 2" in lines
    assert not [line for line in lines if "seconds" in line]
    expected = {
        name: float((one.double() - two.double()).abs().max())
        for (name, one), two in zip(
            CausalLM.from_pretrained(of_step(run, 1)).state_dict().items(),
            CausalLM.from_pretrained(of_step(run, 2)).state_dict().values(),
            strict=True,
        )
    }
    found = [line for line in lines if line.startswith("model ")]
    assert "model.embed_tokens.weight  4,224 of 4,224 elements, by at most " in "\n".join(found)
    largest = f"{expected['embed_tokens.weight']:.3g}"
    assert next(line for line in found if "embed_tokens" in line).endswith(largest)
    sizes = [float(line.rpartition(" ")[2]) for line in found]
    assert sizes == sorted(sizes, reverse=True)
    assert [line for line in lines if line.startswith("optimizer  embed_tokens.weight.exp_avg ")]


def test_diff_names_a_tensor_that_only_one_has_and_what_has_another_kind(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tilewright_train.checkpoint_tools import differences

    file = of_step(run, 2) / "optimizer.safetensors"
    tensors = load_file(file)
    moment = tensors.pop("norm.weight.exp_avg")
    tensors["norm.weight.exp_avg_sq"] = moment.double()
    save_file(tensors | {"norm.weight.max": moment * torch.nan}, file)
    found = {d.name: d.what for d in differences(of_step(run, 1), of_step(run, 2))}
    assert found["norm.weight.exp_avg"] == f"only in {of_step(run, 1)}"
    assert found["norm.weight.max"] == f"only in {of_step(run, 2)}"
    assert found["norm.weight.exp_avg_sq"] == "(16,) float32 and (16,) float64"


def test_a_resharded_checkpoint_is_the_same_in_other_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other" / "checkpoints"
    assert main(["reshard", str(run), str(out), "--max-shard-size", "20KB"]) == 0
    made = out / "step-000002"
    assert len(list(made.glob("optimizer-*.safetensors"))) > 1
    assert len(list(made.glob("model-*.safetensors"))) > 1
    assert checkpoint.damage(made) is None
    assert main(["diff", str(run), str(made)]) == 0
    assert "the same" in capsys.readouterr().out
    model = CausalLM(SHAPE)
    optimizer = AdamW(model.parameters())
    facts, _ = checkpoint_state.load(
        made, model=model, optimizer=optimizer, scheduler=WarmupCosine(optimizer, 2, 20)
    )
    assert facts["rows"] == 4
    back = tmp_path / "back"
    assert main(["reshard", str(made), str(back)]) == 0
    assert sorted(f.name for f in (back / "step-000002").iterdir()) == sorted(
        f.name for f in of_step(run, 2).iterdir()
    )


@pytest.mark.parametrize("chats", [False, True])
def test_transformers_reads_what_is_exported(run: Path, tmp_path: Path, chats: bool) -> None:
    transformers: Any = pytest.importorskip("transformers")
    folder = of_step(run, 2)
    if chats:
        file = chat_tokenizer(folder / "tokenizer.json", ChatTemplate(CHATML), tmp_path / "cache")
        (folder / "tokenizer.json").write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").write_text(CHATML)
        checkpoint.seal(folder)
    out = tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    ours = load_tokenizer(out / "tokenizer.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == ours.encode(TEXT).ids
    end = "<|im_end|>" if chats else "<|endoftext|>"
    assert tokenizer.eos_token == end
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.generation_config.eos_token_id[0] == ours.token_to_id(end)
    rows = torch.tensor([ids])
    with torch.no_grad():
        expected = CausalLM.from_pretrained(folder).eval()(rows).logits
        torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    if chats:
        messages = [{"role": "user", "content": "hello"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_export_in_another_dtype(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert main(["export", str(run), str(out), "--dtype", "bfloat16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    weight = CausalLM.from_pretrained(out).embed_tokens.weight
    whole = CausalLM.from_pretrained(of_step(run, 2)).embed_tokens.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, whole.bfloat16())
