"""Tables of cosines and sines for `apply_rotary_emb`, and a module that holds them.

Pair i of a head of which R dimensions turn has the angle t · theta^(-2i/R) at position t (Su et al.
2021, arXiv:2104.09864). Angles are computed in float64 and the tables rounded once: an angle in
float32 is off by up to 2⁻²⁴ of itself, which is 0.002 radian at position 32768. Scaled frequencies
(linear, NTK, YaRN) are not here: any float32 tables of this shape will do for `apply_rotary_emb`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright_kernels.apply_rotary_emb import apply_rotary_emb


def rotary_table(
    dim: int, length: int, theta: float = 10000.0, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t · theta^(-2i/dim) for t < length and i < dim / 2.

    Args:
        dim: R, the dimensions of a head that turn; even.
        length: P, positions.
        theta: base of the frequencies.
        device: where the tables go; None takes torch's default device. They are always computed on
            the CPU, so that every device holds the same bits.

    Returns:
        cos and sin, each [length, dim / 2] float32.

    Raises:
        ValueError: dim is odd or not positive, length is negative, theta is not positive.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; rotation takes pairs of dimensions, so give an even dim")
    if length < 0:
        raise ValueError(f"length is {length}; give the number of positions, 0 or more")
    if not theta > 0:
        raise ValueError(f"theta is {theta}; give a positive base, for example 10000.0")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, theta**-exponents)
    device = torch.get_default_device() if device is None else device
    return angles.cos().float().to(device), angles.sin().float().to(device)


class RotaryEmbedding(torch.nn.Module):
    """`apply_rotary_emb` with tables of its own.

    The tables are buffers outside the state_dict: they follow from the arguments. They move with
    the module and stay float32 whatever it is cast to, because bfloat16 has too few digits to tell
    neighbouring positions apart.

    Args:
        dim: R, the dimensions of a head that turn; even. The rest of a head is handed through.
        length: P, rows of the tables: the longest sequence, and one more than the largest position.
        theta: base of the frequencies.
        interleaved: whether a pair is dimensions (2i, 2i + 1) instead of (i, i + R/2).
        device: where the tables are; None takes torch's default device.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        length: int,
        theta: float = 10000.0,
        *,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.length, self.theta = dim, length, theta
        self.interleaved = interleaved
        cos, sin = rotary_table(dim, length, theta, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn q [B, T, H, D] and k [B, T, K, D], or packed [N, ., D], as `apply_rotary_emb`."""
        return apply_rotary_emb(
            q, k, self.cos, self.sin, position_ids=position_ids, cu_seqlens=cu_seqlens,
            interleaved=self.interleaved,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, for `print(model)`."""
        return f"{self.dim}, {self.length}, theta={self.theta}, interleaved={self.interleaved}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # Every cast and every move comes through here. Where fn makes a new tensor, only its device
        # is kept: .to(bfloat16) would round the tables, to_empty() leaves them unset. What stays
        # the same tensor, as under share_memory(), stays.
        cos = self.cos
        super()._apply(fn, recurse)
        if self.cos is not cos:
            device = self.cos.device
            self.cos, self.sin = rotary_table(self.dim, self.length, self.theta, device=device)
        return self
