"""The values that a user left open: what is chosen, and why.

Sizes and schedules come from a table of recipes, one row for each preset, so that a run depends on
its options alone and not on how fast the machine happens to be.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewright_model import ModelConfig, count_parameters, preset
from tilewright_train.config import STDLIB, PretrainConfig, option_sections, with_options
from tilewright_train.errors import InputError
from tilewright_train.hardware import Accelerator, accelerator_here
from tilewright_train.loading import choose_workers
from tilewright_train.machine import (
    available_cores,
    choose_device,
    choose_threads,
    supports_bf16,
)
from tilewright_train.memory_plan import StepShape, largest_micro_batch
from tilewright_train.start import saved_config
from tilewright_train.tokenizer import load_tokenizer, tokenizer_file, vocabulary_rows


@dataclass(frozen=True)
class Recipe:
    """A batch, a length and a learning rate that train one preset well."""

    batch_size: int
    seq_len: int
    steps: int
    lr: float
    warmup_steps: int


# nano: among 13 runs of about 70 s on two cores. Half the batch and twice the steps lower the loss
# at equal time by 0.19; vocabulary 2048 is 1.5 times as fast as 4096 and further below its bigram
# model (0.36 against 0.28); lr 3e-3 and 8e-3 are 0.04 and 0.07 worse than 5e-3. 400 steps leave
# room for a machine half as fast.
# 26m: 300, 400 and 600 steps end at 3.73, 3.54 and 3.39 (with a vocabulary of 16384); at 600 (7
# epochs of the standard library) the loss has begun to rise. lr 2e-3 is 0.24 worse than 1e-3.
# The others are not tuned: GPT-3's rates (Brown et al. 2020, arXiv:2005.14165), times the root of
# their smaller batch over GPT-3's.
RECIPES: Mapping[str, Recipe] = {
    "nano": Recipe(16, 128, 400, 5e-3, 50),
    "26m": Recipe(64, 512, 600, 1e-3, 60),
    "100m": Recipe(64, 1024, 2000, 3e-4, 200),
    "125m": Recipe(64, 1024, 2000, 3e-4, 200),
    "350m": Recipe(64, 2048, 4000, 2.5e-4, 400),
    "0.5b": Recipe(64, 2048, 5000, 2e-4, 500),
    "1.3b": Recipe(128, 2048, 10000, 1.5e-4, 1000),
    "2.7b": Recipe(256, 2048, 20000, 1.2e-4, 2000),
    "moe-nano": Recipe(16, 128, 400, 5e-3, 50),
    "moe-0.5b-a0.15b": Recipe(64, 2048, 5000, 2e-4, 500),
    "moe-7b-a1b": Recipe(256, 2048, 20000, 1.2e-4, 2000),
    "llama3-8b": Recipe(256, 4096, 20000, 1e-4, 2000),
    "qwen3-0.6b": Recipe(64, 2048, 5000, 2e-4, 500),
}

# SFT takes the recipe of its preset but for steps and rate: so many steps, this share of the rate.
# nano answers 85.5 % of held-out tasks after 500 steps and 87.5 % after 600, whose model also keeps
# writing whole sentences under DPO. Other rates and other presets have not been measured.
_SFT_STEPS, _SFT_RATE = 600, 0.6

# DPO: so many steps of so many pairs, this share of the rate. With nano and 600 steps of SFT before
# it the chosen side is the likelier one in 98.7 % of the held-out pairs, in 47.4 % before; after
# 500 steps of SFT half the rate gets 97.0 % and a fifth of it 94.4 % (docs/notes/alignment.md).
_DPO_STEPS, _DPO_PAIRS, _DPO_RATE, _DPO_WARMUP = 100, 32, 0.1, 10

# Tokens of packed rows that are computed together where plain torch masks them. nano on two cores:
# 16 rows of 128 tokens in 2,185 ms at once, in 228 ms four by four, in 289 ms one by one.
_MASKED = 512

_LARGE_CHECKPOINT = 500_000_000  # bytes; smaller ones are written in about a second


@dataclass(frozen=True)
class Choice:
    """One value that was chosen for the user."""

    name: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The options that may be left open, with what was given or chosen; see `config.py`."""

    device: str
    precision: str
    threads: int
    backend: str
    document_mask: str
    workers: int
    preset: str
    vocab_size: int
    steps: int
    batch_size: int
    micro_batch_size: int
    seq_len: int
    lr: float
    warmup_steps: int
    save_every: int
    eval_every: int
    eval_tokens: int
    log_every: int
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A configuration without open values."""

    config: PretrainConfig
    settled: Settled
    choices: tuple[Choice, ...]
    """In the order in which they are printed."""

    def step_shape(self, world_size: int) -> StepShape:
        """What each of so many processes computes in a step, for a plan of its memory."""
        settled, rows = self.settled, self.settled.micro_batch_size
        return StepShape(
            rows=rows,
            seq_len=settled.seq_len,
            precision=settled.precision,
            optim=self.config.training.optim,
            recompute=self.config.machine.recompute,
            parts=max(1, settled.batch_size // world_size // rows),
            parallel=self.config.machine.parallel,
            world_size=world_size,
            **_of_pairs(self.config),
        )

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by the name of the option."""
        return {choice.name: choice.reason for choice in self.choices}


def choose(
    config: PretrainConfig,
    *,
    local_processes: int = 1,
    accelerator: Accelerator | None = None,
) -> Chosen:
    """Fill in every option that is open.

    Args:
        config: What the user gave.
        local_processes: Processes of this run on this host.
        accelerator: Choose for this GPU, which need not be here; None for this machine.

    Raises:
        ValueError: A device, preset or shape of the model that does not exist; DPO of random
            weights; SFT or DPO of joined rows.
    """
    if config.run.objective != "pretrain":
        _check_tuning(config)
    _check_dpo(config)
    choices: list[Choice] = []

    def fill(name: str, section: str, value: Any, reason: str, unset: Any = None) -> Any:
        given = getattr(getattr(config, section), name)
        if given != unset:
            return given
        choices.append(Choice(name, value, reason))
        return value

    if accelerator is None:
        device = fill("device", "machine", *choose_device(config.machine.device))
    else:
        device = fill("device", "machine", "cuda", f"planned for {accelerator.name}")
    on_gpu = device != "cpu"
    precision = "bf16", f"{accelerator.name} multiplies bf16" if accelerator else ""
    precision = fill(
        "precision", "machine", *(precision if accelerator else _precision(device)), unset="auto"
    )
    fill("threads", "machine", *choose_threads(local_processes))
    backend = fill("backend", "machine", *_backend(on_gpu))
    mask = fill("document_mask", "data", *_document_mask(config, on_gpu, backend), unset="auto")
    fill("workers", "data", *choose_workers(device, available_cores() // local_processes))

    begun = saved_config(config.model.init)
    name = fill("preset", "model", *_preset(begun, on_gpu))
    model = begun or preset(name, **config.model.overrides)
    vocab_size = fill("vocab_size", "data", *_vocabulary(config, model, name))
    model = dataclasses.replace(model, vocab_size=vocab_size)

    recipe, of = RECIPES[name], f"the recipe of {name}"
    if config.run.objective == "sft":
        recipe, of = _sft_recipe(recipe), f"the SFT recipe of {name}"
    if config.run.objective == "dpo":
        recipe, of = _dpo_recipe(recipe), f"the DPO recipe of {name}"
    steps = fill("steps", "training", recipe.steps, of)
    batch_size = fill("batch_size", "training", recipe.batch_size, of)
    longest = begun.max_position_embeddings if begun else recipe.seq_len
    seq_len = fill("seq_len", "training", min(recipe.seq_len, longest), of)
    if begun and begun.position_embedding == "learned" and seq_len > longest:
        raise InputError(
            f"seq_len {seq_len} is more than the {longest} positions that the model of --init has"
            " learned: give a smaller --seq-len"
        )
    rows = max(1, batch_size // local_processes)
    packed = mask == "on" and config.data.packing != "none"
    together = _micro_batch(rows, seq_len, packed and not on_gpu)
    gpu = accelerator or (accelerator_here(torch.device(device)) if on_gpu else None)
    if gpu is not None:
        step = StepShape(
            rows=rows,
            seq_len=seq_len,
            precision=precision,
            optim=config.training.optim,
            recompute=config.machine.recompute,
            parallel=config.machine.parallel,
            world_size=local_processes,
            **_of_pairs(config),
        )
        together = _rows_that_fit(model, step, gpu)
    fill("micro_batch_size", "training", *together)
    fill("lr", "training", recipe.lr, of)
    warmup = min(recipe.warmup_steps, steps // 2)
    fill("warmup_steps", "training", warmup, f"{of}, at most half the steps")

    checkpoint = 12 * count_parameters(model).total
    times = 10 if checkpoint < _LARGE_CHECKPOINT else 2
    often = f"{times} checkpoints a run, {checkpoint / 1e6:.0f} MB each"
    fill("save_every", "run", max(1, steps // times), often)
    fill("eval_every", "run", max(1, steps // 10), "ten times a run")
    eval_tokens, kind = (262_144, "a GPU") if on_gpu else (32_768, "a CPU")
    fill("eval_tokens", "run", eval_tokens, f"a second or so on {kind}")
    fill("log_every", "run", max(1, steps // 25), "25 lines a run")
    fill("prompt", "run", *_prompt(config))
    filled = with_options(config, **{choice.name: choice.value for choice in choices})
    sections = option_sections()
    names = [field.name for field in dataclasses.fields(Settled)]
    settled = Settled(**{name: getattr(getattr(filled, sections[name]), name) for name in names})
    return Chosen(config=filled, settled=settled, choices=tuple(choices))


def model_config(chosen: Chosen, vocab_size: int | None = None) -> ModelConfig:
    """The model that was asked for.

    Args:
        chosen: From `choose`.
        vocab_size: Entries that the tokenizer came out with, where known.

    Raises:
        ValueError: Sizes that do not fit each other.
    """
    settled, options = chosen.settled, chosen.config.model
    base = saved_config(options.init) or preset(settled.preset, **options.overrides)
    return dataclasses.replace(
        base,
        vocab_size=vocab_size or settled.vocab_size,
        max_position_embeddings=max(base.max_position_embeddings, settled.seq_len),
    )


def _check_tuning(config: PretrainConfig) -> None:
    if config.model.init == "scratch" and config.run.objective == "dpo":
        raise InputError(
            "train-dpo begins with a trained model, which is its reference: give --init the folder"
            " of a run, or «auto»"
        )
    if config.data.packing == "concat":
        what = "conversations" if config.run.objective == "sft" else "pairs"
        raise InputError(f"packing concat cuts {what} anywhere: give --packing best_fit or none")


def _check_dpo(config: PretrainConfig) -> None:
    """Refuse options of DPO where nothing would read them."""
    if config.run.objective == "dpo":
        return
    fields = dataclasses.fields(config.dpo)
    given = [f.name for f in fields if getattr(config.dpo, f.name) != f.default]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise InputError(f"{flag} is of train-dpo: leave it out, or use that command")


def _preset(begun: ModelConfig | None, on_gpu: bool) -> tuple[str, str]:
    """Whose recipe is taken; of a model that is there the one that is nearest in size."""
    if begun is None:
        if on_gpu:
            return "26m", "trains in minutes on a GPU"
        return "nano", "trains in one to two minutes on two CPU cores"
    size = math.log(count_parameters(begun).total)
    away = {n: abs(math.log(count_parameters(preset(n)).total) - size) for n in RECIPES}
    return min(away, key=away.__getitem__), "nearest in size to the model of --init"


def _vocabulary(config: PretrainConfig, model: ModelConfig, name: str) -> tuple[int, str]:
    if config.data.tokenizer is not None:
        entries = vocabulary_rows(load_tokenizer(tokenizer_file(config.data.tokenizer)))
        return entries, "the tokenizer has so many"
    of_start = config.model.init != "scratch"
    return model.vocab_size, "the model of --init" if of_start else f"preset {name}"


def _prompt(config: PretrainConfig) -> tuple[str, str]:
    if config.run.objective != "pretrain":
        return "", f"{config.command} draws no sample"
    if config.data.data == (STDLIB,):
        return "def ", "the corpus is code"
    return "", "the start of a document"


def _sft_recipe(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, steps=_SFT_STEPS, lr=_SFT_RATE * recipe.lr)


def _dpo_recipe(recipe: Recipe) -> Recipe:
    return dataclasses.replace(
        recipe,
        batch_size=_DPO_PAIRS,
        steps=_DPO_STEPS,
        lr=_DPO_RATE * recipe.lr,
        warmup_steps=_DPO_WARMUP,
    )


def _precision(device: str) -> tuple[str, str]:
    if supports_bf16(device):
        return "bf16", "the GPU multiplies bf16 natively; weights stay float32"
    return "fp32", "the CPU has no fast bf16" if device == "cpu" else "the GPU has no native bf16"


def _document_mask(config: PretrainConfig, on_gpu: bool, backend: str) -> tuple[str, str]:
    if config.data.packing != "concat":
        return "on", f"packing {config.data.packing} keeps documents apart"
    if on_gpu and not backend.startswith("torch"):
        return "on", "the kernels skip what a mask hides"
    return "off", "plain torch computes what a mask hides"


def _micro_batch(rows: int, seq_len: int, masked_by_torch: bool) -> tuple[int, str]:
    if not masked_by_torch:
        return rows, "all rows of a process"
    divisors = [n for n in range(1, rows + 1) if rows % n == 0 and n * seq_len <= _MASKED]
    return max(divisors, default=1), "plain torch's masks cost the square of the tokens"


def _of_pairs(config: PretrainConfig) -> dict[str, Any]:
    """What DPO adds to a step: a row is two sequences, and there is a reference to compute."""
    if config.run.objective != "dpo":
        return {}
    return {"sequences": 2, "has_reference": not config.dpo.precompute}


def _rows_that_fit(model: ModelConfig, step: StepShape, gpu: Accelerator) -> tuple[int, str]:
    """The most rows that the plan finds room for; the run tries a step before it begins."""
    longest = max(model.max_position_embeddings, step.seq_len)
    model = dataclasses.replace(model, max_position_embeddings=longest)
    found = largest_micro_batch(model, step, gpu.memory, step.rows)
    if found is None:
        return 1, f"by the plan not even one row fits in {gpu.memory / 2**30:.0f} GiB"
    rows, plan = found
    which = "all rows of a process" if rows == step.rows else f"{rows} of {step.rows} rows"
    return rows, f"{which}: {plan.total / 2**30:.1f} of {gpu.memory / 2**30:.0f} GiB by the plan"


def _backend(on_gpu: bool) -> tuple[str, str]:
    if given := os.environ.get("TILEWRIGHT_BACKEND", "").strip():
        return given, "TILEWRIGHT_BACKEND says so"
    return "auto", "Triton kernels" if on_gpu else "plain torch, as nothing is on a GPU"
