"""Scaled rotary frequencies: how a model is stretched beyond the length that it was trained on.

Pair i of a head of D dimensions turns by t · f_i at position t, f_i = theta^(-2i/D). A sequence
s times as long shows the pairs that turn slowly angles they have never had. Each scaling lowers
frequencies, at most by the factor s:

    linear   f_i / s                                     (Chen et al. 2023, arXiv:2306.15595)
    ntk      theta' = theta · s^(D/(D-2)), so that f_0 stays and the last becomes f / s   (bloc97)
    yarn     f_i / s below beta_slow turns in the original length, f_i above beta_fast, a ramp
             between; scores grow by (0.1 ln s + 1)²     (Peng et al. 2023, arXiv:2309.00071)
    llama3   the same with bounds on the wavelength: those of more than L / low_freq_factor
             tokens are divided by s, those of less than L / high_freq_factor stay   (Llama 3.1)

All in float32 and in the order of operations of the code that trained the public checkpoints, so
that logits come out the same.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RopeType = Literal["linear", "ntk", "yarn", "llama3"]

ROPE_TYPES: tuple[str, ...] = get_args(RopeType)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One scaling with its constants; names are those of Hugging Face's `rope_parameters`.

    Raises:
        ValueError: an unknown type, a value out of range, a length that yarn or llama3 misses.
        TypeError: a value that is not a number.
    """

    rope_type: RopeType
    """Which formula."""

    factor: float
    """s, how many times as long sequences become; 1 or more."""

    original_max_position_embeddings: int | None = None
    """L, tokens of the training sequences; yarn and llama3 need it."""

    low_freq_factor: float = 1.0
    """llama3: pairs that turn less than so often within L are slowed down by all of s."""

    high_freq_factor: float = 4.0
    """llama3: pairs that turn more often within L stay as they are."""

    beta_fast: float = 32.0
    """yarn: pairs that turn more often within L stay as they are."""

    beta_slow: float = 1.0
    """yarn: pairs that turn less often within L are slowed down by all of s."""

    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; None is 0.1 ln s + 1."""

    truncate: bool = True
    """yarn: round the bounds of the ramp to whole pairs."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {self.rope_type!r}: choose one of {', '.join(ROPE_TYPES)}, "
                f"or rope_scaling=None for unscaled frequencies"
            )
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        for name in numbers if self.attention_factor is None else (*numbers, "attention_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"rope_scaling: {name} is {value!r}: give a number")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"rope_scaling: {name} is {value}: give a number above 0")
        if self.factor < 1:
            raise ValueError(f"rope_scaling: factor is {self.factor}: give 1 or more")
        self._check_bounds()

    def _check_bounds(self) -> None:
        length = self.original_max_position_embeddings
        if length is None and self.rope_type in ("yarn", "llama3"):
            raise ValueError(
                f"rope_scaling: {self.rope_type} needs original_max_position_embeddings, the "
                f"length that the model was trained on"
            )
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(
                f"rope_scaling: original_max_position_embeddings is {length!r}: give tokens"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by: 1 but for yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles a position, [head_dim / 2] float32 on the CPU.

    Args:
        head_dim: D, even; above 2 for ntk.
        theta: base of the frequencies.
        scaling: how they are stretched, or None.
    """
    if scaling is not None and scaling.rope_type == "ntk":
        theta = ntk_theta(head_dim, theta, scaling.factor)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    periods = theta**exponents
    frequencies = 1.0 / periods
    if scaling is None or scaling.rope_type == "ntk":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        stays = 1 - _yarn_ramp(head_dim, theta, scaling)
        return 1.0 / (scaling.factor * periods) * (1 - stays) + frequencies * stays
    return _llama3(frequencies, scaling)


def ntk_theta(head_dim: int, theta: float, factor: float) -> float:
    """The base with which the slowest pair turns `factor` times slower and the fastest as before.

    Raises:
        ValueError: a head of one pair has no slowest and fastest.
    """
    if head_dim <= 2:
        raise ValueError(f"head_dim {head_dim} is one pair, which ntk cannot scale: use linear")
    return theta * factor ** (head_dim / (head_dim - 2))


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """[D / 2]: 0 for pairs that stay, 1 for those that are slowed down by all of the factor."""
    length = scaling.original_max_position_embeddings
    assert length is not None

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / (high - low)).clamp(0, 1)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    length, factor = scaling.original_max_position_embeddings, scaling.factor
    assert length is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / factor
    smooth = (length / wavelengths - low) / (high - low)
    between = (1 - smooth) * slowed + smooth * frequencies
    scaled = torch.where(wavelengths > length / low, slowed, between)
    return torch.where(wavelengths < length / high, frequencies, scaled)
