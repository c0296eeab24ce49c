"""An optimizer of parameters that fully_shard has divided: a rank's rows are plain tensors to it.

torch's fully_shard cuts every parameter into rows, as DTensors. An optimizer that treats every
element by itself needs nothing of that: given the rows as tensors it runs as it would alone, fused
kernels included, which take no DTensor. States leave and come back whole, under one numbering with
the undivided optimizer, so that a checkpoint knows nothing of ranks.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from tilewright_dist import sharded_state
from tilewright_dist.channel import collective_errors
from tilewright_dist.divided_optimizer import DividedOptimizer
from tilewright_dist.failure import naming_the_missing
from tilewright_dist.param_groups import options_of


class FullyShardedOptimizer(DividedOptimizer):
    """Steps an optimizer on this rank's rows of the parameters.

    Its groups hold the module's parameters, so schedules and clipping see them as usual, and its
    results are those of the undivided optimizer. Gradients may be scaled: `grad_scale` and
    `found_inf`, while set, are passed on.

    Args:
        optimizer: Of DTensors, made for the whole module, without a step yet; it is taken over.
        module: What `fully_shard` was applied to last, the root.

    Raises:
        ValueError: The optimizer has states, or a parameter is not divided into rows.
    """

    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        if any(optimizer.state.values()):
            raise ValueError("the optimizer has states: divide it before its first step")
        groups = [dict(group) for group in optimizer.param_groups]
        self._root = module
        self._inner = optimizer
        self._divided: list[DTensor] = [_divided(p) for g in groups for p in g["params"]]
        with torch.no_grad():
            self._rows = [
                nn.Parameter(p.to_local(), requires_grad=p.requires_grad) for p in self._divided
            ]
        # Weakly, as DistributedDataParallel explains.
        self._group_reference = weakref.ref(self._divided[0].device_mesh.get_group())
        rows = iter(self._rows)
        optimizer.param_groups.clear()
        optimizer.state.clear()
        for group in groups:
            mine = [next(rows) for _ in group["params"]]
            optimizer.add_param_group(options_of(group) | {"params": mine})
        super().__init__(
            [options_of(g) | {"params": g["params"]} for g in groups], optimizer.defaults
        )
        self._pull_options()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore
        """Update this rank's rows.

        Args:
            closure: Computes the loss anew and returns it.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._push_options()
        for parameter, rows in zip(self._divided, self._rows, strict=True):
            mine = parameter.to_local()
            if rows.data_ptr() != mine.data_ptr():  # the first forward pads uneven rows
                rows.data = mine
            rows.grad = None if parameter.grad is None else _local(parameter.grad)
        with self._scaled() as sound:
            if sound:
                self._inner.step()
        for rows in self._rows:
            rows.grad = None
        self._pull_options()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero the gradients of all parameters."""
        super().zero_grad(set_to_none)
        self._inner.zero_grad(set_to_none)  # it may keep the last ones

    def local_gradients(self) -> list[torch.Tensor]:
        """This rank's rows of the gradients that there are."""
        return [_local(p.grad) for p in self._divided if p.grad is not None]

    def over_ranks(self, norm: torch.Tensor) -> torch.Tensor:
        """The Euclidean norm over all ranks, of each rank's own, 0-d. Collective."""
        squares = norm.double().square()
        with naming_the_missing(self._group, "the norm of all gradients"), collective_errors():
            dist.all_reduce(squares, group=self._group)
        return squares.sqrt().to(norm.dtype)

    def wait_for_parameters(self) -> None:
        """Have the module hold its parameters divided, as it does not after a forward alone."""
        assert isinstance(self._root, FSDPModule)
        self._root.reshard()

    def full_state_dict(self) -> dict[str, Any]:
        """On rank 0 what the undivided optimizer's state_dict would be, on the CPU. Collective.

        States travel one by one, so no device holds more than one tensor beside its own.

        Returns:
            An empty dict on other ranks.
        """
        whole: dict[int, dict[str, Any]] = {}
        with naming_the_missing(self._group, "gathering states"), collective_errors():
            for number, (parameter, rows) in enumerate(zip(self._divided, self._rows, strict=True)):
                for key, value in self._inner.state.get(rows, {}).items():
                    if isinstance(value, torch.Tensor) and value.dim() == 0:
                        value = value.detach().cpu().clone()
                    elif isinstance(value, torch.Tensor):
                        value = _gather_rows(self._divisible(key, value, rows), parameter)
                        value = None if value is None else value.cpu()
                    whole.setdefault(number, {})[key] = value
        if self._group.rank() != 0:
            return {}
        return super().state_dict() | {"state": whole}

    def state_dict(self) -> dict[str, Any]:
        """This rank's states; loads on as many ranks. See `full_state_dict`."""
        return super().state_dict() | {"state": self._inner.state_dict()["state"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyrefly: ignore
        """Load what `full_state_dict` gave, or an undivided optimizer; or `state_dict` of as many.

        Raises:
            ValueError: A state that is neither whole nor this rank's.
        """
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"{len(saved)} groups were saved, {len(self.param_groups)} are here")
        states = {
            number: {key: self._cut(key, value, number) for key, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": states, "param_groups": groups})
        for mine, theirs in zip(self.param_groups, saved, strict=True):
            mine |= sharded_state.restored(theirs, mine)
        self._push_options()

    def _cut(self, key: str, value: Any, number: int) -> Any:
        """This rank's rows of a whole state."""
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        parameter = self._divided[number]
        if value.shape == parameter.shape:
            return value[_rows_of(parameter)].clone()
        return self._divisible(key, value, self._rows[number])

    def _divisible(self, key: str, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if value.shape != rows.shape:
            raise ValueError(
                f"state {key!r} has shape {tuple(value.shape)} beside rows of shape "
                f"{tuple(rows.shape)}, so it cannot be divided by rows: use parallel='zero1'"
            )
        return value

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[bool]:
        """Whether to step; what GradScaler would set is passed on, or done here."""
        divisor = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not getattr(self._inner, "_step_supports_amp_scaling", False):
            gradients = [rows.grad for rows in self._rows if rows.grad is not None]
            if divisor is not None and gradients:
                torch._foreach_div_(gradients, divisor)
            yield found_inf is None or not bool(found_inf)
            return
        inner: Any = self._inner
        inner.grad_scale, inner.found_inf = divisor, found_inf
        try:
            yield True
        finally:
            inner.grad_scale = inner.found_inf = None


@torch.no_grad()
def gather_state_dict(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """A module's state_dict, whole, one tensor after another on rank 0's device. Collective.

    Args:
        module: Under fully_shard, or a part of it; its parameters are divided at the moment.

    Yields:
        Name and tensor; None in its place on other ranks.
    """
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, DTensor):
            yield name, tensor if dist.get_rank() == 0 else None
            continue
        group = tensor.device_mesh.get_group()
        with naming_the_missing(group, "gathering parameters"), collective_errors():
            whole = _gather_rows(tensor.to_local(), tensor)
        yield name, whole


@torch.no_grad()
def load_whole_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's rows of whole tensors into a module under fully_shard. Sends nothing.

    Raises:
        ValueError: Other names than the module's, or another shape.
    """
    own = module.state_dict()
    if different := own.keys() ^ state.keys():
        raise ValueError(f"{sorted(different)[0]!r} is not in both the module and what is loaded")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name!r} is {tuple(state[name].shape)}, not {tuple(tensor.shape)} as the module's"
            )
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(state[name][_rows_of(tensor)])
        else:
            tensor.copy_(state[name])


def _divided(parameter: torch.Tensor) -> DTensor:
    if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is not divided into rows over one "
            "dimension of ranks: apply fully_shard first, without a placement of its own"
        )
    return parameter


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _rows_of(tensor: DTensor) -> slice:
    """Those of this rank, as torch.chunk divides them: the last ranks may have fewer, or none."""
    most = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(tensor.shape[0], tensor.device_mesh.get_local_rank() * most)
    return slice(first, min(tensor.shape[0], first + most))


def _gather_rows(mine: torch.Tensor, like: DTensor) -> torch.Tensor | None:
    """All ranks' rows on rank 0's device, in the shape of `like`; None elsewhere. Collective."""
    group, shape = like.device_mesh.get_group(), like.shape
    row = math.prod(shape[1:]) * mine.dtype.itemsize
    most = -(-shape[0] // group.size()) * row
    # As bytes: no backend moves every dtype.
    data = torch.zeros(most, dtype=torch.uint8, device=mine.device)
    data[: mine.nbytes] = mine.detach().contiguous().view(-1).view(torch.uint8)
    if group.rank() != 0:
        dist.gather(data, group=group, group_dst=0)
        return None
    whole = torch.empty(most * group.size(), dtype=torch.uint8, device=mine.device)
    dist.gather(data, list(whole.chunk(group.size())), group=group, group_dst=0)
    return whole[: shape[0] * row].view(mine.dtype).view(shape)
