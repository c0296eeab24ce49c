"""Which tokens make a batch: a pure function of the seed and the number of the step.

The training tokens are a ring. An epoch starts somewhere on it, cuts it into windows of `seq_len`
that overlap by one token (a window predicts all its tokens but the first, so every token is
predicted once) and visits them in random order. Nothing is remembered between steps: a run that
goes on at step s reads what it would have read, and any number of processes shares one batch.
"""

import functools
import hashlib

import torch

from tilewright_train.errors import InputError


class BatchSampler:
    """The rows that one process trains on, step by step."""

    def __init__(
        self,
        tokens: torch.Tensor,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare to read batches.

        Args:
            tokens: [N] integer.
            batch_size: Rows of all processes together.
            seq_len: Tokens a row.
            seed: Chooses the order.
            rank: Number of this process.
            world_size: Number of processes.

        Raises:
            InputError: Fewer tokens than a row, or rows that processes cannot share evenly.
        """
        if tokens.numel() < seq_len:
            raise InputError(
                f"the corpus has {tokens.numel()} training tokens, fewer than one sequence of"
                f" {seq_len}: give --data more text, or a smaller --seq-len"
            )
        if batch_size % world_size:
            raise InputError(
                f"batch_size {batch_size} is not a multiple of the {world_size} processes"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        share = batch_size // world_size
        self._mine = range(rank * share, (rank + 1) * share)
        self.windows = max(tokens.numel() // (seq_len - 1), 1)  # of one epoch

    def rows(self, step: int) -> torch.Tensor:
        """This process's rows of step 0, 1, …: [batch_size / world_size, seq_len] int64."""
        starts = [self._start(step * self.batch_size + row) for row in self._mine]
        positions = torch.tensor(starts)[:, None] + torch.arange(self.seq_len)
        return self.tokens[positions % self.tokens.numel()].long()

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through all tokens."""
        return steps * self.batch_size / self.windows

    def _start(self, window: int) -> int:
        """Where the window with this number, counted through all epochs, begins on the ring."""
        epoch, index = divmod(window, self.windows)
        offset, order = _epoch_order(self.seed, epoch, self.tokens.numel(), self.windows)
        return offset + int(order[index]) * (self.seq_len - 1)


@functools.lru_cache(maxsize=4)  # a batch touches two epochs at most
def _epoch_order(seed: int, epoch: int, tokens: int, windows: int) -> tuple[int, torch.Tensor]:
    """Where an epoch starts on the ring, and the order of its windows."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    offset = int(torch.randint(tokens, (), generator=generator))
    return offset, torch.randperm(windows, generator=generator)


def validation_rows(tokens: torch.Tensor, seq_len: int, budget: int) -> torch.Tensor:
    """The rows of the validation loss: windows spread evenly over the tokens, always the same.

    Args:
        tokens: [M] integer.
        seq_len: Tokens a row; fewer where there are not as many.
        budget: Predictions to make in all, about.

    Returns:
        [R, min(seq_len, M)] int64, R at least 1. No token is predicted twice.

    Raises:
        InputError: Fewer than two tokens.
    """
    count = tokens.numel()
    if count < 2:
        raise InputError(
            f"the corpus has {count} validation tokens, too few to predict one: give --data more"
            " text, or a larger --validation-fraction"
        )
    length = min(seq_len, count)
    windows = (count - 1) // (length - 1)
    rows = max(1, min(windows, budget // (length - 1)))
    starts = torch.arange(rows) * windows // rows * (length - 1)
    return tokens[starts[:, None] + torch.arange(length)].long()
