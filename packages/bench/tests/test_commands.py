import json
import re
import tomllib
from pathlib import Path

import pytest

from tilewright_bench import commands, docs, roofline
from tilewright_bench.commands import COMMANDS, main

PLACE = dict.fromkeys(("driver", "cuda", "python", "torch", "triton"), "1.0")
MANIFEST = Path(__file__).parents[1] / "pyproject.toml"

BEFORE = {"bench_op[fwd-tilewright]": 2e-3, "bench_op[fwd-torch]": 4e-3}
AFTER = {"bench_op[fwd-tilewright]": 1e-3, "bench_op[fwd-torch]": 5e-3}


@pytest.fixture
def places(tmp_path, write_run, info):
    """A baseline and a newer run, and the options that say where they are."""
    infos = {"bench_op[fwd-tilewright]": info()}
    write_run(tmp_path / "baselines" / "zeroth.json", BEFORE, infos=infos)
    write_run(tmp_path / "storage" / "platform" / "0001_abc.json", AFTER, infos=infos)
    return [f"--storage={tmp_path / 'storage'}", f"--baselines={tmp_path / 'baselines'}"]


def test_each_command_is_a_program_too():
    scripts = tomllib.loads(MANIFEST.read_text())["project"]["scripts"]
    assert scripts == {
        f"bench-{name}": f"tilewright_bench.commands:{name}_main" for name in COMMANDS
    }
    assert all(callable(getattr(commands, f"{name}_main")) for name in COMMANDS)


def test_a_program_needs_no_name_of_a_command(places, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench-compare", "zeroth", *places])
    assert commands.compare_main() == 0
    assert "2 benchmarks compared" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "status"), [("20%", 1), ("0.2", 1), ("30%", 0)])
def test_compare_fails_on_what_got_slower(places, limit, status):
    assert main(["compare", "zeroth", "--fail", limit, *places]) == status
    assert main(["compare", "zeroth", "1", "-k", "tilewright", "--fail=0", *places]) == 0


@pytest.mark.parametrize("limit", ["slow", "-5%", "%"])
def test_a_limit_that_is_no_share_is_refused(places, capsys, limit):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "zeroth", f"--fail={limit}", *places])
    assert exit_.value.code == 2
    assert f"invalid share value: '{limit}'" in capsys.readouterr().err


def test_the_newest_run_is_saved_and_shown(places, tmp_path, capsys):
    assert main(["save", "first", *places]) == 0
    assert json.loads((tmp_path / "baselines" / "first.json").read_text())["benchmarks"]
    assert main(["save", "second", "zeroth", "--operators", "rms_norm", *places]) == 0
    kept = json.loads((tmp_path / "baselines" / "second.json").read_text())["benchmarks"]
    assert [b["name"] for b in kept] == ["bench_op[fwd-tilewright]"]
    assert main(["show", "second", *places]) == 0
    assert re.search(r"rms_norm +16384x4096-bf16 +fwd +tilewright", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nope"], "'nope' is no baseline, .*: zeroth$"),
        (["compare", "zeroth", "nope"], "'nope' is no baseline"),
        (["compare", "1"], "would be compared with itself"),
        (["save", "a/b"], "'a/b' cannot name a baseline"),
        (["save", "a", "--operators", "softmax"], "measured no softmax"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_two(places, capsys, arguments, message):
    assert main([*arguments, *places]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error.rstrip())


def test_an_unknown_option_is_refused(places, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["save", "name", "--comit=abcdef0", *places])
    assert exit_.value.code == 2
    assert "--comit" in capsys.readouterr().err


def test_ceilings_are_drawn_again_from_their_file(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    svg = tmp_path / "roofline.svg"
    options = [places[1], "--device=zeroth", f"--svg={svg}"]
    assert main(["roofline", *options]) == 2
    assert "no CUDA device, and ceilings are those of a GPU" in capsys.readouterr().err
    assert main(["roofline", "--redraw", *options]) == 2
    assert "cannot be read" in capsys.readouterr().err
    saved = tmp_path / "baselines" / "roofline" / "zeroth.json"
    roofline.save(
        {
            "machine_info": {"gpu": "NVIDIA H200"},
            "copy_gb_per_s": {"1048576": 500.0, "4294967296": 4200.0},
            "l2_copy_gb_per_s": 8000.0,
            "matmul_tflop_per_s": {"bf16": 700.0, "fp32": 50.0},
        },
        saved,
    )
    assert main(["roofline", "--redraw", *options]) == 0
    assert "memory 4200 GB/s" in svg.read_text()


def test_ceilings_are_those_of_the_device_that_is_named(places, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    assert main(["roofline", places[1]]) == 2
    assert "this GPU is a NVIDIA A100, no 'h200'" in capsys.readouterr().err
    place = {**PLACE, "gpu": "NVIDIA A100"}
    monkeypatch.setattr(commands, "describe", lambda: place)
    monkeypatch.setattr(commands, "get_commit_info", lambda: {"id": "0123456789", "dirty": True})
    assert main(["roofline", "--device=a100", places[1]]) == 2
    assert "measured uncommitted changes" in capsys.readouterr().err


def test_nothing_is_saved_outside_the_workspace(places, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere" / "baselines"
    run = str(next((tmp_path / "storage").rglob("*.json")))
    assert main(["save", "first", run, f"--baselines={elsewhere}"]) == 2
    assert "run from the workspace's root" in capsys.readouterr().err
    assert not elsewhere.parent.exists()


def test_pages_are_written_and_checked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(docs, "stale", lambda root, device: [f"{root}/a.md:3: differs"])
    assert main(["docs", "--check", f"--root={tmp_path}"]) == 1
    assert "a.md:3: differs\nstale; make them anew with: bench-docs" in capsys.readouterr().out
    monkeypatch.setattr(docs, "stale", lambda root, device: [])
    assert main(["docs", "--check"]) == 0
    monkeypatch.setattr(docs, "update", lambda root, device: [root / "docs" / "a.md"])
    assert main(["docs", f"--root={tmp_path}"]) == 0
    assert "1 files changed" in capsys.readouterr().out


def test_a_machine_without_matplotlib_is_told(monkeypatch, capsys):
    def without(module):
        def update(root, device):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        return update

    monkeypatch.setattr(docs, "update", without("matplotlib.figure"))
    assert main(["docs"]) == 2
    assert capsys.readouterr().err == f"error: {commands.NO_MATPLOTLIB}\n"
    monkeypatch.setattr(docs, "update", without("tilewright_kernels"))
    with pytest.raises(ModuleNotFoundError, match="tilewright_kernels"):
        main(["docs"])
