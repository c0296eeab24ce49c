"""The end of a run: how good the model is, what it writes, and where everything lies."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewright_kernels import BackendReport, backend_report
from tilewright_model import count_parameters
from tilewright_train import machine
from tilewright_train.answers import held_out_answers
from tilewright_train.automatic import Chosen
from tilewright_train.bigram import BigramModel
from tilewright_train.config import STDLIB, STORIES
from tilewright_train.evaluation import draw_sample
from tilewright_train.metrics import (
    Record,
    data_share,
    read_metrics,
    steady_tokens_per_second,
)
from tilewright_train.preference_report import (
    finish_stories,
    preference_lines,
    preference_summary,
)
from tilewright_train.preparation import Prepared
from tilewright_train.progress import Reporter, format_seconds
from tilewright_train.saving_time import saving_in_words
from tilewright_train.whole_files import write_whole

# 16 M pairs are counted in about two seconds; a bigram of 4,096² entries gains little from more.
_BIGRAM_TOKENS = 1 << 24

_SHOWN = 3  # answers of either kind


def finish(
    chosen: Chosen,
    prepared: Prepared,
    autocast: torch.autocast,
    reporter: Reporter,
    saving: Mapping[str, Any],
) -> None:
    """Fit the bigram model, draw a sample and the picture, write summary.json, say all of it.

    Args:
        chosen: The options.
        prepared: The run, with the model trained.
        autocast: Precision of the sample.
        reporter: Takes the last lines.
        saving: What checkpoints cost, and how many were not written, for summary.json.
    """
    run, shape, config, settled = prepared.run, prepared.model_config, chosen.config, chosen.settled
    report = backend_report()
    records = read_metrics(run.metrics)
    prefers = config.run.objective == "dpo"
    bigram = None if prefers else _bigram_loss(prepared)
    text = None
    if prepared.template is None:
        text = sample_text(chosen, prepared, settled.steps, autocast)
    # Imported here: it takes a second, and the first time it looks through all fonts.
    from tilewright_train.report import plot_losses

    parameters = count_parameters(shape).total
    title = f"{run.root.name}: {parameters / 1e6:.1f} M parameters, {settled.steps} steps"
    ways = 2 if prefers else shape.vocab_size
    plot_losses(records, run.picture, title=title, vocab_size=ways, bigram_loss=bigram)
    matches = answer_tasks(chosen, prepared, settled.steps, autocast, reporter)
    finish_stories(chosen, prepared, settled.steps, autocast, reporter)
    summary = _summary(chosen, prepared, records, bigram, report)
    summary |= saving
    if matches:
        summary["exact_match"] = matches
    write_whole(run.summary, json.dumps(summary, indent=2) + "\n")

    if prefers:
        told = preference_lines(records, prepared.validation.targets)
    else:
        told = [_loss_line(prepared, records, bigram)]
    lines = (
        "",
        *told,
        f"speed        {summary['tokens_per_second'] or 0:,.0f} tokens/s, the median of later"
        f" steps; {format_seconds(records[-1].time)} in all,"
        f" {summary['data_share'] or 0:.1%} of it waiting for data",
        f"saving       {saving_in_words(saving['saving'])}",
        f"backends     {_backends_in_words(report)}",
        *([] if text is None else ["sample", *(f"    {line}" for line in text.splitlines())]),
        f"run          {run.root}",
        f"picture      {run.picture}",
        f"next         {_next_command(chosen)}",
    )
    for line in lines:
        reporter.say(line)


def sample_text(chosen: Chosen, prepared: Prepared, step: int, autocast: torch.autocast) -> str:
    """Draw a sample and keep it in the run's folder; the run's random numbers stay as they are."""
    device = prepared.trainee.model.embed_tokens.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        text = draw_sample(
            prepared.trainee.model,
            prepared.corpus.tokenizer,
            prompt=chosen.settled.prompt,
            tokens=chosen.config.run.sample_tokens,
            seed=chosen.config.training.seed,
            autocast=autocast,
        )
    _keep_sample(prepared, step, text)
    return text


def answer_tasks(
    chosen: Chosen, prepared: Prepared, step: int, autocast: torch.autocast, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Of SFT and DPO on stories: have held-out tasks answered, say and keep how many were right.

    Args:
        chosen: The options.
        prepared: The run.
        step: Steps that are done.
        autocast: Precision of the answers.
        reporter: Takes the figures and some answers.

    Returns:
        Exact match by steps done, also at the start; empty where there are no such tasks.
    """
    if prepared.template is None or STORIES not in chosen.config.data.data:
        return {}
    answers = held_out_answers(
        prepared.trainee.model,
        prepared.corpus.tokenizer,
        prepared.template,
        count=chosen.config.run.tasks,
        autocast=autocast,
    )
    file = prepared.run.answers
    matches = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    matches[str(step)] = {
        "instances": answers.instances.exact_match,
        "templates": answers.templates.exact_match,
    }
    file.write_text(json.dumps(matches, indent=2) + "\n", encoding="utf-8")
    shown = [*answers.instances.samples(_SHOWN), *answers.templates.samples(_SHOWN)]
    _keep_sample(prepared, step, "\n".join(shown) + "\n")
    when = "before training" if step == 0 else "after training"
    reporter.say(
        f"exact match  {answers.instances.exact_match:.1%} of {len(answers.instances.tasks)}"
        f" held-out tasks, {answers.templates.exact_match:.1%} of as many asked in unseen ways;"
        f" {when}"
    )
    for line in shown:
        reporter.say(f"    {line}")
    return matches


def _bigram_loss(prepared: Prepared) -> float:
    """Of the bigram model on the validation rows."""
    splits = [source.train.tokens for source in prepared.corpus.sources]
    share = min(1.0, _BIGRAM_TOKENS / _training_tokens(prepared))
    fitted_on = [split[: max(1, int(share * split.numel()))] for split in splits]
    bigram = BigramModel(fitted_on, prepared.model_config.vocab_size)
    return bigram.loss(prepared.validation.batches(64))


def _training_tokens(prepared: Prepared) -> int:
    return sum(source.train.tokens.numel() for source in prepared.corpus.sources)


def _loss_line(prepared: Prepared, records: list[Record], bigram: float | None) -> str:
    """Validation losses, beside that of the bigram model."""
    losses = [record.val_loss for record in records if record.val_loss is not None]
    first, last = losses[0], losses[-1]
    all_of_it = _training_tokens(prepared) <= _BIGRAM_TOKENS
    capped = "" if all_of_it else f" (fitted on the first {_BIGRAM_TOKENS:,} tokens)"
    return (
        f"validation   loss {last:.4f}, perplexity {math.exp(last):.1f}; before training"
        f" {first:.4f}; bigram model on the same tokens {bigram:.4f}{capped}"
    )


def _keep_sample(prepared: Prepared, step: int, text: str) -> None:
    file = prepared.run.sample(step)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _summary(
    chosen: Chosen,
    prepared: Prepared,
    records: list[Record],
    bigram: float | None,
    report: BackendReport,
) -> dict[str, Any]:
    """summary.json."""
    measured = [record.val_loss for record in records if record.val_loss is not None]
    device = prepared.trainee.model.embed_tokens.weight.device
    targets = prepared.validation.targets
    if bigram is None:
        own = {**preference_summary(records), "val_pairs": targets}
    else:
        own = {
            "perplexity": math.exp(measured[-1]),
            "bigram_val_loss": bigram,
            "ln_vocab_size": math.log(prepared.model_config.vocab_size),
            "val_predictions": targets,
            "packing_efficiency": prepared.training.efficiency,
        }
    return {
        "steps": records[-1].step,
        "val_loss": measured[-1],
        "first_val_loss": measured[0],
        "vocab_size": prepared.model_config.vocab_size,
        **own,
        "parameters": count_parameters(prepared.model_config).total,
        "tokens": records[-1].tokens,
        "tokens_per_second": steady_tokens_per_second(records),
        "data_share": data_share(records),
        "peak_memory_bytes": max(record.peak_memory_bytes for record in records),
        "seconds": records[-1].time,
        "device": machine.describe(device),
        "precision": chosen.settled.precision,
        "backend": {
            "asked_for": chosen.settled.backend,
            "fell_back": list(report.fell_back),
            "operators": {row.operator: dataclasses.asdict(row) for row in report.rows},
        },
    }


def _backends_in_words(report: BackendReport) -> str:
    ran = [
        f"{row.operator} {'triton' if row.triton else 'torch'}"
        for row in report.rows
        if row.triton or row.torch
    ]
    fallen = f"; FELL BACK to torch: {', '.join(report.fell_back)}" if report.fell_back else ""
    return ", ".join(ran) + fallen


def _next_command(chosen: Chosen) -> str:
    if chosen.config.run.objective == "sft":
        return (
            "train-dpo    (prefer the better of two answers; or --data pairs of your own), or"
            " train-generate --chat    (ask it)"
        )
    if chosen.config.run.objective == "dpo":
        return (
            "train-dpo --data FILE_OR_FOLDER    (your own pairs: .jsonl, .parquet), or"
            " train-generate --chat    (ask it)"
        )
    data = " ".join(chosen.config.data.data)
    if data == STDLIB:
        return "train-pretrain --data FILE_OR_FOLDER    (your own text: .jsonl, .txt, .md, .py, …)"
    return f"train-pretrain --data {data} --steps {4 * chosen.settled.steps}"
