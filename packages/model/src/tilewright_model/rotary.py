"""Cosines and sines of the rotary position embedding, computed once for a model.

RoPE (Su et al. 2021, arXiv:2104.09864) in the split-half form of Llama's weights: dimension i of a
head turns together with dimension i + D/2, by the angle t · f_i at position t. The turn itself is
`tilewright_kernels.apply_rotary_emb`, the frequencies f are `rope_scaling`'s; here are the tables.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tilewright_model.rope_scaling import RopeScaling, rotary_frequencies


class RotaryTables(nn.Module):
    """`cos` and `sin`, [max_positions, head_dim / 2] float32, moved with the model.

    They stay float32 whatever the model is cast to (in bfloat16 each cosine would be off by up to
    2⁻⁹), and they are not part of a checkpoint: they follow from the configuration.

    Args:
        head_dim: D, even.
        max_positions: rows of the tables.
        theta: base of the frequencies.
        scaling: of the frequencies, or None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.theta = theta
        self.scaling = scaling
        cos, sin = rotary_tables(head_dim, max_positions, theta, scaling)
        device = torch.get_default_device()
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Rows `start` to `start + length` of both tables, as views."""
        return self.cos[start : start + length], self.sin[start : start + length]

    def extra_repr(self) -> str:
        """What `print(model)` says of the tables."""
        scaled = f", scaling={self.scaling.rope_type}" if self.scaling else ""
        return f"{self.head_dim}, max_positions={self.max_positions}, theta={self.theta}{scaled}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTables":
        # Every cast and move of a module comes through here. Only the device is taken over:
        # .to(bfloat16) would round the tables, and to_empty(), after construction on the meta
        # device, would leave them unwritten.
        super()._apply(fn, recurse)
        device = self.cos.device
        cos, sin = rotary_tables(self.head_dim, self.max_positions, self.theta, self.scaling)
        self.cos, self.sin = cos.to(device), sin.to(device)
        return self


def rotary_tables(
    head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t · f_i, each [max_positions, head_dim / 2] float32.

    Frequencies and angles are rounded to float32, as in the code that trained the public Llama
    checkpoints, so that their logits come out the same. Angles in float64, as
    `tilewright_kernels.RotaryEmbedding` has them, are closer to the formula and differ from those
    by up to 2e-3 at position 32768. Computed on the CPU: every device holds the same bits.
    """
    positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, rotary_frequencies(head_dim, theta, scaling))
    factor = 1.0 if scaling is None else scaling.table_factor
    return angles.cos() * factor, angles.sin() * factor
