"""Which samples share a row: best fit decreasing, once for a split, whatever the epoch.

A row has room for `seq_len` tokens. Longest first, each piece goes into the row whose room it
leaves the least of (Johnson 1974: at most 11/9 of the fewest rows). A plan says which pieces a row
holds; it is a function of the samples' lengths alone, so that nothing of it has to be remembered in
a checkpoint: epochs differ in the order of the rows.

A text longer than a row is cut into pieces that overlap by the token that the next one begins with.
A sample of which only some tokens are predicted is cut off behind `seq_len` tokens instead, and
left out where that leaves none to predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tilewright_train.errors import InputError
from tilewright_train.samples import Samples, targets_before

# Samples that are packed together: bounds the memory of the search, 2 s a million on one core.
_TOGETHER = 1 << 18


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The rows of a split."""

    starts: torch.Tensor
    """[P] int64: where each piece begins in the split's tokens; row by row."""
    lengths: torch.Tensor
    """[P] int64: tokens of each piece."""
    row_ends: torch.Tensor
    """[R] int64: row r holds the pieces row_ends[r - 1] to row_ends[r]."""
    targets: torch.Tensor
    """[R] int64: tokens of each row that are predicted."""
    seq_len: int
    """Room of a row."""
    truncated: int
    """Samples that were cut off."""
    dropped: int
    """Samples that were left out: nothing to predict in what fits."""

    @property
    def rows(self) -> int:
        """R."""
        return self.row_ends.numel()

    @property
    def efficiency(self) -> float:
        """Share of the rows' room that holds tokens; the rest is padding."""
        return float(self.lengths.sum()) / max(1, self.rows * self.seq_len)


def plan_rows(samples: Samples, seq_len: int, *, pack: bool) -> Plan:
    """Cut samples to size and put them into rows.

    Args:
        samples: Of one split. Where they have no targets they are texts, each with the end token
            behind it: the end token in front of it, which is the last one of the sample before,
            goes before it as the token that the first one is predicted from.
        seq_len: Tokens of a row, at least 2.
        pack: Best fit decreasing; otherwise one piece a row, in the order of the samples.

    Raises:
        InputError: No sample has anything to predict.
    """
    truncated = dropped = 0
    if samples.targets is None:
        starts, lengths = _text_pieces(samples, seq_len)
        piece_targets = lengths - 1
    else:
        starts, lengths = samples.ends - samples.lengths, samples.lengths.clamp(max=seq_len)
        truncated = int((samples.lengths > seq_len).sum())
        piece_targets = _targets_within(samples.targets, starts, lengths)
        kept = piece_targets > 0
        dropped = int((~kept).sum())
        starts, lengths, piece_targets = starts[kept], lengths[kept], piece_targets[kept]
    if not starts.numel():
        raise InputError(
            f"no sample has a token to predict within {seq_len} tokens: give --data more, or a"
            " larger --seq-len"
        )
    if pack:
        order, sizes = best_fit(lengths, seq_len)
        starts, lengths, piece_targets = starts[order], lengths[order], piece_targets[order]
    else:
        sizes = torch.ones_like(starts)
    row_ends = sizes.cumsum(0)
    sums = torch.cat([piece_targets.new_zeros(1), piece_targets.cumsum(0)])[row_ends]
    return Plan(
        starts=starts,
        lengths=lengths,
        row_ends=row_ends,
        targets=torch.diff(sums, prepend=sums.new_zeros(1)),
        seq_len=seq_len,
        truncated=truncated,
        dropped=dropped,
    )


def best_fit(lengths: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best fit decreasing.

    Args:
        lengths: [P] int64, from 1 to seq_len.
        seq_len: Room of a row.

    Returns:
        [P] int64, the pieces in the order of the rows (and of the samples within a row), and
        [R] int64, how many each row holds.
    """
    order: list[torch.Tensor] = []
    sizes: list[torch.Tensor] = []
    for first in range(0, lengths.numel(), _TOGETHER):
        part = lengths[first : first + _TOGETHER]
        longest = part.sort(descending=True, stable=True).indices
        rows = _best_fit(longest.tolist(), part[longest].tolist(), seq_len)
        order.append(torch.tensor([piece for row in rows for piece in sorted(row)]) + first)
        sizes.append(torch.tensor([len(row) for row in rows]))
    return torch.cat(order), torch.cat(sizes)


def _best_fit(pieces: Sequence[int], lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """The rows of pieces that come longest first."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # numbers of rows, by room left
    rooms = 0  # bit r is set where open_rows[r] is not empty
    for piece, length in zip(pieces, lengths, strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows


def _text_pieces(samples: Samples, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and length of pieces: seq_len - 1 predicted tokens each, and the one before them."""
    predicted = samples.lengths
    counts = (predicted + seq_len - 2) // (seq_len - 1)
    sample = torch.repeat_interleave(torch.arange(predicted.numel()), counts)
    number = torch.arange(sample.numel()) - (counts.cumsum(0) - counts)[sample]
    offset = number * (seq_len - 1)
    # The first sample begins with the token at -1, which is the last one of the ring.
    starts = (samples.ends - predicted)[sample] - 1 + offset
    lengths = (predicted[sample] - offset).clamp(max=seq_len - 1) + 1
    return starts, lengths


def _targets_within(
    targets: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """[P]: targets of each piece but its first token, which nothing comes before."""
    return targets_before(targets, starts + lengths) - targets_before(targets, starts + 1)
