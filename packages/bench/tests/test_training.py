"""What is said of recorded training: tables beside their bars, and the plot of losses."""

import copy
import json

import pytest

from tilewright_bench.docs import NOT_MEASURED, stale, update
from tilewright_bench.pages import PageError
from tilewright_bench.saved import BASELINES
from tilewright_bench.training import ITEMS, load
from tilewright_bench.training_curves import losses

GIB = 2**30


def run(case, rate, **values):
    return {
        "case": case,
        "flags": f"--batch-size 8 --seq-len 1024 --case {case}",
        "steps": 20,
        "rows": 8,
        "seq_len": 1024,
        "micro_batch_size": 8,
        "precision": "bf16",
        "tokens_per_second": rate,
        "peak_bytes": 12 * GIB,
        "planned_bytes": 13 * GIB,
        "mfu": 0.4,
        "skipped_steps": 0,
        "loss_scale": None,
        "val_loss": {"0": 10.0, "20": 5.0},
    } | values


def curve(shift):
    return [10.0 - i / 10 + shift for i in range(20)]


RECORD = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "abc",
    "command": "train-pretrain",
    "base": "--preset 0.5b",
    "corpus": "a corpus",
    "precision": [
        run("bf16", 100_000.0, losses=curve(0.01)),
        run("fp16", 90_000.0, losses=curve(0.02), loss_scale=32768.0, skipped_steps=1),
        run("fp32 with TF32", 50_000.0, losses=curve(0.0)),
    ],
    "backends": [
        run("triton", 100_000.0, losses=curve(0.0)),
        run("torch", 40_000.0, losses=curve(0.003)),
    ],
    "accumulation": [
        run("16 rows at once", 100_000.0),
        run("4 times 4 rows", 80_000.0, micro_batch_size=4),
    ],
    "options": [
        run("as it is", 100_000.0),
        {"case": "--compile", "flags": "", "error": "it broke"},
    ],
    "saving": [
        run("without", 1.0, step_seconds=[1.0] * 10 + [0.1] * 100, steps=110),
        run(
            "with",
            1.0,
            steps=210,
            flags="--save-every 100",
            step_seconds=[1.0] * 10 + [0.1] * 90 + [1.1] + [0.1] * 99 + [0.3] + [0.1] * 9,
            saving={
                "checkpoints": 3,
                "steps_waited": 1.4,
                "steps_slower": 0.1,
                "steps_beside_writing": 40,
                "waited_for_last": 4.0,
                "loop_seconds": 30.0,
            },
        ),
    ],
    "looked at": [
        run(
            "looked at",
            1.0,
            profile="steps 6 to 7\nrange  ms/step\nmlp  2\nkernel  ms/step\n"
            + "".join(f"k{i}\n" for i in range(20)),
            memory="12 GiB\nlayers 3\n",
        )
    ],
    "kills": {
        "flags": "--preset 26m",
        "runs": {
            "killed-1": {
                "what": {"killed_at_step": 7, "checkpoints": [], "during_a_save": False},
                "equal_curve": True,
                "other_files": [],
            },
            "killed-2": {
                "what": {"killed_at_step": 9, "checkpoints": [], "during_a_save": True},
                "equal_curve": False,
                "other_files": ["model.safetensors"],
            },
        },
    },
    "parallel": [
        {
            "gpu": "NVIDIA H200",
            "gpus": 2,
            "torch": "2.11.0",
            "commit": "abc",
            "command": "torchrun",
            "base": "--preset 0.5b",
            "runs": [
                run("1 GPU", 100_000.0, gpus=1, peak_bytes=[12 * GIB]),
                run("zero1", 180_000.0, gpus=2, peak_bytes=[9 * GIB, 10 * GIB]),
                {"case": "fsdp", "error": "it broke"},
            ],
        }
    ],
}


def test_precisions_stand_with_speed_memory_and_losses():
    table = ITEMS["precision"](RECORD)
    assert "| fp16 | 90,000 | 40 % | 12.00 (13.00) | 1 of 20 | 2^15 | 5.0000 |" in table
    assert "Steps of 8 × 1024 tokens." in table


def test_backends_are_compared_step_by_step():
    text = ITEMS["backends"](RECORD)
    assert "| torch | 40,000 | 12.00 | 5.0000 | 0.40× |" in text
    assert "Over 20 steps the two training losses are 0.0030 apart at most" in text


def test_options_stand_against_the_first_and_say_what_failed():
    assert "| 4 times 4 rows | 4 of 8 | 80,000 | 0.80× | 12.00 (13.00) |" in ITEMS["accumulation"](
        RECORD
    )
    assert "| `--compile` | it broke |" in ITEMS["options"](RECORD)


def test_saving_stands_beside_its_bar():
    text = ITEMS["saving"](RECORD)
    assert "| 110 steps without saving | 0.1000 |" in text
    assert "| 210 steps, `--save-every 100` | 0.1060 |" in text
    assert "| lost to saving (at most 5 %: no) | 6.0 % |" in text
    assert "took 0.30 and 1.10 s" in text
    assert "counts 5.0 % of its loop" in text
    quicker = copy.deepcopy(RECORD)
    quicker["saving"][1]["step_seconds"][100] = 0.3
    assert "at most 5 %: yes" in ITEMS["saving"](quicker)


def test_killed_runs_say_what_is_equal():
    text = ITEMS["kills"](RECORD)
    assert "| 7 | no | equal, bit for bit | equal |" in text
    assert "| 9 | yes | differ | differ: model.safetensors |" in text


def test_a_profile_is_cut_after_its_top_kernels():
    text = ITEMS["profile"](RECORD)
    assert "mlp  2" in text
    assert "\nk11\n…\n```" in text
    assert ITEMS["memory"](RECORD) == "```\n12 GiB\nlayers 3\n```"


def test_several_gpus_are_compared_with_one():
    text = ITEMS["parallel"](RECORD)
    assert "| 1 |  | 100,000 |  | 12.00 (13.00) |" in text
    assert "| 2 | zero1 | 180,000 | 90 % | 10.00 (13.00) |" in text
    assert "| 2 | fsdp | it broke |" in text


def test_losses_are_drawn_as_means_and_as_differences():
    drawn = losses(RECORD)
    assert drawn is not None
    shown, apart, backends = drawn.panels
    assert shown.lines[0].points[0] == (5.5, 9.56)
    assert [(line.label, line.points[1]) for line in apart.lines] == [
        ("bf16", (15.5, pytest.approx(0.01))),
        ("fp16", (15.5, pytest.approx(0.02))),
    ]
    assert [line.dashes for line in backends.lines] == [False, True]


@pytest.fixture
def root(tmp_path, write_run, info):
    """A workspace with one benchmark's baseline."""
    write_run(tmp_path / BASELINES / "h200-norms.json", {"a": 1e-4}, infos={"a": info()})
    (tmp_path / "packages/bench/benchmarks").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# none\n")
    return tmp_path


def test_a_page_gets_what_was_measured_and_says_what_was_not(root):
    items = " ".join(("losses", *ITEMS))
    page = root / "docs" / "page.md"
    page.write_text(f"<!-- bench-docs training: {items} -->\n<!-- /bench-docs -->\n")
    update(root, "h200")
    assert page.read_text().count(NOT_MEASURED) == len(ITEMS) + 1
    folder = root / BASELINES / "training"
    folder.mkdir()
    one = {name: found for name, found in RECORD.items() if name != "parallel"}
    (folder / "h200-training.json").write_text(json.dumps(one))
    (folder / "h200-x2-training.json").write_text(json.dumps(RECORD["parallel"][0]))
    assert update(root, "h200") == [page, root / "docs/images/training_losses.svg"]
    text = page.read_text()
    assert text.count(NOT_MEASURED) == 2  # profiles that were not made
    assert "![Training losses by precision and backend](images/training_losses.svg)" in text
    assert "One NVIDIA H200 (driver 580.1), torch 2.11.0" in text
    assert load(root, "h200")["parallel"][0]["gpus"] == 2
    assert stale(root, "h200") == []


def test_an_unknown_item_is_named(root):
    page = root / "docs" / "page.md"
    page.write_text("<!-- bench-docs training: speed -->\n<!-- /bench-docs -->\n")
    with pytest.raises(PageError, match="'speed' is none of losses, precision"):
        update(root, "h200")
