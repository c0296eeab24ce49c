"""Batches of preference pairs: both sides of each, and where their completions are predicted.

Split, order and epochs are those of `batches`. A pair is one row; its sides are sequences of their
own, padded to the longest of the batch, or joined behind each other without padding. Shapes:
P pairs, S = 2·P sequences (all chosen ones, then all rejected ones), M predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewright_train.batches import Batch, epoch_order, ranges
from tilewright_train.errors import InputError
from tilewright_train.samples import Samples, targets_before


@dataclass(frozen=True, kw_only=True, eq=False)
class PairBatch(Batch):
    """Pairs; `targets` counts them, for the loss is a mean over pairs, and `labels` is [M]."""

    places: torch.Tensor
    """[M] int64: the token, counted through all rows, behind which each prediction is made."""
    sequences: torch.Tensor
    """[M] int64: the sequence that each prediction belongs to."""
    lengths: torch.Tensor
    """[S] int64: predictions in each sequence."""
    reference: torch.Tensor | None = None
    """[S] float32: log-probabilities under the reference, where they were computed before."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of `SequenceLogProbs.forward`."""
        inputs = {
            name: getattr(self, name)
            for name in ("input_ids", "labels", "places", "sequences", "lengths")
        }
        if self.cu_seqlens is not None:
            inputs |= {"cu_seqlens": self.cu_seqlens, "position_ids": self.position_ids}
        return inputs

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "PairBatch":
        """One batch with the pairs of several, all padded or all without padding."""
        parts = [batch for batch in batches if isinstance(batch, PairBatch)]
        pairs = sum(part.targets for part in parts)
        packed = parts[0].cu_seqlens is not None
        longest = max(part.input_ids.shape[1] for part in parts)
        ids, positions, places, sequences, bounds = [], [], [], [], [torch.zeros(1).int()]
        rows = before = 0  # tokens are counted through rows of the longest
        first = 0  # pairs of the parts before
        for part in parts:
            width = part.input_ids.shape[1]
            row, column = part.places // width, part.places % width
            if packed:
                places.append(part.places + before)
                bounds.append(part.cu_seqlens[1:] + before)  # pyrefly: ignore
                positions.append(part.position_ids)
                ids.append(part.input_ids)
            else:
                places.append((row + rows) * longest + column)
                ids.append(torch.nn.functional.pad(part.input_ids, (0, longest - width)))
            # Rejected ones stand behind all chosen ones.
            rejected = part.sequences >= part.targets
            others = pairs - part.targets
            sequences.append(part.sequences + first + rejected * others)
            rows += part.input_ids.shape[0]
            before += part.input_ids.numel()
            first += part.targets
        packing = {}
        if packed:
            packing = {"cu_seqlens": torch.cat(bounds), "position_ids": torch.cat(positions, 1)}
        references = [part.reference for part in parts]
        return PairBatch(
            input_ids=torch.cat(ids, 1 if packed else 0),
            labels=torch.cat([part.labels for part in parts]),
            targets=pairs,
            tokens=sum(part.tokens for part in parts),
            places=torch.cat(places),
            sequences=torch.cat(sequences),
            lengths=_by_side([part.lengths for part in parts]),
            reference=None if references[0] is None else _by_side(references),  # pyrefly: ignore
            **packing,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PairPlan:
    """The pairs of a split that are used, and how much of them."""

    numbers: torch.Tensor
    """[P] int64: pair n is the samples 2n and 2n + 1."""
    starts: torch.Tensor
    """[P, 2] int64: where chosen and rejected begin among the split's tokens."""
    lengths: torch.Tensor
    """[P, 2] int64: their tokens."""
    truncated: int
    """Pairs with a side that was cut off."""
    dropped: int
    """Pairs with a side of which the prompt alone fills the room."""

    @property
    def pairs(self) -> int:
        """P."""
        return self.numbers.numel()


def plan_pairs(samples: Samples, seq_len: int, side: str = "training") -> PairPlan:
    """Cut both sides of every pair off behind `seq_len` tokens.

    A pair of which that leaves one side nothing to predict is dropped: no margin can be told.

    Args:
        samples: Of one split, two for each pair.
        seq_len: Tokens of a side, the prompt included.
        side: What the split is for, as a message names it.

    Raises:
        InputError: No pair is left.
    """
    assert samples.targets is not None
    starts = samples.ends - samples.lengths
    lengths = samples.lengths.clamp(max=seq_len)
    # A token at place 0 has none before it to be predicted from.
    ends, seconds = (targets_before(samples.targets, t) for t in (starts + lengths, starts + 1))
    predicted = (ends - seconds).view(-1, 2)
    kept = (predicted > 0).all(dim=1)
    if not kept.any():
        raise InputError(
            f"no pair has a completion within {seq_len} tokens on both sides, of the {kept.numel()}"
            f" for {side}: give --data more, or a larger --seq-len"
        )
    cut = (samples.lengths > seq_len).view(-1, 2).any(dim=1)
    return PairPlan(
        numbers=kept.nonzero().flatten(),
        starts=starts.view(-1, 2)[kept],
        lengths=lengths.view(-1, 2)[kept],
        truncated=int((cut & kept).sum()),
        dropped=int((~kept).sum()),
    )


class PairRows:
    """The pairs of a split, numbered through all epochs."""

    def __init__(
        self,
        samples: Samples,
        plan: PairPlan,
        *,
        seed: int | None,
        padding: int | None,
        reference: torch.Tensor | None = None,
    ) -> None:
        """Prepare to read pairs.

        Args:
            samples: What the plan was made of.
            plan: Which pairs there are.
            seed: Chooses the order; None for the pairs in order.
            padding: Fills shorter sequences up; None joins the sequences without padding.
            reference: [P, 2] float32: log-probabilities under the reference, where known.
        """
        self._samples = samples
        self._plan = plan
        self._seed = seed
        self._padding = padding
        self._reference = reference
        self.count = plan.pairs
        self.seq_len = -(-int(plan.lengths.sum()) // plan.pairs)
        """Tokens of a pair, both sides, on average."""

    def read(self, numbers: Sequence[int]) -> PairBatch:
        """The pairs with these numbers."""
        pairs = self._pairs(numbers)
        starts, lengths = (t[pairs].T.flatten() for t in (self._plan.starts, self._plan.lengths))
        sequence = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
        column = ranges(torch.zeros_like(lengths), lengths)
        sources = ranges(starts, lengths)
        tokens = self._samples.tokens[sources].long()
        assert self._samples.targets is not None
        predicted = (self._samples.targets[sources] > 0) & (column > 0)
        layout: dict[str, Any]
        if self._padding is None:
            place = torch.arange(tokens.numel())
            bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            layout = {
                "input_ids": tokens[None],
                "position_ids": column[None],
                "cu_seqlens": bounds.int(),
            }
        else:
            shape = lengths.numel(), int(lengths.max())
            place = sequence * shape[1] + column
            ids = torch.full(shape, self._padding)
            ids.view(-1)[place] = tokens
            layout = {"input_ids": ids}
        reference = self._reference
        return PairBatch(
            **layout,
            labels=tokens[predicted],
            targets=len(numbers),
            tokens=tokens.numel(),
            places=place[predicted] - 1,
            sequences=sequence[predicted],
            lengths=torch.bincount(sequence[predicted], minlength=lengths.numel()),
            reference=None if reference is None else reference[pairs].T.flatten(),
        )

    def targets(self, numbers: Sequence[int]) -> int:
        """As many as there are pairs."""
        return len(numbers)

    def _pairs(self, numbers: Sequence[int]) -> torch.Tensor:
        if self._seed is None:
            return torch.tensor(numbers)
        seed, count = self._seed, self.count
        places = (divmod(number, count) for number in numbers)
        return torch.tensor([int(epoch_order(seed, e, 1, count)[1][i]) for e, i in places])


def _by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[S] of several batches: the chosen halves, then the rejected ones."""
    halves = [part.view(2, -1) for part in parts]
    return torch.cat(halves, dim=1).flatten()
