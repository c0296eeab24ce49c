"""DPO on the one loop: what it begins with and compares with, what it logs, what it refuses."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tilewright_model import CausalLM
from tilewright_train import reference
from tilewright_train.cli import main
from tilewright_train.layers import parse
from tilewright_train.metrics import Record, read_metrics
from tilewright_train.pretraining import run
from tilewright_train.stories import preference

TRL = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip

LONGER = (
    "--steps",
    "50",
    "--eval-tokens",
    "2000",
    "--lr",
    "0.03",
    "--eval-every",
    "50",
    "--save-every",
    "50",
)
"""Until the preference is learned."""


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """300 pairs of one request and two answers, of which the one that repeats is to be preferred;
    every hundredth has equal sides.
    """
    path = tmp_path / "pairs.jsonl"
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "today"]
    lines = []
    for n in range(300):
        word, other = words[n % 8], words[(n + 3) % 8]
        rejected = f"{word} {other}" if n % 100 else f"{word} {word}"
        sides = {"chosen": f"{word} {word}", "rejected": rejected}
        record = {s: [{"role": "assistant", "content": text}] for s, text in sides.items()}
        lines.append(json.dumps({"prompt": f"say {word} {n}", **record}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining of a second."""
    folder = tmp_path_factory.mktemp("pretrained")
    texts = [f"the cat sat on a red mat today, say {n}" for n in range(300)]
    data = folder / "corpus.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = {
        "--vocab-size": 300, "--hidden-size": 32, "--num-hidden-layers": 1,
        "--num-attention-heads": 2, "--num-key-value-heads": 1, "--intermediate-size": 64,
        "--seq-len": 16, "--batch-size": 4, "--steps": 12, "--lr": 0.01, "--threads": 1,
        "--device": "cpu", "--eval-tokens": 200, "--sample-tokens": 8, "--data": data,
        "--out": folder / "runs", "--cache-dir": folder / "cache",
    }  # fmt: skip
    flags = [str(word) for pair in sizes.items() for word in pair]
    return run(parse(flags), io.StringIO())


@pytest.fixture
def pretrained(trained_once: Path, tmp_path: Path) -> Path:
    """The same, in the folder of this test's runs."""
    return Path(shutil.copytree(trained_once, tmp_path / "runs" / trained_once.name))


@pytest.fixture
def dpo_flags(tiny_flags: list[str], pairs_file: Path) -> list[str]:
    own = ("--data", "--vocab-size", "--hidden-size", "--num-hidden-layers", "--intermediate-size",
           "--num-attention-heads", "--num-key-value-heads", "--seq-len")  # fmt: skip
    pairs = list(zip(tiny_flags[::2], tiny_flags[1::2], strict=True))
    kept = [word for name, value in pairs if name not in own for word in (name, value)]
    return [*kept, "--data", str(pairs_file), "--seq-len", "48", "--tasks", "2"]


def train(flags: list[str], *more: str) -> tuple[Path, str]:
    printed = io.StringIO()
    return run(parse([*flags, *more], "dpo"), printed), printed.getvalue()


def records(folder: Path) -> list[Record]:
    return read_metrics(folder / "metrics.jsonl")


def numbers(folder: Path, *, but_for: str = "none") -> list[float]:
    """Losses and metrics of all steps."""
    made: list[float] = []
    for r in records(folder):
        made += [r.loss or 0.0, r.val_loss or 0.0]
        made += [value for name, value in r.metrics.items() if but_for not in name]
    return made


def test_it_begins_at_ln_2_learns_and_logs_what_trl_logs(
    pretrained: Path, dpo_flags: list[str]
) -> None:
    before = {f: f.read_bytes() for f in pretrained.rglob("*") if f.is_file()}
    folder, printed = train(dpo_flags, *LONGER)
    assert folder.name == "pairs-nano-dpo-001"
    made = records(folder)
    assert made[0].val_loss == pytest.approx(0.693147, abs=1e-6)
    assert made[1].loss == pytest.approx(0.693147, abs=1e-6)
    assert made[0].metrics["val_rewards/accuracies"] == 0
    assert made[1].metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
    last = made[-1]
    assert last.val_loss is not None
    assert last.val_loss < 0.5
    assert last.metrics["val_rewards/accuracies"] > 0.8
    assert set(TRL) < set(last.metrics)
    raw = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {raw[name] for name in TRL} == {last.metrics[name] for name in TRL}
    margin = last.metrics["rewards/chosen"] - last.metrics["rewards/rejected"]
    assert last.metrics["rewards/margins"] == pytest.approx(margin, abs=1e-6)
    assert "step  0/50  val loss 0.6931  (ln 2 = 0.6931)" in printed
    assert "; 3 with equal sides, kept" in printed
    after = json.loads((folder / "summary.json").read_text())["validation_after"]
    assert after["logps/accuracies"] == last.metrics["val_logps/accuracies"]
    # The run that it began with, which is the reference, is what it was.
    assert before == {f: f.read_bytes() for f in pretrained.rglob("*") if f.is_file()}
    assert (folder / "report" / "loss.png").exists()


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_micro_batches_of_any_size_give_the_same_run(
    packing: str, pretrained: Path, dpo_flags: list[str]
) -> None:
    flags = [*dpo_flags, "--packing", packing, "--steps", "3", "--eval-every", "3"]
    # Whether a margin of about zero is above it, rounding decides.
    whole = numbers(train(flags, "--micro-batch-size", "4")[0], but_for="accurac")
    for size in ("2", "1"):
        split = numbers(train(flags, "--micro-batch-size", size)[0], but_for="accurac")
        assert split == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_padded_and_joined_pairs_give_the_same_run(pretrained: Path, dpo_flags: list[str]) -> None:
    padded, joined = (
        numbers(train(dpo_flags, "--steps", "3", "--packing", packing)[0], but_for="accurac")
        for packing in ("none", "best_fit")
    )
    assert joined == pytest.approx(padded, rel=1e-4, abs=1e-5)


def test_known_log_probabilities_give_the_loss_of_the_model(
    pretrained: Path, dpo_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*dpo_flags, "--steps", "4"]
    expected = numbers(train(flags)[0])
    first, printed = train(flags, "--precompute")
    assert numbers(first) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "reference    log-probabilities in " in printed
    assert "since an earlier run" not in printed.split("reference ")[1].splitlines()[0]

    def never(*_: object) -> None:
        raise AssertionError("the reference is computed again")

    # The same data and model: nothing is computed, nor the model loaded, whatever else changes.
    monkeypatch.setattr(reference.FrozenReference, "log_probs", never)
    again, printed = train(flags, "--precompute", "--batch-size", "2")
    assert printed.split("reference ")[1].splitlines()[0].endswith("since an earlier run")
    assert records(again)[0].val_loss == records(first)[0].val_loss
    # Another length cuts other completions.
    with pytest.raises(AssertionError, match="computed again"):
        train(flags, "--precompute", "--seq-len", "40")


def precomputed(folder_and_printed: tuple[Path, str]) -> tuple[Path, bool]:
    """Where a run keeps log-probabilities, and whether an earlier one had computed them."""
    said = folder_and_printed[1].split("log-probabilities in ")[1].splitlines()[0]
    return Path(said.removesuffix(" since an earlier run")), said.endswith("since an earlier run")


def test_a_configuration_that_was_edited_makes_another_reference(
    pretrained: Path, dpo_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are the same bytes; log-probabilities kept of it before are not its own."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(pretrained / "checkpoints" / "step-000012", elsewhere)
    (elsewhere / "MANIFEST.json").unlink()
    flags = [*dpo_flags, "--steps", "2", "--reference", str(elsewhere)]
    assert not precomputed(train(flags, "--precompute"))[1]
    begun, _ = train(flags)
    described = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 100.0}))
    expected, _ = train(flags)
    after = train(flags, "--precompute")
    assert not precomputed(after)[1]
    assert numbers(after[0]) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)
    assert abs((records(after[0])[0].val_loss or 0) - 0.6931) > 1e-3
    # And a run that has begun with the one does not go on with the other.
    (begun / "summary.json").unlink()
    assert main(["--resume", str(begun)], "dpo") == 2
    assert "has changed since it began" in capsys.readouterr().err


def test_log_probabilities_are_kept_for_one_backend(pretrained: Path, dpo_flags: list[str]) -> None:
    flags = [*dpo_flags, "--steps", "1", "--precompute"]
    (one, _), (other, was_there) = (precomputed(train(flags, "--backend", b))
                                    for b in ("auto", "torch"))  # fmt: skip
    assert one != other
    assert not was_there
    assert precomputed(train(flags, "--backend", "torch")) == (other, True)


@pytest.mark.parametrize("file", ["train.log_probs.float32", "facts.json"])
def test_kept_log_probabilities_that_are_damaged_are_computed_again(
    file: str, pretrained: Path, dpo_flags: list[str]
) -> None:
    flags = [*dpo_flags, "--steps", "2", "--precompute"]
    first = train(flags)
    folder, _ = precomputed(first)
    kept = (folder / file).read_bytes()
    (folder / file).write_bytes(bytes(len(kept)))  # as long as it was
    again = train(flags)
    assert precomputed(again) == (folder, False)
    assert numbers(again[0]) == numbers(first[0])
    assert (folder / file).read_bytes() == kept


def test_the_reference_never_changes(
    pretrained: Path, dpo_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[reference.FrozenReference, str]] = []
    make = reference.FrozenReference.__init__

    def hashed(model: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def remembered(self: reference.FrozenReference, *given: object) -> None:
        make(self, *given)  # pyrefly: ignore
        kept.append((self, hashed(self.scorer)))

    monkeypatch.setattr(reference.FrozenReference, "__init__", remembered)
    folder, _ = train(dpo_flags, "--steps", "4")
    ((held, before),) = kept
    assert hashed(held.scorer) == before
    saved, learned = (
        CausalLM.from_pretrained(run / "checkpoints" / step).state_dict()
        for run, step in ((pretrained, "step-000012"), (folder, "step-000004"))
    )
    for name, weight in held.scorer.model.named_parameters():
        first = saved[name]  # the vocabulary has grown by ChatML's two tokens since
        assert torch.equal(weight[: len(first)], first), name
        assert not torch.equal(weight, learned[name]), name
    assert not any(p.requires_grad for p in held.scorer.parameters())
    assert not held.scorer.training


def test_a_moving_reference_is_the_average_and_is_resumed(
    pretrained: Path, dpo_flags: list[str]
) -> None:
    flags = [*dpo_flags, "--reference", "ema", "--ema-decay", "0.75", "--save-every", "1",
             "--steps", "3", "--keep", "3"]  # fmt: skip
    whole, _ = train(flags)
    name = "model.norm.weight"
    start = load_file(pretrained / "checkpoints" / "step-000012" / "model.safetensors")
    average = start[name].double()
    for step in (1, 2, 3):
        folder = whole / "checkpoints" / f"step-{step:06d}"
        policy = load_file(folder / "model.safetensors")[name]
        average = 0.75 * average + 0.25 * policy.double()
        held = load_file(folder / "reference.safetensors")["norm.weight"]
        torch.testing.assert_close(held.double(), average, rtol=1e-6, atol=1e-7)
    frozen, _ = train([*dpo_flags, "--steps", "3"])
    assert numbers(frozen)[-3:] != numbers(whole)[-3:]
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for done in ("step-000003", "step-000002"):
        shutil.rmtree(part / "checkpoints" / done)
    (part / "summary.json").unlink()
    train(["--resume", str(part)])
    assert numbers(part) == numbers(whole)


def test_another_run_may_be_the_reference(pretrained: Path, dpo_flags: list[str]) -> None:
    other, _ = train(dpo_flags, *LONGER)
    folder, _ = train(dpo_flags, "--steps", "2", "--reference", str(other))
    first = records(folder)[0]
    # The policy begins as the pretrained model: against a better one it is behind.
    assert first.val_loss is not None
    assert first.val_loss > 0.75
    assert first.metrics["val_rewards/accuracies"] < 0.5
    # A run of DPO whose reference has changed since does not go on.
    (folder / "summary.json").unlink()
    weights = other / "checkpoints" / "step-000050"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["reference"]["folder"] == str(weights)
    facts["reference"]["sha256"] = "0"
    (folder / "run.json").write_text(json.dumps(facts))
    assert main(["--resume", str(folder)], "dpo") == 2


@pytest.mark.parametrize(
    ("loss", "expected"), [("ipo", 25.0), ("hinge", 1.0), ("robust", 0.693147)]
)
def test_every_loss_begins_where_it_must(
    loss: str, expected: float, pretrained: Path, dpo_flags: list[str]
) -> None:
    smoothing = ("--label-smoothing", "0.1") if loss == "robust" else ()
    folder, _ = train(dpo_flags, "--steps", "2", "--loss", loss, *smoothing)
    made = records(folder)
    assert made[0].val_loss == pytest.approx(expected, rel=1e-5)
    assert made[-1].val_loss is not None
    assert made[-1].val_loss < expected


def test_a_run_is_resumed_bit_for_bit(pretrained: Path, dpo_flags: list[str]) -> None:
    whole, _ = train(dpo_flags)
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for done in ("step-000012", "step-000008"):
        shutil.rmtree(part / "checkpoints" / done)
    (part / "summary.json").unlink()
    train(["--resume", str(part)])
    assert numbers(part) == numbers(whole)


def test_stories_are_finished_before_and_after(
    pretrained: Path, dpo_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endings are the test's: two of four agree before training, three behind it."""
    chosen, rejected = (
        [getattr(preference("instances", n), side)[0].content for n in range(4)]
        for side in ("chosen", "rejected")
    )
    endings = [[*chosen[:2], *rejected[2:]], [*chosen[:3], "Who knows."]]
    prompts: list[list[str]] = []

    def answer(model: object, tokenizer: object, template: object, asked: list[Any], _: object):
        prompts.append([turns[0].content for turns in asked])
        return endings[len(prompts) - 1]

    monkeypatch.setattr("tilewright_train.preference_report.answer", answer)
    place = dpo_flags.index("--data")
    flags = [*dpo_flags[:place], *dpo_flags[place + 2 :], "--tasks", "4"]
    folder, printed = train(flags, "--data", "stories", "--steps", "1", "--seq-len", "160")
    asked = [preference("instances", n).prompt[0].content for n in range(4)]  # pyrefly: ignore
    assert prompts == [asked, asked]
    lines = [line for line in printed.splitlines() if line.startswith("endings")]
    assert [(line[13:18], line.rsplit("; ")[-1]) for line in lines] == [
        ("50.0%", "before training"), ("75.0%", "after training"),
    ]  # fmt: skip
    kept = json.loads((folder / "answers.json").read_text())
    assert kept["0"] == {"instances": 0.0, "templates": 0.0, "consistent_endings": 0.5}
    assert kept["1"]["consistent_endings"] == 0.75
    assert printed.count("exact match  0.0% of 4 held-out tasks") == 2
    assert "the chosen side is the likelier one in" in printed
    before = (folder / "samples" / "step-000000.txt").read_text().splitlines()[-3:]
    assert before == [
        f"{asked[0]}  →  {chosen[0]!r}", f"{asked[1]}  →  {chosen[1]!r}",
        f"{asked[2]}  →  {rejected[2]!r} (contradicts it)",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_on_a_gpu_the_kernels_give_the_cpus_run(
    packing: str, pretrained: Path, dpo_flags: list[str]
) -> None:
    flags = [*dpo_flags, "--steps", "3", "--packing", packing]
    on_cpu, _ = train(flags)
    place = flags.index("--device") + 1
    flags[place] = "cuda"
    on_gpu, _ = train(flags, "--precision", "fp32")
    assert records(on_gpu)[0].val_loss == pytest.approx(0.693147, abs=1e-6)
    exact, close = (numbers(folder, but_for="accurac") for folder in (on_cpu, on_gpu))
    # Rewards and margins of three steps are small: the tolerance is a fortieth of the largest.
    rewards = [v for r in records(on_cpu) for n, v in r.metrics.items() if "rewards/chosen" in n]
    assert max(map(abs, rewards)) > 0.08
    assert close == pytest.approx(exact, rel=2e-3, abs=2e-3)
    summary = json.loads((on_gpu / "summary.json").read_text())
    assert summary["backend"]["operators"]["linear_log_prob"]["triton"] > 0


def test_mistakes_are_one_line(
    pretrained: Path,
    dpo_flags: list[str],
    tiny_flags: list[str],
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*more: str, command: str = "dpo") -> str:
        capsys.readouterr()
        flags = dpo_flags if command == "dpo" else tiny_flags
        assert main([*flags, *more], command) == 2  # pyrefly: ignore
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "beta 0.0 is out of range: it must be above 0" in said("--beta", "0")
    assert "label_smoothing 0.5 is out of range" in said("--label-smoothing", "0.5")
    assert "has no meaning for the loss 'ipo'" in said("--loss", "ipo", "--label-smoothing", ".1")
    assert "--loss" in said("--loss", "sigmod")
    assert "a reference that stays" in said("--reference", "ema", "--precompute")
    assert "packing concat cuts pairs anywhere" in said("--packing", "concat")
    assert "train-dpo begins with a trained model" in said("--init", "scratch")
    assert "nowhere holds no model" in said("--reference", str(tmp_path / "nowhere"))
    assert "no pair has a completion within 4 tokens" in said("--seq-len", "4")
    assert "--beta is of train-dpo" in said("--beta", "0.2", command="pretrain")
    other = run(parse([*tiny_flags, "--vocab-size", "270"]), io.StringIO())
    assert "is not the policy's (token" in said(
        "--init", str(other), "--reference", str(pretrained)
    )
    good = pairs_file.read_text()
    for line, message in (
        ('{"prompt": "x", "chosen": "y"}', 'has no "chosen" and "rejected"'),
        ('{"messages": []}', 'train-sft reads its "messages"'),
        ('{"chosen": "y", "rejected": 1}', 'mixes text and messages ("chosen" a string'),
        ('{"chosen": [], "rejected": []}', "without a message"),
        ('{"chosen": [{"role": "bot", "content": "x"}], "rejected": []}', "unknown role 'bot'"),
    ):
        pairs_file.write_text(f"{good}{line}\n")
        assert message in said(), line
