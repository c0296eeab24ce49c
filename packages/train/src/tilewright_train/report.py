"""The picture of a run: its losses over the steps, and what they are to be compared with."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tilewright_train.metrics import Record

_INK, _TRAIN, _VALIDATION, _BIGRAM = "#333333", "#9bb8d3", "#1f4e79", "#c0504d"


def plot_losses(
    records: Sequence[Record], path: Path, *, title: str, vocab_size: int, bigram_loss: float | None
) -> None:
    """Draw training and validation loss, the bigram model and ln V; the learning rate below.

    Args:
        records: Of metrics.jsonl.
        path: The PNG to write; its folder is made.
        title: Of the picture.
        vocab_size: V; ln V is the loss of a model that knows nothing. Of DPO 2.
        bigram_loss: The bigram model's validation loss, in nats; None where there is none.
    """
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    training = [(r.step, r.loss) for r in records if r.loss is not None]
    validation = [(r.step, r.val_loss) for r in records if r.val_loss is not None]
    if training:
        steps, values = zip(*training, strict=True)
        losses.plot(steps, values, color=_TRAIN, linewidth=1, label="training, each batch")
    if validation:
        steps, values = zip(*validation, strict=True)
        label = f"validation, at the end {values[-1]:.3f}"
        losses.plot(steps, values, color=_VALIDATION, marker="o", markersize=4, label=label)
    levels = [(math.log(vocab_size), ":", _INK, f"ln {vocab_size} = {math.log(vocab_size):.3f}")]
    if bigram_loss is not None:
        levels.insert(0, (bigram_loss, "--", _BIGRAM, f"bigram model, {bigram_loss:.3f}"))
    for level, style, color, label in levels:
        losses.axhline(level, linestyle=style, color=color, linewidth=1.2, label=label)
    losses.set_ylabel("loss, nats per token" if bigram_loss is not None else "loss, nats per pair")
    losses.set_title(title, fontsize=11)
    losses.legend(frameon=False)
    rates.plot(
        [r.step for r in records if r.lr is not None],
        [r.lr for r in records if r.lr is not None],
        color=_INK,
        linewidth=1,
    )
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
