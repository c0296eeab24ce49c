"""Where options come from: defaults, then a TOML file, then flags (or, to resume, the run's file).

The parser is tyro over the dataclasses of `config.py`. What a user got wrong comes out as one
`InputError`; a name that nobody knows gets the closest one that exists.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tilewright_train.config import (
    FREE_AT_RESUME,
    REFERENCE_EMA,
    REFERENCE_START,
    SECTIONS,
    STDLIB,
    STORIES,
    Objective,
    PretrainConfig,
    RunOptions,
    defaults,
    option_sections,
    with_options,
)
from tilewright_train.errors import InputError, suggest
from tilewright_train.flags import flag, parse_flags
from tilewright_train.whole_files import write_whole

CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"
_MODEL_FILE = "config.json"

_FLAGS_ALONE = frozenset({"resume", "resume_from_older", "accept_changed_data"})
"""What to do with a run that is there; a file says what a run is."""

_DESCRIPTIONS: dict[Objective, str] = {
    "pretrain": """Pretrain a language model. With no argument it trains a small one on the Python
standard library and ends with a sample, a picture of the loss and the next command to try.""",
    "sft": """Teach a pretrained model to answer. With no argument it takes the latest pretraining
in --out and the built-in tasks, and prints how many of those held out it answers before and
after.""",
    "dpo": """Have a model prefer the better one of two completions. With no argument it takes the
latest run of train-sft in --out, else of train-pretrain, and built-in pairs, and prints how many of
those held out it gets right before and after.""",
}
_REST = """

An option that is not given takes its value from the TOML file (--config), else its default; where
the default is «auto» the run chooses and prints why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CommandLine(PretrainConfig):
    """The options, and the file that comes before them."""

    config: Path | None = None
    """A TOML file of options, such as the config.toml of an earlier run."""


def parse(arguments: Sequence[str], objective: Objective = "pretrain") -> PretrainConfig:
    """The configuration that `arguments` ask for.

    `--objective` among them changes the objective and with it the defaults. With `--init` the
    model's options are those of the run that is begun with.

    With `--resume` the run's own config.toml is the base, and only options that do not change
    what is computed may differ from it. `run.resume` of the result is the run's folder.

    Raises:
        InputError: An unknown flag or key, a value out of range, no run to resume.
        SystemExit: Status 0 after `--help`.
    """
    given = _parse_flags(arguments, default=_on_command_line(defaults(objective)))
    if given.run.objective != objective:
        return parse(arguments, given.run.objective)
    folder = _run_to_resume(given.run, objective)
    if folder is None:
        base = defaults(objective) if given.config is None else read_toml(given.config, objective)
        asked = _plain(_parse_flags(arguments, default=_on_command_line(base)))
        asked = with_options(asked, resume="never")
        if asked.model.init != "scratch":
            return _begun_with(asked, base)
        return asked
    if given.config is not None and given.run.resume != "auto":
        raise InputError("--config and --resume exclude each other: a run keeps its config.toml")
    base = with_options(read_toml(folder / CONFIG_FILE, objective), resume=str(folder))
    resumed = _plain(_parse_flags(arguments, default=_on_command_line(base)))
    resumed = with_options(resumed, resume=str(folder), init=_same_init(resumed, base))
    changed = [n for n in _different(base, resumed) if n not in FREE_AT_RESUME]
    if given.config is not None:
        from_file = _on_command_line(read_toml(given.config, objective))
        changed += _asked_otherwise(_plain(_parse_flags(arguments, from_file)), resumed)
    if changed:
        flags = ", ".join(flag(name) for name in changed)
        raise InputError(
            f"{flags} cannot change when {folder} is resumed: leave it out, or start a new run with"
            f" --config {folder / CONFIG_FILE}"
        )
    return resumed


def _run_to_resume(options: RunOptions, objective: Objective) -> Path | None:
    """The folder of the run to go on with; None to start one."""
    if options.resume == "never":
        return None
    if options.resume != "auto":
        return find_run(options.resume, options.out, objective)
    if options.name is None:
        return _latest(runs) if (runs := _runs(options.out, objective)) else None
    named = options.out / options.name
    return named if (named / CONFIG_FILE).is_file() else None


def _same_init(asked: PretrainConfig, run: PretrainConfig) -> str:
    """--init as the run has it, where a command that is given again says it in other words."""
    init, own = asked.model.init, run.model.init
    return own if init == "auto" or str(Path(init).absolute()) == own else init


def _asked_otherwise(asked: PretrainConfig, run: PretrainConfig) -> list[str]:
    """Options that are set, not left to the run, to something else than the run has."""
    asked = with_options(asked, init=_same_init(asked, run))
    return [
        name
        for name in _different(asked, run)
        if name not in FREE_AT_RESUME
        and getattr(getattr(asked, option_sections()[name]), name) not in (None, "auto")
    ]


def find_run(which: str, out: Path, objective: Objective = "pretrain") -> Path:
    """The folder of the run to resume.

    Args:
        which: A folder, or «latest» or «auto» for the run in `out` that was written last.
        out: The folder of all runs.
        objective: Of the latest run.
    """
    if which not in ("auto", "latest"):
        folder = Path(which)
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(
                f"{folder} is no run: it holds no {CONFIG_FILE}; give the folder that the run "
                f"printed, or --resume alone for the latest"
            )
        return folder
    runs = _runs(out, objective)
    if not runs:
        raise InputError(f"nothing to resume in {out}: start a run first, or give --out")
    return _latest(runs)


def _latest(runs: Sequence[Path]) -> Path:
    return max(runs, key=lambda run: max(file.stat().st_mtime_ns for file in run.iterdir()))


def _runs(out: Path, objective: Objective) -> list[Path]:
    """The runs of one objective; those that say nothing of theirs pretrain."""
    return [
        file.parent for file in out.glob(f"*/{CONFIG_FILE}") if _objective_in(file) == objective
    ]


def _objective_in(path: Path) -> Any:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "pretrain"
    run = tables.get("run")
    return run.get("objective", "pretrain") if isinstance(run, Mapping) else "pretrain"


def _begun_with(asked: PretrainConfig, base: PretrainConfig) -> PretrainConfig:
    """`asked` with the model and the vocabulary of the run that it begins with.

    Raises:
        InputError: No such run, one that is not finished, or flags that ask for another model.
    """
    out, init = asked.run.out, asked.model.init
    if init == "auto":
        before: tuple[Objective, ...] = ("pretrain",)
        if asked.run.objective == "dpo":  # answers first: they are what is to become better
            before = ("sft", "pretrain")
        by_objective = ([r for r in _runs(out, o) if (r / SUMMARY_FILE).exists()] for o in before)
        finished = next(filter(None, by_objective), [])
        if not finished:
            random = ", or «scratch» for random weights" if before == ("pretrain",) else ""
            raise InputError(
                f"no finished pretraining is in {out}: run train-pretrain first, or give --init the"
                f" folder of a run{random}"
            )
        folder = _latest(finished)
    else:
        folder = Path(init)
        is_run = (folder / CONFIG_FILE).is_file()
        if not is_run and (folder / _MODEL_FILE).is_file():
            return _begun_with_model(asked, base, folder)
        if not is_run or not (folder / SUMMARY_FILE).exists():
            raise InputError(
                f"--init {folder} is no finished run and no model: give the folder that a run"
                f" printed, one with a model in Hugging Face's layout ({_MODEL_FILE}), or «auto»"
                " for the latest pretraining in --out"
            )
    begun = read_toml(folder / CONFIG_FILE, None)
    _refuse_own_tokenizer(asked, folder)
    model = dataclasses.replace(begun.model, init=str(folder.absolute()))
    for name in (f.name for f in dataclasses.fields(model)):
        wanted = getattr(asked.model, name)
        if name != "init" and wanted not in (getattr(base.model, name), getattr(model, name)):
            raise InputError(f"{flag(name)} comes from the run of --init, {folder}: leave it out")
    if asked.data.vocab_size not in (base.data.vocab_size, begun.data.vocab_size):
        raise InputError(f"--vocab-size comes from the run of --init, {folder}: leave it out")
    asked = dataclasses.replace(asked, model=model)
    return with_options(asked, vocab_size=begun.data.vocab_size)


def _begun_with_model(asked: PretrainConfig, base: PretrainConfig, folder: Path) -> PretrainConfig:
    """`asked` with the place of a model that no run here has made; its config.json has the shape.

    Raises:
        InputError: Flags that ask for another model.
    """
    _refuse_own_tokenizer(asked, folder)
    sections = {"preset": "model", **dict.fromkeys(asked.model.overrides, "model")}
    for name, section in (sections | {"vocab_size": "data"}).items():
        given = getattr(getattr(asked, section), name)
        if given != getattr(getattr(base, section), name):
            raise InputError(f"{flag(name)} comes from the model of --init, {folder}: leave it out")
    return with_options(asked, init=str(folder.absolute()))


def _refuse_own_tokenizer(asked: PretrainConfig, folder: Path) -> None:
    if asked.data.tokenizer is not None:
        raise InputError(f"--tokenizer comes from the model of --init, {folder}: leave it out")


def read_toml(path: Path, objective: Objective | None = "pretrain") -> PretrainConfig:
    """The configuration in a TOML file, over the defaults.

    Args:
        path: The file.
        objective: What it must be for, where it says so; None for whatever it says.

    A key stands in its section, or above all sections.

    Raises:
        InputError: No such file, no TOML, an unknown section or key, a key that is a flag alone, a
            value of the wrong type.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    sections = option_sections()
    values: dict[str, Any] = {}
    for key, value in tables.items():
        # «data» is a section and an option: a table is the first, anything else the second.
        inner = value if isinstance(value, Mapping) else {key: value}
        if isinstance(value, Mapping) and key not in SECTIONS:
            raise InputError(f"{path}: unknown section [{key}]{suggest(key, SECTIONS)}")
        for name, given in inner.items():
            if name not in sections:
                raise InputError(f"{path}: unknown key {name!r}{suggest(name, sections)}")
            if name in _FLAGS_ALONE:
                raise InputError(f"{path}: {name!r} is not for a file: use the flag {flag(name)}")
            if inner is value and sections[name] != key:
                raise InputError(f"{path}: {name!r} belongs in [{sections[name]}], not in [{key}]")
            values[name] = _typed(path, name, given)
    wanted = values.get("objective", objective or "pretrain")
    if objective not in (None, wanted):
        raise InputError(f"{path} is of train-{wanted}: use that command")
    try:
        known = wanted in get_args(Objective)  # another one is refused with the other values
        return with_options(defaults(wanted if known else "pretrain"), **values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_toml(config: PretrainConfig, path: Path, reasons: Mapping[str, str]) -> None:
    """Write every option that is set, so that `--config path` asks for the same again.

    Args:
        config: The options; None is left out, and so is what names or resumes one run.
        path: The file to write.
        reasons: For an option that was chosen automatically: why.

    Raises:
        InputError: Text that is not Unicode.
    """
    lines = [f"# The options of one run; `{config.command} --config` on this file starts it again."]
    for section in SECTIONS:
        options = getattr(config, section)
        if section == "dpo" and config.run.objective != "dpo":
            continue
        lines += ["", f"[{section}]"]
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value is None or field.name in _FLAGS_ALONE | {"name"}:
                continue
            why = f"  # {reasons[field.name]}" if field.name in reasons else ""
            lines.append(f"{field.name} = {_toml_value(field.name, value)}{why}")
    write_whole(path, "\n".join(lines) + "\n")


def _parse_flags(arguments: Sequence[str], default: _CommandLine) -> _CommandLine:
    return parse_flags(
        default,
        _with_bare_resume(arguments),
        prog=default.command,
        description=_DESCRIPTIONS[default.run.objective] + _REST,
        names=(*option_sections(), "config"),
    )


def _with_bare_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` without a value means `--resume latest`."""
    words: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        words.append(word)
        if word == "--resume" and following.startswith("--"):
            words.append("latest")
    return words


def _typed(path: Path, name: str, value: Any) -> Any:
    """`value` in the type of option `name`: whole numbers are numbers, text may be a path."""
    hint = get_type_hints(SECTIONS[option_sections()[name]])[name]
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_item(path, name, item, get_args(hint)[0]) for item in items)
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if float in kinds and type(value) is int:
        return float(value)
    literal = not [kind for kind in kinds if kind is not type(None)]
    if type(value) in (kinds if not literal else [str]):
        return value
    wanted = "str" if literal else next(k.__name__ for k in kinds if k is not type(None))
    raise InputError(f"{path}: {name} = {value!r} is a {type(value).__name__}, not a {wanted}")


def _item(path: Path, name: str, value: Any, kind: type) -> Any:
    """One value of an option that takes several."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise InputError(
        f"{path}: {name} = {value!r} is a {type(value).__name__}, not a {kind.__name__}"
    )


def _toml_value(name: str, value: Any) -> str:
    """A TOML value; JSON's strings, numbers and booleans are TOML's, but for U+007F.

    TOML has no pairs of surrogates, so what is not ASCII stands as it is.
    """
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
    if re.search("[\ud800-\udfff]", text):  # from the bytes of a file name or an argument
        raise InputError(f"{name} {str(value)!r} is not UTF-8 and cannot be written to a file")
    return text.replace("\x7f", "\\u007f")


def _different(first: PretrainConfig, second: PretrainConfig) -> list[str]:
    """Names of the options whose values differ."""
    return [
        name
        for name, section in option_sections().items()
        if getattr(getattr(first, section), name) != getattr(getattr(second, section), name)
    ]


def _sections_of(config: PretrainConfig) -> dict[str, Any]:
    return {section: getattr(config, section) for section in SECTIONS}


def _on_command_line(config: PretrainConfig) -> _CommandLine:
    return _CommandLine(**_sections_of(config))


def _plain(config: _CommandLine) -> PretrainConfig:
    """Without the file; paths of data absolute, so that a run can be resumed from anywhere."""
    built_in = (STDLIB, STORIES)
    absolute = tuple(d if d in built_in else str(Path(d).absolute()) for d in config.data.data)
    template, tokenizer = config.data.chat_template, config.data.tokenizer
    reference = config.dpo.reference
    if reference not in (REFERENCE_START, REFERENCE_EMA):
        reference = str(Path(reference).absolute())
    plain = with_options(
        PretrainConfig(**_sections_of(config)),
        data=absolute,
        chat_template=template.absolute() if template else None,
        tokenizer=tokenizer.absolute() if tokenizer else None,
        reference=reference,
    )
    for name, section in option_sections().items():
        _toml_value(name, getattr(getattr(plain, section), name))  # before any folder is made
    return plain
