"""What a training run can be told: five groups of options, checked when they are made.

An option that is None is chosen by the run, which prints the choice with its reason
(`automatic.py`). Every option is a flag (`seq_len` is `--seq-len`) and a key of the TOML file,
in the section that is named in `SECTIONS`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from tilewright_train.errors import InputError, suggest

STDLIB = "stdlib"
STORIES = "stories"

Objective = Literal["pretrain", "sft", "dpo"]
"""Predict every token of texts; predict the assistant's tokens of conversations; prefer the chosen
completion of pairs."""

PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "robust"]
"""Of DPO; the formulas are in `dpo.py`."""

REFERENCE_START, REFERENCE_EMA = "start", "ema"

Parallel = Literal["ddp", "zero1", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read and how it becomes tokens."""

    data: tuple[str, ...] = (STDLIB,)
    """One source or several: «stdlib» (the Python standard library beside the interpreter),
    «stories» (a grammar of small stories), a file or a folder: .jsonl, .parquet, plain text; the
    first and last also as .gz or .zst."""
    weights: tuple[float, ...] = ()
    """Share of the rows that each source gives, up to a factor. Default: as large as they are."""
    on_bad_line: Literal["error", "skip"] = "error"
    """A line or row that is no record: stop there, or skip and count it."""
    validation_fraction: float = 0.05
    """Share of the documents that is kept for validation, 0 to 0.5."""
    vocab_size: int | None = None
    """Entries of the byte-level BPE vocabulary, 257 or more."""
    tokenizer: Path | None = None
    """A tokenizer.json, the folder that holds one, as train-tokenizer writes it, or a run. Default:
    that of --init, else one is trained on the data."""
    cache_dir: Path | None = None
    """Where tokenizers and encoded corpora are kept. Default: $XDG_CACHE_HOME/tilewright or
    ~/.cache/tilewright."""
    packing: Literal["concat", "best_fit", "none"] = "concat"
    """What shares a row: windows of the joined documents; whole documents that fit together; one
    document a row, padded."""
    document_mask: Literal["auto", "on", "off"] = "auto"
    """With «concat»: whether attention and positions stay within a document, as they do in other
    packings."""
    workers: int | None = None
    """Processes that read and pack batches."""
    prefetch: int = 2
    """Batches that each worker has ready."""
    chat_template: Path | None = None
    """With SFT: a Jinja file that turns a conversation into text and marks the assistant's part by
    {% generation %}. Default: that of --init, else ChatML."""
    pin_memory: bool = True
    """Batches go to the GPU from page-locked memory, while it computes."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, "validation_fraction", above=0.0, at_most=0.5)
        _check_range(self, "vocab_size", at_least=257)
        _check_range(self, "workers", at_least=0)
        _check_range(self, "prefetch", at_least=1)
        if isinstance(self.data, str):
            raise InputError(
                f"data {self.data!r} is one text: give a tuple, as in ({self.data!r},)"
            )
        if not self.data or not all(self.data):
            raise InputError(f"data is empty: give a path, {STDLIB!r} or {STORIES!r}")
        if twice := sorted({data for data in self.data if self.data.count(data) > 1}):
            raise InputError(f"data {twice[0]!r} is given twice: use --weights for a larger share")
        if self.weights and len(self.weights) != len(self.data):
            raise InputError(
                f"{len(self.weights)} weights for {len(self.data)} sources: give --weights one"
                " number for each"
            )
        for weight in self.weights:
            if not (0 < weight < math.inf):
                raise InputError(
                    f"weight {weight:g} is out of range: it must be above 0 and finite"
                )
        if self.weights and 1000 * min(self.weights) < sum(self.weights):
            raise InputError(
                f"weight {min(self.weights):g} is less than a thousandth of all: give that source a"
                " larger --weights, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The size of the model: a preset, and fields of it to change."""

    init: str = "scratch"
    """Where weights and tokenizer come from: «scratch», the folder of a finished run, a checkpoint
    or a model in Hugging Face's layout, or «auto» for the latest pretraining in --out. The other
    options of the model are then those of that one. «scratch» is random weights and a vocabulary
    of the data, or --tokenizer."""
    preset: str | None = None
    """A row of the table of presets in tilewright_model."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Blocks."""
    num_attention_heads: int | None = None
    """Query heads; they divide hidden_size."""
    num_key_value_heads: int | None = None
    """Key and value heads; they divide the query heads."""
    head_dim: int | None = None
    """Width of a head, even. Default: hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Width of the SwiGLU layer."""

    def __post_init__(self) -> None:
        for name in self.overrides:
            _check_range(self, name, at_least=1)

    @property
    def overrides(self) -> dict[str, int]:
        """The fields of the preset that were given, by their name in ModelConfig."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in given.items() if k not in ("init", "preset") and v is not None}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a step is, and how many there are."""

    steps: int | None = None
    """Optimizer updates."""
    batch_size: int | None = None
    """Sequences a step, all processes together."""
    micro_batch_size: int | None = None
    """Sequences that a process computes together; the gradients of a step's parts are summed."""
    seq_len: int | None = None
    """Tokens a sequence."""
    optim: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW, or MuonW, which is Muon for hidden matrices and AdamW for the rest."""
    lr: float | None = None
    """Highest learning rate, reached after the warm-up. Muon bears higher ones than AdamW."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the highest; a cosine leads there."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are not decayed."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    on_spike: Literal["keep", "skip"] = "keep"
    """A loss or norm further above the mean of the last 128 steps than six of their standard
    deviations: update all the same, or leave the update out."""
    max_skipped: int = 10
    """Updates in a row that may be left out, for spikes or because loss or gradients are not
    finite; the run then stops."""
    seed: int = 0
    """Seeds weights, order of the data and the sample; less than 2**63."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_skipped"):
            _check_range(self, name, at_least=1)
        _check_choices(self)
        _check_range(self, "seq_len", at_least=2)
        _check_range(self, "lr", above=0.0)
        _check_range(self, "min_lr_ratio", at_least=0.0, at_most=1.0)
        for name in ("warmup_steps", "weight_decay"):
            _check_range(self, name, at_least=0)
        _check_range(self, "seed", at_least=0, at_most=2**63 - 1)
        for name in ("beta1", "beta2"):
            _check_range(self, name, at_least=0.0, below=1.0)
        _check_range(self, "max_grad_norm", above=0.0)


@dataclass(frozen=True, kw_only=True)
class DpoOptions:
    """What train-dpo makes of a pair."""

    loss: PreferenceLoss = "sigmoid"
    """Of the margin by which chosen gains on rejected."""
    beta: float = 0.1
    """How much a step away from the reference counts; smaller lets the policy go further."""
    label_smoothing: float = 0.0
    """Share of the pairs whose labels are taken to be wrong, below 0.5: with «sigmoid» that is
    cDPO, with «robust» its unbiased form."""
    reference: str = REFERENCE_START
    """What the policy is compared with: «start», the model that it begins with; «ema», a moving
    average of the policy; or the folder of another run or model with the same tokenizer."""
    ema_decay: float = 0.99
    """With «ema»: share of the average that a step keeps."""
    precompute: bool = False
    """Compute the reference's log-probabilities of all pairs first, and keep them in the cache."""
    reference_free: bool = False
    """The loss takes the reference to find everything equally likely; rewards do not."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, "beta", above=0.0)
        _check_range(self, "label_smoothing", at_least=0.0, below=0.5)
        _check_range(self, "ema_decay", at_least=0.0, below=1.0)
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise InputError(
                f"label_smoothing {self.label_smoothing:g} has no meaning for the loss"
                f" {self.loss!r}: use --loss sigmoid or robust, or leave it out"
            )
        if self.precompute and self.reference == REFERENCE_EMA:
            raise InputError(
                "precompute needs a reference that stays: use --reference start or a folder"
            )
        if not self.reference:
            raise InputError("reference is empty: give «start», «ema» or a folder")


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What computes, and in which arithmetic."""

    device: str | None = None
    """«cpu», «cuda» or «cuda:1». Default: the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "bf16-weights", "fp16"] = "auto"
    """Arithmetic of the matrix products. Weights are float32 but for «bf16-weights», where they are
    bf16 and the optimizer keeps 16 more bits of each; «fp16» scales the loss."""
    tf32: bool = False
    """With fp32: products of GPUs take the tensor cores, which read 10 bits of each mantissa."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: the inside of every MLP, every block."""
    compile: bool = False
    """Compile each block with torch.compile; the first steps take longer."""
    backend: str | None = None
    """«auto», «triton» or «torch» for the operators of tilewright_kernels; single ones differently
    as in «triton,rms_norm=torch». Default: what TILEWRIGHT_BACKEND says, else auto."""
    threads: int | None = None
    """CPU threads of a process."""
    deterministic: bool = True
    """Only algorithms that give the same bits every time, which resuming bit for bit needs."""
    parallel: Parallel = "ddp"
    """What the processes of torchrun divide: the batch alone («ddp»); the optimizer's states as
    well («zero1»), which takes less memory and as much time; or weights and gradients as well
    («fsdp»), which takes least memory and gathers the weights twice a step."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, "threads", at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the run learns, where it is written, how often, and how it goes on."""

    objective: Objective = "pretrain"
    """«pretrain»: all tokens of texts; «sft»: the assistant's tokens of conversations; «dpo»: the
    better one of two completions."""
    out: Path = Path("runs")
    """Folder in which every run gets a folder of its own."""
    name: str | None = None
    """Name of the run's folder. Default: corpus, preset and the next free number."""
    resume: str = "never"
    """Go on with a run: its folder; «latest» (as does the bare flag) for the latest in --out;
    «auto» for that called --name, or the latest, and to start one where there is none."""
    resume_from_older: bool = False
    """With --resume or --init: where the newest checkpoint is damaged, take an older whole one."""
    accept_changed_data: bool = False
    """With --resume: go on although the data are not those that the run began with."""
    save_every: int | None = None
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints that are kept; older ones are removed."""
    keep_every: int | None = None
    """Checkpoints of multiples of so many steps are kept as well."""
    async_save: bool = True
    """A thread writes checkpoints while the training goes on; it takes memory on the host for a
    copy of weights and optimizer states."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written, on a full disk say: end the run there, or say it and go
    on to the next one. The last one has to be written. Older ones stay whole in any case."""
    eval_every: int | None = None
    """Steps between measurements of the validation loss."""
    eval_tokens: int | None = None
    """Tokens of the validation loss, the same ones every time."""
    log_every: int | None = None
    """Steps between lines where the output is not a terminal."""
    sample_every: int | None = None
    """Steps between samples; there is always one at the end."""
    prompt: str | None = None
    """Beginning of the samples."""
    sample_tokens: int = 160
    """Tokens of the sample."""
    profile: str | None = None
    """Steps to profile, as in 10:13 for 10, 11 and 12: trace and tables go to profile/."""
    memory_snapshot: bool = False
    """Record the GPU's allocations of the third and fourth step: snapshot and summary go to
    memory/."""
    grad_norms_every: int | None = None
    """Steps between norms of the gradients by layer, which go to grad_norms.jsonl."""
    tensorboard: bool = False
    """Write metrics as TensorBoard's events as well, to tensorboard/."""
    tasks: int = 200
    """With SFT on stories: held-out tasks of either kind that are answered before and after."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in (
            *("save_every", "keep", "keep_every", "eval_every", "log_every", "sample_tokens"),
            *("tasks", "sample_every", "grad_norms_every"),
        ):
            _check_range(self, name, at_least=1)
        _check_range(self, "eval_tokens", at_least=2)
        _range_of_steps(self.profile)
        if self.name is not None and not re.fullmatch(r"[^/\\.][^/\\]*", self.name):
            raise InputError(
                f"name {self.name!r} is not the name of a folder: use --out for a path, and no dot"
                " at the beginning"
            )

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first step to profile, and the one behind the last."""
        return _range_of_steps(self.profile)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that a command can be told. With nothing told, it trains all the same."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    dpo: DpoOptions = field(default_factory=DpoOptions)
    machine: MachineOptions = field(default_factory=MachineOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def command(self) -> str:
        """What starts such a run and goes on with it."""
        return f"train-{self.run.objective}"


SECTIONS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
    "dpo": DpoOptions,
    "machine": MachineOptions,
    "run": RunOptions,
}
"""Sections of the TOML file, in the order in which they are written."""


def defaults(objective: Objective) -> PretrainConfig:
    """What a run of this objective takes where nothing is given."""
    if objective == "pretrain":
        return PretrainConfig()
    return PretrainConfig(
        data=DataOptions(data=(STORIES,), packing="best_fit" if objective == "sft" else "none"),
        model=ModelOptions(init="auto"),
        run=RunOptions(objective=objective),
    )


FREE_AT_RESUME = frozenset(
    {"cache_dir", "out", "name", "resume", "resume_from_older", "accept_changed_data"}
    # How a step is divided: only the order of sums follows from it, as from the processes' number.
    | {"micro_batch_size", "parallel"}
    | {
        "prompt",
        "sample_tokens",
        "save_every",
        "keep",
        "keep_every",
        "async_save",
        "on_save_failure",
        "eval_every",
        "log_every",
        "sample_every",
        "profile",
        "memory_snapshot",
        "grad_norms_every",
        "tensorboard",
        "max_skipped",
        "tasks",
        "workers",
        "prefetch",
        "pin_memory",
    }
)
"""Options that change what is written, not what is computed: a resumed run may set them anew."""


def learned_with(config: PretrainConfig) -> dict[str, Any]:
    """JSON: the options of model and training that no resumed run may set anew, by name."""
    groups = config.model, config.training
    values = {f.name: getattr(g, f.name) for g in groups for f in dataclasses.fields(g)}
    plain = (int, float, str, bool, type(None))
    return {
        name: value
        for name, value in values.items()
        if name not in FREE_AT_RESUME | {"init"} and isinstance(value, plain)
    }


def option_sections() -> dict[str, str]:
    """The section of every option, by the option's name; names are unique over all sections."""
    return {f.name: section for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


def with_options(config: PretrainConfig, **values: Any) -> PretrainConfig:
    """A copy of `config` with some options set, whatever section they are in.

    Raises:
        InputError: A name is no option, or a value is out of its range.
    """
    sections = option_sections()
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in sections:
            raise InputError(f"unknown option {name!r}{suggest(name, sections)}")
        groups.setdefault(sections[name], {})[name] = value
    changed = {s: dataclasses.replace(getattr(config, s), **v) for s, v in groups.items()}
    return dataclasses.replace(config, **changed)


def _range_of_steps(text: str | None) -> tuple[int, int] | None:
    """10 and 13 of «10:13»."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, end = map(int, match.groups()) if match else (0, 0)
    if not 0 < first < end:
        raise InputError(
            f"profile {text!r} is no range of steps: give it as in 10:13 for the steps 10, 11 and"
            " 12"
        )
    return first, end


def _check_choices(options: Any) -> None:
    """Every Literal field holds one of its values; TOML files do not go through a parser."""
    for name, hint in get_type_hints(type(options)).items():
        literals = [h for h in (hint, *get_args(hint)) if getattr(h, "__origin__", None) is Literal]
        choices = [c for literal in literals for c in get_args(literal)]
        value = getattr(options, name)
        if choices and value is not None and value not in choices:
            close = suggest(str(value), choices)
            raise InputError(f"{name} {value!r} is none of {', '.join(choices)}{close}")


def _check_range(
    options: Any,
    name: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """A number that is set is finite and lies between its bounds."""
    value = getattr(options, name)
    if value is None or (at_least <= value <= at_most and above < value < below):
        return
    finite = ["finite"] if isinstance(value, float) and not math.isfinite(value) else []
    bounds = [
        f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}"
        for word, bound in (
            ("at least", at_least), ("above", above), ("at most", at_most), ("below", below)
        )
        if math.isfinite(bound)
    ]  # fmt: skip
    raise InputError(f"{name} {value} is out of range: it must be {' and '.join(finite + bounds)}")
