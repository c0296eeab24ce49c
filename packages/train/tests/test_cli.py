"""Every mistake that a user can make: one line on stderr, exit status 2, nothing lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright_train.cli import main
from tilewright_train.metrics import read_metrics


def without(flags: list[str], *names: str) -> list[str]:
    """`flags` but these, each with its value."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for name, value in pairs if name not in names for word in (name, value)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "no/such/file.txt"], "no/such/file.txt does not exist: give --data a file"),
        (["--hidden-size", "33"], "hidden_size 33 is not a multiple of num_attention_heads 2"),
        (["--preset", "nanoo"], "no preset 'nanoo' (did you mean 'nano'?): choose one of nano"),
        (["--backend", "trition"], "'trition' is not a backend; choose from auto, triton, torch"),
        (["--backend", "auto,rms_nrm=torch"], "'rms_nrm' is not an operator (did you mean"),
        (["--device", "cuda:77"], "device 'cuda:77' is not there: --device takes one of cpu"),
        (["--device", "tpu"], "device 'tpu' is not supported: --device takes one of cpu"),
        (["--out", "/proc/runs"], "/proc/runs cannot be written ("),
        (["--stepz", "3"], "unknown flag '--stepz' (did you mean '--steps'?)"),
        (["--seq-len", "100000"], "fewer than one sequence of 100000: give --data more text"),
        (["--weights", "1", "2"], "2 weights for 1 sources: give --weights one number for each"),
        (
            ["--data", "stdlib", "stdlib"],
            "data 'stdlib' is given twice: use --weights for a larger",
        ),
        (
            ["--data", "stdlib", "stories", "--weights", "1", "5000"],
            "less than a thousandth of all",
        ),
        (
            ["--micro-batch-size", "3"],
            "does not divide the 4 rows of a process: use one of 1, 2, 4",
        ),
        (["--resume", "/no/run"], "/no/run is no run: it holds no config.toml"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert main([*without(tiny_flags, words[0]), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "corpus.jsonl is empty: give --data something to read"),
        ('{"text": "x"}\n{"text": 1}\n', 'corpus.jsonl:2 has a "text" that is not a string'),
        ('{"text": "x"}\n\n{"txt": "x"}\n', 'corpus.jsonl:3 has no "text" (its keys: txt)'),
        ("{]\n", "corpus.jsonl:1 is not JSON"),
        ('{"messages": []}\n', "(its keys: messages; train-sft reads its"),
        ('{"text": "a\0b"}\n', "corpus.jsonl:1 is not JSON (Invalid control character"),
        ('{"text": ""}\n', "the corpus holds no text"),
    ],
)
def test_bad_data_is_named_and_no_run_is_begun(
    tiny_flags: list[str],
    corpus_file: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    corpus_file.write_text(text)
    assert main(tiny_flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    out = Path(tiny_flags[tiny_flags.index("--out") + 1])
    assert not out.exists() or not list(out.iterdir())


def test_bad_lines_can_be_skipped_and_are_reported(
    tiny_flags: list[str], corpus_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus_file.write_text("{]\n" + corpus_file.read_text() + '{"txt": 1}\n')
    assert main([*tiny_flags, "--on-bad-line", "skip", "--steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"skipped      2 lines: {corpus_file}:1 is not JSON" in printed
    assert f'{corpus_file}:302 has no "text"' in printed


def test_a_full_disk_in_the_middle_keeps_what_is_written(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewright_train import checkpoint

    seal = checkpoint.seal

    def full(folder: Path) -> None:
        if folder.name == ".step-000008.partial":
            raise OSError(28, os.strerror(28), str(folder / "MANIFEST.json"))
        seal(folder)

    monkeypatch.setattr(checkpoint, "seal", full)
    assert main(tiny_flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    out = Path(tiny_flags[tiny_flags.index("--out") + 1])
    (run,) = out.glob("corpus-nano-*")
    assert line.startswith(f"error: {run / 'checkpoints'} cannot be written")
    assert line.endswith(f"make room, then go on with --resume {run}")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000004"]
    # It is written beside the training, which hears of it at the next checkpoint.
    assert (run / "metrics.jsonl").read_text().count("\n") in range(9, 14)
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0


def test_the_command_ends_with_the_status_and_without_a_traceback(tiny_flags: list[str]) -> None:
    """And knows the optimizers' operators, whose package is imported later otherwise."""
    backend = "auto,adamw=torch,rms_nrm=torch"
    bad = subprocess.run(
        [sys.executable, "-m", "tilewright_train", *tiny_flags, "--backend", backend],
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("error: 'rms_nrm' is not an operator (did you mean 'rms_norm'?)")
    assert "adamw" in bad.stderr


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ("tritn", [], "TILEWRIGHT_BACKEND='tritn' is not a backend"),
        ("foo=torch", ["--backend", "torch"], "TILEWRIGHT_BACKEND: 'foo' is not an operator"),
        (" triton", [], "backend triton needs a CUDA device"),
        ("rms_norm=triton", ["--backend", "swiglu=torch"], "backend triton needs a CUDA device"),
    ],
)
def test_a_bad_environment_is_an_error_like_any_other(
    tiny_flags: list[str], environment: str, words: list[str], message: str
) -> None:
    bad = subprocess.run(
        [sys.executable, "-m", "tilewright_train", *tiny_flags, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"TILEWRIGHT_BACKEND": environment, "TRITON_INTERPRET": "0"},
    )
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("error: ")
    assert message in bad.stderr


@pytest.mark.parametrize(
    ("where", "begun"),
    [("preparation.open_source", False), ("pretraining.make_reporter", False),
     ("loop.TrainingLoop.run", True)],
)  # fmt: skip
def test_an_interrupted_run_is_named_once_it_has_begun(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    begun: bool,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    out = Path(tiny_flags[tiny_flags.index("--out") + 1])
    (out / "earlier").mkdir(parents=True)
    (out / "earlier" / "config.toml").touch()
    monkeypatch.setattr(f"tilewright_train.{where}", interrupt)
    assert main(tiny_flags) == 130
    run = out / "corpus-nano-001"
    assert run.exists() == begun
    go_on = f"; go on from what is saved with: train-pretrain --resume {run}" if begun else ""
    assert capsys.readouterr().err == f"interrupted{go_on}\n"
    if begun:
        assert main(["--resume", str(run)]) == 130
        assert capsys.readouterr().err == f"interrupted{go_on}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "begun"),
    [("preparation.prepare_corpus", False), ("preparation.build", True),
     ("pretraining.try_first_batch", True), ("pretraining.sample_text", True)],
)  # fmt: skip
def test_a_signal_before_the_first_step_ends_with_a_line_and_loses_nothing(
    tiny_flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    begun: bool,
    number: signal.Signals,
) -> None:
    # A shell without job control has what it starts in the background ignore Ctrl-C.
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with monkeypatch.context() as patched:
            what = f"tilewright_train.{where}"
            patched.setattr(what, lambda *_, **__: signal.raise_signal(number))
            assert main(tiny_flags) == 128 + number
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    run = Path(tiny_flags[tiny_flags.index("--out") + 1]) / "corpus-nano-001"
    assert run.exists() == begun
    words = "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted"
    go_on = f"; go on from what is saved with: train-pretrain --resume {run}" if begun else ""
    assert said == f"{words}{go_on}\n"
    assert main(["--resume", str(run)] if begun else tiny_flags) == 0
    assert [r.step for r in read_metrics(run / "metrics.jsonl")] == list(range(13))


def test_a_terminated_command_exits_with_143(tiny_flags: list[str]) -> None:
    flags = [*without(tiny_flags, "--steps"), "--steps", "100000"]
    command = [sys.executable, "-m", "tilewright_train", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()  # the choices: torch is loaded, no step is done
        process.terminate()
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said.splitlines()[-1].startswith("stopped ")


def test_a_reader_that_goes_away_is_no_error(
    tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("tilewright_train.progress.PlainReporter.say", gone)
    assert main(tiny_flags) == 141
