"""Which tokens make a batch: a pure function of the seed and the number of the step.

A split of samples gives rows, numbered through all epochs: windows of the joined samples, or rows
of a plan (`packing`), or a mixture of several splits. Nothing is remembered between steps: a run
that goes on at step s reads what it would have read, and any number of processes shares one batch.

A row may hold several samples. Then `cu_seqlens` bounds them, positions begin anew in each, and the
model's attention stays within them. Shapes: B rows, T tokens, N = B·T, S segments.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tilewright_train.errors import InputError
from tilewright_train.packing import Plan
from tilewright_train.samples import Samples

IGNORE_INDEX = -100
"""Label of a token that is not predicted."""

_BLOCK = 1000  # rows; the unit in which a mixture keeps its proportions


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of tokens and what is to be predicted in them."""

    input_ids: torch.Tensor
    """[B, T] int64."""
    labels: torch.Tensor
    """[B, T] int64, not shifted: input_ids, or -100 where nothing is predicted, as in column 0."""
    targets: int
    """Predictions: labels that are not -100."""
    tokens: int
    """Tokens that are not padding."""
    cu_seqlens: torch.Tensor | None = None
    """[S + 1] int32: bounds of the segments among the B·T tokens; None where rows are whole."""
    position_ids: torch.Tensor | None = None
    """[B, T] int64: places within the segments; None where they are those within the rows."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of `CausalLM.forward`: of packed rows, one row of all N tokens."""
        if self.cu_seqlens is None or self.position_ids is None:
            return {"input_ids": self.input_ids, "labels": self.labels}
        return {
            "input_ids": self.input_ids.view(1, -1),
            "labels": self.labels.view(1, -1),
            "position_ids": self.position_ids.view(1, -1),
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.input_ids.shape[1],
        }

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """A copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU fetches while the host goes on."""
        return self._map(torch.Tensor.pin_memory)

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Batch":
        """One batch with the rows of several."""
        return join(batches)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **{k: function(v) for k, v in tensors.items()})


class Rows(Protocol):
    """Rows of one split, numbered through all epochs."""

    @property
    def count(self) -> int:
        """Rows of one epoch."""
        ...

    @property
    def seq_len(self) -> int:
        """T."""
        ...

    def read(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        ...

    def targets(self, numbers: Sequence[int]) -> int:
        """Predictions in the rows with these numbers, without reading them."""
        ...


class WindowRows:
    """Pretraining by concatenation: windows of the joined samples, which are a ring.

    An epoch starts somewhere on the ring, cuts it into windows of `seq_len` that overlap by one
    token (a window predicts all its tokens but the first, so every token is predicted once) and
    visits them in random order.

    With a document mask every sample is a segment of its own, and the ring holds the token before a
    sample, which ends the one before it, once more in front of it: a document's end is predicted,
    and so is its first token, from the end token alone.
    """

    def __init__(
        self, samples: Samples, *, seq_len: int, seed: int | None, document_mask: bool
    ) -> None:
        """Prepare to read windows.

        Args:
            samples: Texts, the end token behind each.
            seq_len: Tokens a row; fewer without a seed where there are not as many.
            seed: Chooses the order; None for windows in order, from the first token on.
            document_mask: Whether attention stays within a sample.

        Raises:
            InputError: Fewer tokens than a row.
        """
        tokens = samples.tokens.numel()
        self._tokens = samples.tokens
        self._seed = seed
        # Places on the ring where the samples end, if those are to be told.
        self._ends = samples.ends + torch.arange(1, samples.ends.numel() + 1)
        self._masked = document_mask
        self._places = tokens + (samples.ends.numel() if document_mask else 0)
        if seed is not None and self._places < seq_len:
            raise InputError(
                f"the corpus has {tokens} training tokens, fewer than one sequence of"
                f" {seq_len}: give --data more text, or a smaller --seq-len"
            )
        self.seq_len = min(seq_len, self._places)
        self.count = max(self._places // (self.seq_len - 1), 1)
        if seed is None:
            self.count = (self._places - 1) // (self.seq_len - 1)

    def read(self, numbers: Sequence[int]) -> Batch:
        """The windows with these numbers."""
        places = self._starts(numbers)[:, None] + torch.arange(self.seq_len)
        places %= self._places
        samples = torch.searchsorted(self._ends, places, right=True) + 1 if self._masked else 0
        ids = self._tokens[(places - samples) % self._tokens.numel()].long()
        labels = ids.clone()
        labels[:, 0] = IGNORE_INDEX
        batch = Batch(
            input_ids=ids, labels=labels, targets=self.targets(numbers), tokens=ids.numel()
        )
        if not self._masked:
            return batch
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = torch.as_tensor(samples).diff(dim=1) != 0
        labels[begins] = IGNORE_INDEX
        return dataclasses.replace(batch, **_segments(begins.flatten().nonzero().flatten(), ids))

    def targets(self, numbers: Sequence[int]) -> int:
        """Every token of a window but the first, and but those that begin a sample."""
        targets = len(numbers) * (self.seq_len - 1)
        if self._masked:
            first = self._starts(numbers) % self._places
            last = first + self.seq_len - 1
            begun = self._begun(last) - self._begun(first)
            targets -= int(begun.sum())
        return targets

    def _begun(self, places: torch.Tensor) -> torch.Tensor:
        """How many samples have begun after the first one, up to and at a place; twice around."""
        around, inside = places // self._places, places % self._places
        begun = torch.searchsorted(self._ends, inside, right=True)
        return begun + around * self._ends.numel()

    def _starts(self, numbers: Sequence[int]) -> torch.Tensor:
        """Where the windows with these numbers begin on the ring."""
        if self._seed is None:
            return torch.tensor(numbers) * (self.seq_len - 1)
        starts = []
        for number in numbers:
            epoch, index = divmod(number, self.count)
            offset, order = epoch_order(self._seed, epoch, self._places, self.count)
            starts.append(offset + int(order[index]) * (self.seq_len - 1))
        return torch.tensor(starts)


class PlannedRows:
    """Rows of a plan: samples, packed or each in a row of its own, and padding behind them."""

    def __init__(self, samples: Samples, plan: Plan, *, seed: int | None, padding: int) -> None:
        """Prepare to read rows.

        Args:
            samples: What the plan was made of.
            plan: Which samples share a row.
            seed: Chooses the order; None for the rows in order.
            padding: The token behind the last sample of a row; it is never predicted.
        """
        self._samples = samples
        self._plan = plan
        self._seed = seed
        self._padding = padding
        self.seq_len = plan.seq_len
        self.count = plan.rows

    def read(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers."""
        rows = self._rows(numbers)
        ends = self._plan.row_ends[rows]
        sizes = ends - torch.where(rows > 0, self._plan.row_ends[rows - 1], 0)
        pieces = ranges(ends - sizes, sizes)
        row_of_piece = torch.repeat_interleave(torch.arange(rows.numel()), sizes)
        return assemble(
            self._samples,
            self._plan.starts[pieces],
            self._plan.lengths[pieces],
            row_of_piece,
            shape=(rows.numel(), self.seq_len),
            padding=self._padding,
            # Alone in its row, a sample begins at place 0, and no token sees padding behind it.
            segments=self._plan.starts.numel() > self._plan.rows,
        )

    def targets(self, numbers: Sequence[int]) -> int:
        """As the plan has counted them."""
        return int(self._plan.targets[self._rows(numbers)].sum())

    def _rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """Which rows of the plan have these numbers."""
        if self._seed is None:
            return torch.tensor(numbers)
        rows = []
        for number in numbers:
            epoch, index = divmod(number, self.count)
            rows.append(int(epoch_order(self._seed, epoch, 1, self.count)[1][index]))
        return torch.tensor(rows)


class MixedRows:
    """Rows of several splits in fixed proportions: of every 1,000 each gives its share."""

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float], *, seed: int) -> None:
        """Prepare to read rows.

        Args:
            parts: What is mixed; all with the same seq_len. Each goes through epochs of its own.
            weights: Share of the rows that each one gives, up to a factor.
            seed: Chooses the order within 1,000 rows.

        Raises:
            InputError: A share is less than one row in 1,000.
        """
        self._parts = list(parts)
        self._seed = seed
        self._shares = _apportion(weights)
        self.seq_len = parts[0].seq_len
        # Rows until the mixture has gone through as many as the parts hold together.
        self.count = sum(part.count for part in parts)

    def read(self, numbers: Sequence[int]) -> Batch:
        """The rows with these numbers, part by part."""
        inner = self._inner(numbers)
        batches = [p.read(n) for p, n in zip(self._parts, inner, strict=True) if n]
        return type(batches[0]).joined(batches)

    def targets(self, numbers: Sequence[int]) -> int:
        """The sum over the parts."""
        inner = self._inner(numbers)
        return sum(p.targets(n) for p, n in zip(self._parts, inner, strict=True) if n)

    def _inner(self, numbers: Sequence[int]) -> list[list[int]]:
        """For each part the numbers of its rows."""
        inner: list[list[int]] = [[] for _ in self._parts]
        for number in numbers:
            block, place = divmod(number, _BLOCK)
            part, before = _mixed_block(self._seed, block, tuple(self._shares))[place]
            inner[part].append(block * self._shares[part] + before)
        return inner


class BatchSampler:
    """The rows that one process trains on, step by step."""

    def __init__(self, rows: Rows, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Prepare to read batches.

        Args:
            rows: What batches are made of.
            batch_size: Rows of all processes together.
            rank: Number of this process.
            world_size: Number of processes.

        Raises:
            InputError: Rows that processes cannot share evenly.
        """
        if batch_size % world_size:
            fitting = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
            raise InputError(
                f"batch_size {batch_size} is not a multiple of the {world_size} processes: start"
                f" one of {', '.join(fitting)}, or a new run with another --batch-size"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.seq_len = rows.seq_len
        self._share = batch_size // world_size
        self._rank = rank

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """This process's rows of step 0, 1, …, or the given one of equal parts of them.

        Raises:
            InputError: Rows that parts cannot share evenly.
        """
        if self._share % parts:
            raise InputError(
                f"the {self._share} rows of a process are not a multiple of {parts} micro-batches"
            )
        size = self._share // parts
        first = step * self.batch_size + self._rank * self._share + part * size
        return self.rows.read(range(first, first + size))

    def parts(self, micro_batch_size: int) -> int:
        """Into how many parts of so many rows this process's share of a step falls.

        Raises:
            InputError: The share is more than one part, but not a whole number of them.
        """
        if micro_batch_size >= self._share:
            return 1
        if self._share % micro_batch_size:
            fitting = [str(n) for n in range(1, self._share + 1) if self._share % n == 0]
            raise InputError(
                f"micro_batch_size {micro_batch_size} does not divide the {self._share} rows of a"
                f" process: use one of {', '.join(fitting)}"
            )
        return self._share // micro_batch_size

    def targets(self, step: int) -> int:
        """Predictions of all processes in one step."""
        return self.rows.targets(range(step * self.batch_size, (step + 1) * self.batch_size))

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through all rows."""
        return steps * self.batch_size / self.rows.count


def assemble(
    samples: Samples,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    row_of_piece: torch.Tensor,
    *,
    shape: tuple[int, int],
    padding: int,
    segments: bool = True,
) -> Batch:
    """Lay pieces of samples into rows, one behind the other, and pad the rows.

    Args:
        samples: What the pieces are cut from; its tokens are a ring.
        starts: [P] int64, where each piece begins.
        lengths: [P] int64, at least 1.
        row_of_piece: [P] int64, ascending.
        shape: (B, T); the pieces of a row have at most T tokens together.
        padding: The token that fills the rows.
        segments: Whether to bound the pieces, which rows of one piece do not need.

    Returns:
        The batch; the first token of a piece is no target, and padding is a segment of its own.
    """
    rows, seq_len = shape
    used = torch.zeros(rows, dtype=torch.int64).index_add_(0, row_of_piece, lengths)
    ends = lengths.cumsum(0)
    # Where pieces begin among the N places: behind the pieces before them and the padding of rows.
    padding_before = torch.cat([used.new_zeros(1), (seq_len - used).cumsum(0)])
    begins = ends - lengths + padding_before[row_of_piece]
    places = ranges(begins, lengths)
    sources = ranges(starts, lengths) % samples.tokens.numel()
    input_ids = torch.full((rows * seq_len,), padding)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    tokens = samples.tokens[sources].long()
    input_ids[places] = tokens
    if samples.targets is not None:
        tokens = torch.where(samples.targets[sources] > 0, tokens, IGNORE_INDEX)
    labels[places] = tokens
    labels[begins] = IGNORE_INDEX
    input_ids = input_ids.view(rows, seq_len)
    bounded = {}
    if segments:
        padded = (torch.arange(rows) * seq_len + used)[used < seq_len]
        bounded = _segments(torch.cat([begins, padded]).sort().values, input_ids)
    return Batch(
        input_ids=input_ids,
        labels=labels.view(rows, seq_len),
        targets=int((labels != IGNORE_INDEX).sum()),
        tokens=int(ends[-1]),
        **bounded,
    )


def join(batches: Sequence[Batch]) -> Batch:
    """One batch with the rows of several."""
    if len(batches) == 1:
        return batches[0]
    ids = torch.cat([batch.input_ids for batch in batches])
    segments = {}
    if any(batch.cu_seqlens is not None for batch in batches):
        first = 0
        bounds = []
        for batch in batches:
            size = batch.input_ids.numel()
            whole_rows = torch.arange(0, size, batch.input_ids.shape[1])
            own = whole_rows if batch.cu_seqlens is None else batch.cu_seqlens[:-1].long()
            bounds.append(own + first)
            first += size
        segments = _segments(torch.cat(bounds), ids)
    return Batch(
        input_ids=ids,
        labels=torch.cat([batch.labels for batch in batches]),
        targets=sum(batch.targets for batch in batches),
        tokens=sum(batch.tokens for batch in batches),
        **segments,
    )


def validation_numbers(rows: Rows, budget: int) -> list[int]:
    """Rows spread evenly over a split, with about `budget` predictions in all, at least one row."""
    count = max(1, min(rows.count, budget // (rows.seq_len - 1)))
    return [i * rows.count // count for i in range(count)]


def _segments(bounds: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """cu_seqlens and position_ids of segments that begin at `bounds` [S] among all tokens."""
    total = ids.numel()
    cu_seqlens = torch.cat([bounds, bounds.new_tensor([total])])
    positions = ranges(torch.zeros_like(bounds), cu_seqlens.diff())
    return {"cu_seqlens": cu_seqlens.int(), "position_ids": positions.view_as(ids)}


def ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """starts[0], starts[0] + 1, … (lengths[0] of them), then those of starts[1], and so on."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def _generator(*key: int) -> torch.Generator:
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@functools.lru_cache(maxsize=8)  # a batch touches two epochs of a split at most
def epoch_order(seed: int, epoch: int, places: int, rows: int) -> tuple[int, torch.Tensor]:
    """Where an epoch starts among `places`, and the order of its rows."""
    generator = _generator(seed, epoch)
    offset = int(torch.randint(places, (), generator=generator))
    return offset, torch.randperm(rows, generator=generator)


@functools.lru_cache(maxsize=4)
def _mixed_block(seed: int, block: int, shares: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each of the rows of a block: its part, and how many rows of that part came before."""
    parts = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    order = parts[torch.randperm(_BLOCK, generator=_generator(seed, block, -1))].tolist()
    seen = [0] * len(shares)
    placed = []
    for part in order:
        placed.append((part, seen[part]))
        seen[part] += 1
    return placed


def _apportion(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights` that sum to 1,000: largest remainders."""
    exact = [_BLOCK * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: _BLOCK - sum(shares)]:
        shares[i] += 1
    if not all(shares):
        raise InputError(
            f"weight {min(weights):g} is less than a thousandth of all: give that source a larger"
            " --weights, or leave it out"
        )
    return shares
