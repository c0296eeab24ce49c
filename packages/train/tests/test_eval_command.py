"""train-eval: figures against sums that are written out here, and what it refuses."""

import io
import json
import math
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM
from tilewright_train.conversations import tokenize
from tilewright_train.eval_command import EvalOptions, Figures, main, measure
from tilewright_train.layers import parse
from tilewright_train.pretraining import run
from tilewright_train.records import Message
from tilewright_train.start import find_start
from tilewright_train.token_bytes import token_bytes
from tilewright_train.tokenizer import end_token, load_tokenizer, train_tokenizer
from tilewright_train.trained import ModelChoice, opened

TALK = [Message("user", "the cat"), Message("assistant", "sat")]
TEXTS = ["the cat sat", "on a mat é", "red \U0001f600", "today the red cat sat on a mat " * 5]


def options(tmp_path: Path, folder: Path, **more: object) -> EvalOptions:
    given = {"model": str(folder), "device": "cpu", "cache_dir": tmp_path / "cache", **more}
    return EvalOptions(**given)  # pyrefly: ignore


def figures(tmp_path: Path, folder: Path, **more: object) -> Figures:
    (measured,) = measure(options(tmp_path, folder, **more), lambda line: None)
    return measured


def nats(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """-ln p of every token but the first, in float64, from logits."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        log_probs = model.double()(ids).logits.log_softmax(-1)
    return -log_probs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("packing", ["auto", "none"])
def test_loss_and_bits_per_byte_of_texts(tmp_path: Path, model_folder: Path, packing: str) -> None:
    """Of whole documents, longer ones in pieces that overlap by a token; ends are predicted."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    measured = figures(tmp_path, model_folder, data=(str(path),), seq_len=24, packing=packing)
    model = CausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = load_tokenizer(model_folder / "tokenizer.json")
    end = end_token(tokenizer)
    parts = []
    for text in TEXTS:
        tokens = [end, *tokenizer.encode(text).ids, end]
        parts += [nats(model, tokens[i : i + 24]) for i in range(0, len(tokens) - 1, 23)]
    total = torch.cat(parts)
    assert measured.predictions == total.numel()
    assert measured.bytes == sum(len(text.encode()) for text in TEXTS)
    assert measured.loss == pytest.approx(float(total.mean()), rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(float(total.mean())), rel=1e-5)
    expected = float(total.sum()) / math.log(2) / measured.bytes
    assert measured.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_of_conversations_the_assistants_part_counts(tmp_path: Path, model_folder: Path) -> None:
    talks = [
        [Message("user", "the cat"), Message("assistant", "sat")],
        [Message("user", "on"), Message("assistant", "a mat"), Message("user", "x " * 90)],
        [Message("user", "today")],
    ]
    path = tmp_path / "talks.jsonl"
    lines = ({"messages": [m._asdict() for m in talk]} for talk in talks)
    path.write_text("\n".join(map(json.dumps, lines)))
    said: list[str] = []
    (measured,) = measure(
        options(tmp_path, model_folder, data=(str(path),), seq_len=40), said.append
    )
    assert "skipped      1 without assistant" in said
    assert "cut off      1 records behind 40 tokens" in said
    with opened(ModelChoice(model=str(model_folder), device="cpu"), cast=False) as trained:
        assert trained.template is not None
        encoded = tokenize(trained.tokenizer, trained.template, talks[:2])
    model = CausalLM.from_pretrained(model_folder, dtype=torch.float64)
    parts = [
        nats(model, tokens[:40])[torch.tensor(targets[1:40]).bool()] for tokens, targets in encoded
    ]
    total = torch.cat(parts)
    assert (measured.kind, measured.predictions) == ("conversation", total.numel())
    assert measured.loss == pytest.approx(float(total.mean()), rel=1e-5)
    assert measured.bytes == len("sat") + len("a mat")


def test_the_latest_run_is_measured_on_what_it_left_out(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the windows that the run itself validates on give its own validation loss."""
    corpus = Path(tiny_flags[tiny_flags.index("--data") + 1])
    corpus.write_text("no record\n" + corpus.read_text())  # which the run skips
    flags = [*tiny_flags, "--steps", "3", "--eval-tokens", "100000", "--on-bad-line", "skip"]
    folder = run(parse(flags), io.StringIO())
    entries = sorted((tmp_path / "cache").iterdir())
    words = ["--out", str(folder.parent), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"]
    file = tmp_path / "figures.json"
    assert main([*words, "--json", str(file)]) == 0
    assert sorted((tmp_path / "cache").iterdir()) == entries
    assert main([*words, "--on-bad-line", "error"]) == 2
    printed = capsys.readouterr().out
    assert f"skipped      1 lines: {corpus}:1 is not JSON" in printed
    assert f"model        {folder}/checkpoints/step-000003" in printed
    assert "bits per byte" in printed
    (source,) = json.loads(file.read_text())["sources"]
    summary = json.loads((folder / "summary.json").read_text())
    assert source["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert source["predictions"] == summary["val_predictions"]
    # A checkpoint of it, all of a file, as many predictions as were asked for.
    saved = str(folder / "checkpoints" / "step-000003")
    (whole,) = measure(
        EvalOptions(
            model=saved, data=(str(corpus),), device="cpu", on_bad_line="skip",
            cache_dir=tmp_path / "cache", max_tokens=500,
        ),
        lambda line: None,
    )  # fmt: skip
    assert 450 < whole.predictions <= 500


def test_a_model_of_transformers_has_the_loss_that_transformers_computes(tmp_path: Path) -> None:
    """Saved by them, tokenizer and template too."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "theirs"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXTS * 3, 300), eos_token="<|endoftext|>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(folder)
    shape = transformers.Qwen3Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(shape).eval()
    theirs.save_pretrained(folder)
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0])
    measured = figures(tmp_path, folder, data=(str(path),))
    end = fast.eos_token_id
    ids = torch.tensor([[end, *fast(TEXTS[0])["input_ids"], end]])
    with torch.no_grad():
        expected = float(theirs(ids, labels=ids).loss)
    assert measured.predictions == ids.numel() - 1
    assert measured.loss == pytest.approx(expected, rel=1e-5)
    talks = tmp_path / "talks.jsonl"
    talks.write_text(json.dumps({"messages": [m._asdict() for m in TALK]}) + "\n")
    measured = figures(tmp_path, folder, data=(str(talks),))
    assert measured.kind == "conversation"
    prompt, answer = (fast(m.content)["input_ids"] for m in TALK)
    ids = torch.tensor([[*prompt, end, *answer, end]])
    labels = ids.clone()
    labels[:, : len(prompt) + 1] = -100
    with torch.no_grad():
        expected = float(theirs(ids, labels=labels).loss)
    assert measured.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_compute_in_bf16_what_the_cpu_does(
    tmp_path: Path, model_folder: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    words = {"data": (str(path),), "seq_len": 64}
    on_cpu = figures(tmp_path, model_folder, **words)
    on_gpu = figures(tmp_path, model_folder, **words, device="cuda")
    assert on_gpu.predictions == on_cpu.predictions
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=2e-3)


def test_mistakes_are_one_line(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks, texts = tmp_path / "talks.jsonl", tmp_path / "texts.txt"
    talks.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    texts.write_text("the cat sat\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = ["--model", str(model_folder), "--device", "cpu", "--cache-dir", str(tmp_path / "c")]

    def said(*more: str) -> str:
        assert main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    assert "is of no run here: give --data" in said()
    assert f"no run in {tmp_path} has saved a checkpoint" in said(
        "--model", "auto", "--out", str(tmp_path)
    )
    assert "holds no model: give the folder of a run" in said("--model", str(tmp_path))
    assert "is read as plain text, which holds no conversation" in said(
        "--data", str(texts), "--kind", "conversation"
    )
    assert "there is anything to predict" in said("--data", str(talks))
    assert "pairs holds pairs: train-eval reads texts" in said("--data", str(pairs))
    assert "seq_len 200 is more than the model's 160 positions" in said(
        "--data", str(texts), "--seq-len", "200"
    )
    assert "seq_len 1 is out of range: it must be at least 2" in said("--seq-len", "1")
    assert "no is no folder: give --json" in said("--json", str(tmp_path / "no" / "x.json"))
    assert "'tritn' is not a backend" in said("--data", str(texts), "--backend", "tritn")
    assert "unknown flag '--dataa' (did you mean '--data'?)" in said("--dataa", "x")
    assert "device 'tpu' is not supported" in said("--device", "tpu")
    texts.write_text("")
    assert "is empty: give --data something to read" in said("--data", str(texts))
    (model_folder / "tokenizer_config.json").write_text("{}")
    assert "has no chat template: give --kind text" in said("--data", str(talks))
    (model_folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json cannot be read" in said("--data", str(talks))


def test_bytes_of_tokens_add_up_to_those_of_the_text() -> None:
    byte_level = train_tokenizer(TEXTS * 3, 300)
    sizes = token_bytes(byte_level, 310)
    assert sizes.numel() == 310
    assert int(sizes[byte_level.token_to_id("<|endoftext|>")]) == 0
    for text in TEXTS:
        assert int(sizes[byte_level.encode(text).ids].sum()) == len(text.encode())
    assert int(sizes[byte_level.get_vocab_size() :].sum()) == 0


def test_bytes_of_tokens_that_are_written_with_spaces_and_hexadecimal_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models

    vocab = {"▁the": 0, "é": 1, "<0x0A>": 2, "<s>": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<s>"])
    assert token_bytes(tokenizer, 6).tolist() == [4, 2, 1, 0, 1, 0]


def test_a_run_gives_its_newest_checkpoint(model_folder: Path) -> None:
    assert find_start(model_folder).folder == model_folder
