"""Where each token stands: rotary tables, positions and the bounds of packed sequences.

One `Positions` is made for a forward and read by every block. Padded batches become packed ones:
the tokens of a row and the padding beside them are two sequences of their own, so that no token
sees padding, no mask of T × T elements is made and nothing waits for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Positions(NamedTuple):
    """What attention has to know of a batch besides its hidden states."""

    cos: Tensor | None = None
    """Rotary table, [P, D/2] float32: row t is token t's unless `ids` says; None without RoPE."""
    sin: Tensor | None = None
    """As cos."""
    ids: Tensor | None = None
    """[B, T], rows of the tables."""
    cu_seqlens: Tensor | None = None
    """[S + 1] int32: bounds of the sequences among the B·T tokens, or None: each row is one."""
    max_seqlen: int = 0
    """With cu_seqlens: no sequence is longer."""


def padded_cu_seqlens(attention_mask_BT: Tensor) -> Tensor:
    """Bounds of the sequences of a padded batch, two a row: padding and tokens, either first.

    Args:
        attention_mask_BT: 1 or true for tokens, 0 for padding on one side of them.

    Returns:
        [2B + 1] int32.

    Raises:
        ValueError: not two-dimensional, or, on the CPU, padding between tokens. On other devices
            that check fails asynchronously, since reading the mask would wait for them.
    """
    if attention_mask_BT.ndim != 2:
        raise ValueError(f"attention_mask is {list(attention_mask_BT.shape)}: give [B, T]")
    mask_BT = attention_mask_BT.bool()
    B, T = mask_BT.shape
    _check_contiguous(mask_BT)
    real_B = mask_BT.sum(1, dtype=torch.int32)
    # Where the row changes: after the tokens if it starts with one, else after the padding.
    change_B = torch.where(mask_BT[:, 0], real_B, T - real_B)
    starts_B = torch.arange(0, B * T, T, dtype=torch.int32, device=mask_BT.device)
    bounds = torch.stack([starts_B, starts_B + change_B], dim=1).flatten()
    return torch.cat([bounds, bounds.new_full((1,), B * T)])


def _check_contiguous(mask_BT: Tensor) -> None:
    one_change = (mask_BT[:, 1:] != mask_BT[:, :-1]).sum(1) <= 1
    if mask_BT.is_cuda:
        torch._assert_async(one_change.all(), "attention_mask has padding between tokens")
    elif not mask_BT.is_meta and not bool(one_change.all()):
        row = int((~one_change).nonzero()[0])
        raise ValueError(
            f"attention_mask of row {row} has padding between or on both sides of its tokens: pad "
            f"on one side, or pack the tokens and give cu_seqlens"
        )


class SinusoidalPositions(nn.Module):
    """sin and cos of t / 10000^(2i/C) added to the embeddings (Vaswani et al. 2017).

    The table, [max_positions, C] float32, sines in the first half, has the variance that the token
    embeddings start with, so that positions do not drown tokens; it is no part of a checkpoint.

    Args:
        max_positions: rows.
        hidden_size: C.
        std: of the token embeddings at the start.
    """

    table: Tensor

    def __init__(self, max_positions: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.max_positions, self.hidden_size, self.std = max_positions, hidden_size, std
        self.register_buffer("table", self._make(torch.get_default_device()), persistent=False)

    def _make(self, device: torch.device) -> Tensor:
        half = (self.hidden_size + 1) // 2
        exponents = torch.arange(half, dtype=torch.float32, device="cpu") / half
        positions = torch.arange(self.max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, 10000.0**-exponents)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, : self.hidden_size]
        return (waves * (self.std * 2**0.5)).to(device)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] positions to [..., C]."""
        return self.table[ids]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SinusoidalPositions":
        # As of the rotary tables only the device is taken over; to_empty() leaves values unwritten.
        super()._apply(fn, recurse)
        self.table = self._make(self.table.device)
        return self
