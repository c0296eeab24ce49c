"""Defaults < TOML < flags; names that nobody knows; the run's own file at resume."""

from pathlib import Path

import pytest

from tilewright_train.config import PretrainConfig, with_options
from tilewright_train.errors import InputError
from tilewright_train.layers import find_run, parse, read_toml, write_toml


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_flags_lie_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = toml(tmp_path, "[training]\nsteps = 7\nlr = 1\n[data]\ndata = 'x.txt'\n")
    config = parse(["--config", str(path), "--steps", "9"])
    assert config.training.steps == 9
    assert config.training.lr == 1.0
    assert isinstance(config.training.lr, float)
    assert config.training.beta2 == PretrainConfig().training.beta2
    assert config.data.data == (str(Path("x.txt").absolute()),)


def test_several_sources_have_their_weights(tmp_path: Path) -> None:
    path = toml(tmp_path, "data = ['stdlib', 'x.txt']\nweights = [1, 2.5]\n")
    config = parse(["--config", str(path)])
    assert config.data.data == ("stdlib", str(Path("x.txt").absolute()))
    assert config.data.weights == (1.0, 2.5)
    config = parse(["--data", "stories", "stdlib", "--weights", "3", "1", "--steps", "2"])
    assert config.data.data == ("stories", "stdlib")
    assert config.data.weights == (3.0, 1.0)
    write_toml(config, path, {})
    assert read_toml(path) == config


def test_keys_may_stand_above_all_sections(tmp_path: Path) -> None:
    config = read_toml(toml(tmp_path, "steps = 7\ndata = 'x.txt'\nout = 'here'\n"))
    assert (config.training.steps, config.data.data, config.run.out) == (
        7,
        ("x.txt",),
        Path("here"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstepz = 7", r"unknown key 'stepz' \(did you mean 'steps'\?\)"),
        ("[trainin]\nsteps = 7", r"unknown section \[trainin\] \(did you mean 'training'\?\)"),
        ("[model]\nsteps = 7", r"'steps' belongs in \[training\], not in \[model\]"),
        ("steps = '7'", "steps = '7' is a str, not a int"),
        ("steps = true", "steps = True is a bool, not a int"),
        ("data = ['x', 3]", "data = 3 is a int, not a str"),
        ("data = ['x', 'x']", "data 'x' is given twice: use --weights"),
        ("weights = [1, 2]", "2 weights for 1 sources: give --weights one number for each"),
        ("weights = [0]", "weight 0 is out of range: it must be above 0 and finite"),
        ("on_bad_line = 3", "on_bad_line = 3 is a int, not a str"),
        ("on_bad_line = 'stop'", "on_bad_line 'stop' is none of error, skip"),
        ("steps = 0", "steps 0 is out of range"),
        ("steps 7", "is not TOML"),
        ("resume = 'auto'", "'resume' is not for a file: use the flag --resume$"),
        ("[run]\nresume_from_older = true", "'resume_from_older' .* the flag --resume-from-older$"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_toml(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seqlen", "4"], r"unknown flag '--seqlen' \(did you mean '--seq-len'\?\)"),
        (["--stepz=4"], r"unknown flag '--stepz' \(did you mean '--steps'\?\)"),
        (["--no-determinism"], "unknown flag '--no-determinism'"),
        (["extra"], "unexpected argument 'extra'"),
        (["--steps", "x"], "--steps: 'x' is not a whole number"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--steps", "0"], "^steps 0 is out of range: it must be at least 1$"),
        (["--precision", "fp8"], "invalid choice 'fp8' for argument '--precision'"),
        (["--config", "no.toml"], "no.toml does not exist"),
    ],
)
def test_a_bad_flag_is_one_error(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_a_written_file_asks_for_the_same_again(tmp_path: Path) -> None:
    config = with_options(
        PretrainConfig(), steps=7, lr=1e-05, prompt='say "é"\n\\', out=Path("a b"), preset="nano",
        data=("/data/x.jsonl", "stdlib"), deterministic=False,
    )  # fmt: skip
    path = tmp_path / "config.toml"
    write_toml(config, path, {"steps": "because"})
    assert read_toml(path) == config
    assert "steps = 7  # because\n" in path.read_text()


@pytest.mark.parametrize(
    "text",
    ["😀", "\x7f\x00\x1b\x85\u2028\ufeff", "\U0010ffff\ue000", "a\r\nb\tc", '\'"""\'\\u0041#', ""],
)
def test_any_text_comes_back_from_the_file(tmp_path: Path, text: str) -> None:
    folder = a_run(tmp_path, "one", prompt=text, data=(f"/data/x{text}",))
    config = parse(["--resume", str(folder)])
    assert config.run.prompt == text
    assert read_toml(folder / "config.toml").data.data == (f"/data/x{text}",)


@pytest.mark.parametrize("flag", ["--data", "--out", "--prompt"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, flag: str) -> None:
    name = flag.strip("-")
    with pytest.raises(InputError, match=rf"^{name} .*\\udcff.* is not UTF-8"):
        parse([flag, "x\udcff"])
    with pytest.raises(InputError, match="is not UTF-8"):
        write_toml(with_options(PretrainConfig(), prompt="\ud83d\ude00"), tmp_path / "x.toml", {})


def test_help_is_quick_because_torch_is_not_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from tilewright_train.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--data", "--preset", "--resume", "Tokens a sequence"):
        assert word in done.stdout


def a_run(out: Path, name: str, **values: object) -> Path:
    folder = out / name
    folder.mkdir(parents=True)
    write_toml(with_options(PretrainConfig(), **values), folder / "config.toml", {})
    return folder


def test_resume_takes_the_runs_own_options(tmp_path: Path) -> None:
    folder = a_run(tmp_path, "one", steps=7, seed=3)
    config = parse(["--resume", str(folder), "--keep", "9"])
    assert (config.training.steps, config.training.seed, config.run.keep) == (7, 3, 9)
    assert config.run.resume == str(folder)


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "latest"], ["--resume", "auto"]])
def test_a_bare_resume_takes_the_run_that_was_written_last(
    tmp_path: Path, words: list[str]
) -> None:
    import os

    first, second = a_run(tmp_path, "one", steps=1), a_run(tmp_path, "two", steps=2)
    os.utime(second / "config.toml", (1, 1))
    assert parse([*words, "--out", str(tmp_path)]).training.steps == 1
    (second / "metrics.jsonl").touch()
    os.utime(first / "config.toml", (2, 2))
    assert find_run("auto", tmp_path) == second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.5"], "--lr cannot change when .* is resumed"),
        (["--steps", "8", "--seed", "1"], "--steps, --seed cannot change"),
        (["--config", "x.toml"], "--config and --resume exclude each other"),
    ],
)
def test_resume_refuses_what_would_change_the_numbers(
    tmp_path: Path, words: list[str], message: str
) -> None:
    folder = a_run(tmp_path, "one", steps=7)
    with pytest.raises(InputError, match=message):
        parse(["--resume", str(folder), *words])


def test_resume_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume in"):
        parse(["--resume", "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"is no run: it holds no config\.toml"):
        parse(["--resume", str(tmp_path)])


def test_auto_starts_a_run_or_goes_on_with_it_by_the_same_command(tmp_path: Path) -> None:
    """What torchrun does after a failure: the whole command again, a file of options among it."""
    file = tmp_path / "asked.toml"
    file.write_text('steps = 7\ndata = "texts"\n')
    words = [
        "--config",
        str(file),
        "--lr",
        "0.5",
        "--beta2",
        "0.9",
        "--out",
        str(tmp_path),
        "--resume",
        "auto",
    ]
    assert parse(words).run.resume == "never"
    assert parse([*words, "--name", "mine"]).run.resume == "never"
    data = (str(Path("texts").absolute()),)
    other = a_run(tmp_path, "other", steps=7, data=data, lr=0.5, beta2=0.9, batch_size=3)
    assert parse(words).run.resume == str(other)
    assert parse(words).training.batch_size == 3
    # By its name, whichever was written last.
    assert parse([*words, "--name", "mine"]).run.resume == "never"
    file.write_text("steps = 8\ndata = 'texts'\n")
    with pytest.raises(InputError, match=r"--steps cannot change when .*other is resumed"):
        parse(words)


def test_a_command_that_names_its_beginning_in_other_words_goes_on(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    folder = a_run(tmp_path, "one", objective="sft", data=("stories",), init=str(begun))
    for init in ("auto", str(begun)):
        config = parse(["--init", init, "--resume", str(folder)], "sft")
        assert config.model.init == str(begun)
    with pytest.raises(InputError, match="--init cannot change"):
        parse(["--init", str(tmp_path / "else"), "--resume", str(folder)], "sft")
