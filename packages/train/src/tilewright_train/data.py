"""From encoded sources to what the loop reads: rows to train on, rows to validate on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tilewright_train.batches import (
    Batch,
    MixedRows,
    PlannedRows,
    Rows,
    WindowRows,
    validation_numbers,
)
from tilewright_train.errors import InputError
from tilewright_train.packing import Plan, plan_rows
from tilewright_train.samples import Samples

Packing = Literal["concat", "best_fit", "none"]
"""Windows of the joined samples; samples that fit together; one sample a row."""


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How samples become rows."""

    packing: Packing
    """What shares a row."""
    document_mask: bool
    """With «concat»: attention and positions stay within a document. Other packings always do."""
    seq_len: int
    """Tokens a row."""
    padding: int
    """The token that fills rows up, where that is needed."""


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Rows to train on."""

    rows: Rows
    """Of all sources."""
    plans: tuple[Plan, ...]
    """Of each source; empty with «concat»."""

    @property
    def efficiency(self) -> float:
        """Share of the rows' room that holds tokens."""
        if not self.plans:
            return 1.0
        held = sum(int(plan.lengths.sum()) for plan in self.plans)
        return held / sum(plan.rows * plan.seq_len for plan in self.plans)

    @property
    def truncated(self) -> int:
        """Samples that were cut off."""
        return sum(plan.truncated for plan in self.plans)

    @property
    def dropped(self) -> int:
        """Samples with nothing to predict in what fits."""
        return sum(plan.dropped for plan in self.plans)


@dataclass(frozen=True, kw_only=True)
class ValidationRows:
    """Rows of the validation loss, always the same ones."""

    parts: tuple[tuple[Rows, tuple[int, ...]], ...]
    """For each source its rows and the numbers of those that are used."""

    @property
    def targets(self) -> int:
        """Predictions of all."""
        return sum(rows.targets(numbers) for rows, numbers in self.parts)

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One process's share, at most `size` rows at a time."""
        for rows, numbers in self.parts:
            mine = numbers[rank::world_size]
            for first in range(0, len(mine), size):
                yield rows.read(mine[first : first + size])

    def most_batches(self, size: int, world_size: int) -> int:
        """How many batches the first process has, of which none has more."""
        return sum(-(-len(numbers[::world_size]) // size) for _, numbers in self.parts)


def training_rows(
    splits: Sequence[Samples], weights: Sequence[float], options: RowOptions, seed: int
) -> TrainingRows:
    """Rows of one source, or of several mixed.

    Args:
        splits: The training split of each source.
        weights: Share of each source; empty for shares in proportion to their rows.
        options: How samples become rows.
        seed: Chooses the order.

    Raises:
        InputError: Too little to fill a row, or weights that fit the sources in number or size not.
    """
    if weights and len(weights) != len(splits):
        raise InputError(
            f"{len(weights)} weights for {len(splits)} sources: give --weights one number for each"
        )
    made = [_rows(samples, options, seed + 1_000_003 * i) for i, samples in enumerate(splits)]
    parts = [rows for rows, _ in made]
    plans = tuple(plan for _, plan in made if plan is not None)
    if len(parts) == 1:
        return TrainingRows(rows=parts[0], plans=plans)
    shares = weights or [float(rows.count) for rows in parts]
    return TrainingRows(rows=MixedRows(parts, shares, seed=seed), plans=plans)


def validation_rows(splits: Sequence[Samples], options: RowOptions, budget: int) -> ValidationRows:
    """Rows of the validation loss, spread evenly over each source.

    Args:
        splits: The validation split of each source.
        options: How samples become rows; shorter where a split is.
        budget: Predictions to make in all, about; each source has its part by size.

    Raises:
        InputError: Fewer than two tokens.
    """
    total = sum(samples.tokens.numel() for samples in splits)
    parts = []
    for samples in splits:
        count = samples.tokens.numel()
        if count < 2:
            raise InputError(
                f"the corpus has {count} validation tokens, too few to predict one: give --data"
                " more text, or a larger --validation-fraction"
            )
        rows, _ = _rows(samples, options, None)
        share = max(1, budget * count // total)
        parts.append((rows, tuple(validation_numbers(rows, share))))
    return ValidationRows(parts=tuple(parts))


def _rows(samples: Samples, options: RowOptions, seed: int | None) -> tuple[Rows, Plan | None]:
    if options.packing != "concat":
        plan = plan_rows(samples, options.seq_len, pack=options.packing == "best_fit")
        return PlannedRows(samples, plan, seed=seed, padding=options.padding), plan
    rows = WindowRows(
        samples, seq_len=options.seq_len, seed=seed, document_mask=options.document_mask
    )
    return rows, None
