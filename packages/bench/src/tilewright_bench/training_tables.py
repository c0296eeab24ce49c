"""Tables of what `train-pretrain` reached; see `training` for the records.

What was not run is said to be so; a run that failed says why in its row.
"""

import statistics
from collections.abc import Mapping
from typing import Any

SAVING_BAR = 0.05
"""Of the time of a run that saves every 100 steps."""

NOT_MEASURED = "Not measured yet."

_FIRST = 10  # steps that do not count in means

Run = Mapping[str, Any]
Record = Mapping[str, Any]


def runs_of(record: Record, section: str) -> dict[str, Run]:
    """The runs of a section, by their names."""
    return {run["case"]: run for run in record.get(section, [])}


def precision(record: Record) -> str:
    """Speed, memory and validation losses of each precision."""
    runs = runs_of(record, "precision")
    if not runs:
        return NOT_MEASURED
    steps = sorted({int(s) for run in runs.values() for s in run.get("val_loss", {}) if int(s)})
    head = "".join(f" after {step} |" for step in steps)
    rows = [
        f"| precision | tokens/s | of the peak | peak GiB (plan) | left out | loss scale |{head}",
        "| --- | ---: | ---: | ---: | ---: | --- |" + " ---: |" * len(steps),
    ]
    for name, run in runs.items():
        if "error" in run:
            rows.append(f"| {name} | {run['error']} |" + " |" * (4 + len(steps)))
            continue
        scale = "" if run["loss_scale"] is None else f"2^{run['loss_scale'].hex().split('p+')[1]}"
        found = {int(step): loss for step, loss in run["val_loss"].items()}
        ends = "".join(f" {found[s]:.4f} |" if s in found else " |" for s in steps)
        rows.append(
            f"| {name} | {_rate(run)} | {run['mfu']:.0%} | {_memory(run)} |".replace("%", " %")
            + f" {run['skipped_steps']} of {run['steps']} | {scale} |{ends}"
        )
    return "\n".join(rows) + f"\n\nLosses are validation's. {_shape(runs)}"


def backends(record: Record) -> str:
    """Triton's kernels against plain torch."""
    runs = runs_of(record, "backends")
    if not runs:
        return NOT_MEASURED
    rows = ["| `--backend` | tokens/s | peak GiB | validation loss | |", "| --- |" + " ---: |" * 4]
    first = next((run for run in runs.values() if "error" not in run), None)
    for name, run in runs.items():
        if "error" in run or first is None:
            rows.append(f"| {name} | {run['error']} | | | |")
            continue
        times = run["tokens_per_second"] / first["tokens_per_second"]
        last = list(run["val_loss"].values())[-1]
        against = "" if run is first else f"{times:.2f}×"
        rows.append(f"| {name} | {_rate(run)} | {_gib(run)} | {last:.4f} | {against} |")
    text = "\n".join(rows)
    curves = [run["losses"] for run in runs.values() if "losses" in run]
    if len(curves) == 2:
        apart = [abs(a - b) for a, b in zip(*curves, strict=False) if a is not None]
        text += (
            f"\n\nOver {len(apart)} steps the two training losses are {max(apart):.4f} apart at"
            f" most and {statistics.fmean(apart):.4f} in the mean; both without a document mask."
        )
    return f"{text} {_shape(runs)}"


def accumulation(record: Record) -> str:
    """The same rows computed together, in parts, and one by one."""
    return _by_option(record, "accumulation", "the same 16 rows a step")


def options(record: Record) -> str:
    """What each option does to speed and memory."""
    return _by_option(record, "options", "option")


def saving(record: Record) -> str:
    """What checkpoints cost a run of a large model, beside the bar."""
    runs = runs_of(record, "saving")
    plain, saved = runs.get("without", {}), runs.get("with", {})
    if "step_seconds" not in plain or not saved.get("saving"):
        return NOT_MEASURED
    alone = statistics.fmean(plain["step_seconds"][_FIRST:])
    mixed = statistics.fmean(saved["step_seconds"][_FIRST:])
    told, lost = saved["saving"], mixed / alone - 1
    behind = sorted(saved["step_seconds"][_FIRST:])[-told["checkpoints"] + 1 :]
    own = (told["steps_waited"] + told["steps_slower"]) / told["loop_seconds"]
    verdict = "yes" if lost <= SAVING_BAR else "no"
    rows = (
        "| | seconds a step |",
        "| --- | ---: |",
        f"| {plain['steps']} steps without saving | {alone:.4f} |",
        f"| {saved['steps']} steps, `{_flag(saved, '--save-every')}` | {mixed:.4f} |",
        f"| lost to saving (at most {SAVING_BAR:.0%}: {verdict}) | {lost:.1%} |",
    )
    return (
        "\n".join(rows).replace("%", " %")
        + f"\n\nMeans of all steps but the first {_FIRST}, {_shape(runs).lower()[:-1]}. The steps"
        f" behind a checkpoint took {' and '.join(f'{s:.2f}' for s in behind)} s."
        f" The run itself counts {own:.1%} of its loop:"
        f" {told['steps_waited']:.2f} s of waiting, {told['steps_slower']:.2f} s of"
        f" {told['steps_beside_writing']} slower steps beside the writing; its end waited"
        f" {told['waited_for_last']:.2f} s for the last checkpoint.".replace("%", " %")
    )


def kills(record: Record) -> str:
    """Runs that were killed and went on, against one that was not."""
    found = record.get("kills")
    if not found:
        return NOT_MEASURED
    rows = [
        "| killed after step | during a save | losses and norms | files of the last checkpoint |"
    ]
    rows.append("| ---: | --- | --- | --- |")
    for run in found["runs"].values():
        what = run["what"]
        if not isinstance(what, dict):
            rows.append(f"| {what} | | | |")
            continue
        curve = "equal, bit for bit" if run["equal_curve"] else "differ"
        others = run.get("other_files", [])
        files = f"differ: {', '.join(others)}" if others else "equal"
        saved = "yes" if what["during_a_save"] else "no"
        rows.append(f"| {what['killed_at_step']} | {saved} | {curve} | {files} |")
    return "\n".join(rows) + f"\n\n`{found['flags']}`"


def parallel(record: Record) -> str:
    """Ways to share a step among GPUs."""
    if not record["parallel"]:
        return NOT_MEASURED
    rows = [
        "| GPUs | `--parallel` | tokens/s | of so many single GPUs | peak GiB a GPU (plan) |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for found in record["parallel"]:
        alone = next((r for r in found["runs"] if r.get("gpus") == 1), None)
        for run in found["runs"]:
            if "error" in run:
                rows.append(f"| {found['gpus']} | {run['case']} | {run['error']} | | |")
                continue
            share = ""
            if alone is not None and run["gpus"] > 1 and run["precision"] == alone["precision"]:
                share = f"{run['tokens_per_second'] / run['gpus'] / alone['tokens_per_second']:.0%}"
            name = "" if run["gpus"] == 1 else run["case"]
            plan = f" ({run['planned_bytes'] / 2**30:.2f})" if run["planned_bytes"] else ""
            peak = max(run["peak_bytes"]) / 2**30
            rows.append(
                f"| {run['gpus']} | {name} | {run['tokens_per_second']:,.0f} |"
                f" {share.replace('%', ' %')} | {peak:.2f}{plan} |"
            )
    notes = [
        f"{found['gpus']} {found['gpu']}, torch {found['torch']}, commit `{found['commit'][:10]}`:"
        f" `{found['command']} {found['base']}`."
        for found in record["parallel"]
    ]
    return "\n".join(rows) + "\n\n" + " ".join(notes)


def _by_option(record: Record, section: str, what: str) -> str:
    """Each run against the first."""
    runs = runs_of(record, section)
    if not runs:
        return NOT_MEASURED
    rows = [
        f"| {what} | rows at a time | tokens/s | | peak GiB (plan) |",
        "| --- |" + " ---: |" * 4,
    ]
    first = next((run for run in runs.values() if "error" not in run), None)
    for name, run in runs.items():
        label = f"`{name}`" if name.startswith("--") else name
        if "error" in run or first is None:
            rows.append(f"| {label} | {run['error']} | | | |")
            continue
        against = ""
        if run is not first and run["seq_len"] == first["seq_len"]:
            against = f"{run['tokens_per_second'] / first['tokens_per_second']:.2f}×"
        rows.append(
            f"| {label} | {run['micro_batch_size']} of {run['rows']} | {_rate(run)} | {against} |"
            f" {_memory(run)} |"
        )
    return "\n".join(rows)


def _rate(run: Run) -> str:
    return f"{run['tokens_per_second']:,.0f}"


def _gib(run: Run) -> str:
    return f"{run['peak_bytes'] / 2**30:.2f}"


def _memory(run: Run) -> str:
    plan = run.get("planned_bytes")
    return f"{_gib(run)} ({plan / 2**30:.2f})" if plan else _gib(run)


def _flag(run: Run, name: str) -> str:
    words = run["flags"].split()
    return f"{name} {words[words.index(name) + 1]}" if name in words else name


def _shape(runs: Mapping[str, Run]) -> str:
    """Rows and tokens of a step, of the first run that has them."""
    run = next((run for run in runs.values() if "error" not in run), None)
    return "" if run is None else f"Steps of {run['rows']} × {run['seq_len']} tokens."
