"""What Adam keeps for a parameter: made, and converted to the configured storage.

Keys are torch's (step, exp_avg, exp_avg_sq, max_exp_avg_sq); where the storage asks for it there
are also master_low (int16, `_rounding`), exp_avg_scale and exp_avg_sq_scale (float32,
`_blockwise`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tilewright_optim._blockwise import (
    dequantize_signed,
    dequantize_square,
    num_blocks,
    quantize_signed,
    quantize_square,
)
from tilewright_optim._rounding import random_bits

Master = Literal["none", "exact", "stochastic"]
StateDtype = torch.dtype | Literal["int8"] | None
State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How parameters and their averages are kept."""

    master: Master = "none"
    """Of bfloat16 parameters: nothing more, an exact float32 master, or stochastic rounding."""
    state_dtype: StateDtype = None
    """Of the averages; None is float32 beside an exact master, else the parameter's own."""

    def __post_init__(self) -> None:
        if self.master not in ("none", "exact", "stochastic"):
            raise ValueError(f"master is {self.master!r}; it is 'none', 'exact' or 'stochastic'")
        if self.state_dtype not in (None, torch.float32, torch.bfloat16, "int8"):
            raise ValueError(
                f"state_dtype is {self.state_dtype!r}; it is None, torch.float32, torch.bfloat16 "
                f"or 'int8'"
            )

    def check_amsgrad(self, amsgrad: bool) -> None:
        """Raise a ValueError if a running maximum is asked for that codes could not keep."""
        if amsgrad and self._coded:
            raise ValueError(
                "amsgrad is set and state_dtype is 'int8', in which a maximum would not stay one; "
                "use torch.bfloat16"
            )

    def master_of(self, param: Tensor) -> Master:
        """What is kept beside this parameter."""
        if param.dtype == torch.float16 and self.master != "none":
            raise TypeError(
                f"master is {self.master!r} and a parameter of shape {tuple(param.shape)} is "
                f"float16; give bfloat16 or float32 parameters, or master='none'"
            )
        return self.master if param.dtype == torch.bfloat16 else "none"

    def new(self, param: Tensor, *, amsgrad: bool) -> State:
        """Averages of zero, without a step."""
        state: State = {}
        if self._coded:
            blocks = num_blocks(param.numel())
            for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
                state[name] = torch.zeros_like(param, dtype=dtype)
                state[f"{name}_scale"] = torch.zeros(
                    blocks, dtype=torch.float32, device=param.device
                )
        else:
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
                state[name] = torch.zeros_like(param)
        self.convert(param, state)
        return state

    def convert(self, param: Tensor, state: State) -> None:
        """Bring a state from anywhere, such as torch's, into this storage; exact if it is there."""
        if "step" in state and not isinstance(state["step"], Tensor):
            state["step"] = torch.tensor(float(state["step"]))  # as torch before 1.12 had it
        coded = state["exp_avg"].dtype == torch.int8
        if coded and not self._coded:
            state["exp_avg"] = dequantize_signed(state["exp_avg"], state.pop("exp_avg_scale"))
            scale = state.pop("exp_avg_sq_scale")
            state["exp_avg_sq"] = dequantize_square(state["exp_avg_sq"], scale)
        if self._coded and not coded:
            _encode(state)
        exact = self.master_of(param) == "exact"
        dtype = torch.float32 if exact and self.state_dtype is None else self.state_dtype
        if isinstance(dtype, torch.dtype):
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if name in state:
                    state[name] = state[name].to(dtype)
        if exact and "master_low" not in state:
            state["master_low"] = torch.zeros_like(param, dtype=torch.int16)
        if not exact:
            state.pop("master_low", None)

    @property
    def _coded(self) -> bool:
        return self.state_dtype == "int8"


def _encode(state: State) -> None:
    v = state["exp_avg_sq"]
    state["exp_avg"], state["exp_avg_scale"] = quantize_signed(state["exp_avg"])
    random = random_bits(v.numel(), 0, torch.zeros((), device=v.device))
    state["exp_avg_sq"], state["exp_avg_sq_scale"] = quantize_square(v, random)


def pack_steps(states: Iterable[State]) -> None:
    """Make the step counts of one device views of one tensor, which one addition advances."""
    by_kind: dict[Any, list[State]] = {}
    for state in states:
        if "step" in state:
            # Those of one launch lie together, although a model mixes dtypes.
            step, average = state["step"], state["exp_avg"]
            kind = step.device, step.dtype, average.dtype, "master_low" in state
            by_kind.setdefault(kind, []).append(state)
    for alike in by_kind.values():
        together = torch.stack([state["step"] for state in alike])
        for state, step in zip(alike, together.unbind(), strict=True):
            state["step"] = step


def as_one(steps: list[Tensor]) -> Tensor | None:
    """The tensor that these are all elements of, in order, or None."""
    first = steps[0]
    size, start = first.element_size(), first.data_ptr()
    places = list(range(start, start + size * len(steps), size))
    storage = first.untyped_storage()
    end = storage.data_ptr() + storage.nbytes()
    if list(map(Tensor.data_ptr, steps)) != places or places[-1] + size > end:
        return None
    return first.as_strided((len(steps),), (1,))
