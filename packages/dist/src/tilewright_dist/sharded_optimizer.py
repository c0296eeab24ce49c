"""ShardedOptimizer: ZeRO's first stage, where each rank keeps the states of its own part.

Plain data parallelism has every rank hold all optimizer states and compute the same update. Here a
rank holds states for a W-th of the parameters, updates those, and all ranks gather the result
(Rajbhandari et al. 2020, arXiv:1910.02054). Per parameter in float32 with Adam that is
4 + 4 + 8/W bytes instead of 16.

Given the DistributedDataParallel wrapper, gradients are not all-reduced: each rank receives the
averages of its own part only, straight from the buckets, and parameters are gathered while the next
forward pass begins. The bytes on the wire stay what they were, a reduce-scatter and an all-gather.

Here: the optimizer itself. Memory is in `shards.py`, states on disk in `sharded_state.py`, the late
waiting in `overlap.py`.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import sharded_state
from tilewright_dist.bucketed import BucketedReducer
from tilewright_dist.buckets import describe, shared_memory
from tilewright_dist.channel import collective_errors
from tilewright_dist.data_parallel import DistributedDataParallel, checked_process_group
from tilewright_dist.divided_optimizer import DividedOptimizer
from tilewright_dist.failure import naming_the_missing
from tilewright_dist.layout import BucketLayout, Partition, Segment, plan_buckets
from tilewright_dist.overlap import LateGather
from tilewright_dist.param_groups import named_groups, options_of, unnamed
from tilewright_dist.peers import PeerBuffer, made_by_all
from tilewright_dist.shards import Shard
from tilewright_dist.watchdog import watched_channel

Tensors = Mapping[str, torch.Tensor]

BUCKET_BYTES = 25 * 2**20
"""Of parameters gathered together where no wrapper says otherwise."""

ELEMENTWISE = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop"}
    | {"Rprop", "ASGD"}
)
"""Classes, torch's and ours, that treat every element by itself: their tensors may be cut."""


class ShardedOptimizer(DividedOptimizer):
    """An optimizer whose states are divided among the ranks.

    Its results are those of `optimizer_cls` on one process, bit for bit, since a part is updated as
    it would be in the whole. Only `max_grad_norm` adds in another order.

    On several ranks no GradScaler can step it: bfloat16 needs none.

    Construction, `step`, `full_state_dict` and `add_param_group` are collective. Parameters become
    views of flat buckets; build the optimizer before anything keeps their storage.

    Args:
        params: As any optimizer's: parameters, named parameters or groups.
        optimizer_cls: Class of the optimizer that updates this rank's part.
        process_group: The ranks; None is that of `ddp`, or the default group.
        partition: "flat" cuts through tensors into equal parts, for element-wise optimizers;
            "matrix" gives each tensor one owner, balanced by the cost of orthogonalizing it; "auto"
            chooses for each group: flat where the group's `kind` is "adamw" or, without a kind,
            where the class is known to be element-wise.
        ddp: The wrapper that averages the gradients, strategy "bucketed": it scatters them from now
            on, and `.grad` is defined for this rank's part only. None: `.grad` holds whole averages
            already.
        overlap_gather: With ddp, let the next forward wait for each part as it needs it. Who reads
            parameters otherwise between step and forward calls `wait_for_parameters` first.
        max_grad_norm: Clip by the norm of all gradients, over all ranks.
        **optimizer_kwargs: For optimizer_cls.

    Raises:
        ValueError: An unknown partition; a wrapper of another strategy, or one that does not hold
            the parameters; max_grad_norm for the inner optimizer, which sees a part.
    """

    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: type[torch.optim.Optimizer],
        *,
        process_group: dist.ProcessGroup | None = None,
        partition: Literal["auto", "flat", "matrix"] = "auto",
        ddp: DistributedDataParallel | None = None,
        overlap_gather: bool = True,
        max_grad_norm: float | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        self._set_up(
            params,
            optimizer_cls,
            lambda groups: optimizer_cls(groups, **optimizer_kwargs),
            process_group=process_group,
            partition=partition,
            ddp=ddp,
            overlap_gather=overlap_gather,
            max_grad_norm=max_grad_norm,
        )

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        process_group: dist.ProcessGroup | None = None,
        partition: Literal["auto", "flat", "matrix"] = "auto",
        ddp: DistributedDataParallel | None = None,
        overlap_gather: bool = True,
        max_grad_norm: float | None = None,
    ) -> "ShardedOptimizer":
        """Shard an optimizer that was built for the whole module and has not stepped yet.

        The optimizer is taken over: it updates this rank's part from now on.

        Raises:
            ValueError: As the constructor; or the optimizer has states already.
        """
        if any(optimizer.state.values()):
            raise ValueError("the optimizer has states: shard it before its first step")

        def take_over(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            optimizer.param_groups.clear()
            optimizer.state.clear()
            for group in groups:
                optimizer.add_param_group(group)
            return optimizer

        self = cls.__new__(cls)
        self._set_up(
            [dict(group) for group in optimizer.param_groups],
            type(optimizer),
            take_over,
            process_group=process_group,
            partition=partition,
            ddp=ddp,
            overlap_gather=overlap_gather,
            max_grad_norm=max_grad_norm,
        )
        return self

    def _set_up(
        self,
        params: Iterable[Any],
        optimizer_cls: type[torch.optim.Optimizer],
        make_inner: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        process_group: dist.ProcessGroup | None,
        partition: Literal["auto", "flat", "matrix"],
        ddp: DistributedDataParallel | None,
        overlap_gather: bool,
        max_grad_norm: float | None,
    ) -> None:
        if partition not in ("auto", "flat", "matrix"):
            raise ValueError(f"unknown partition {partition!r}; valid: 'auto', 'flat', 'matrix'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, not {max_grad_norm}")
        self._partition: Literal["auto", "flat", "matrix"] = partition
        self._inner_class = optimizer_cls
        self._max_grad_norm = max_grad_norm
        self._ddp = ddp
        if process_group is None and ddp is not None:
            process_group = ddp.process_group
        # Weakly, as DistributedDataParallel explains.
        self._group_reference = weakref.ref(checked_process_group(process_group))
        self._reducer = _reducer_of(ddp)
        self.grad_norm: torch.Tensor | None = None
        """Norm of the last step's gradients before clipping, on the device; with max_grad_norm."""

        groups = named_groups(params, ddp, first=0)
        self._parameters = {n: p for group in groups for n, p in group["params"]}
        device = next(iter(self._parameters.values())).device
        self._device = device
        self._channel = watched_channel(self._group, device)
        self._peers = self._reducer.more_peers(self._group) if self._reducer is not None else None
        self._shards = self._make_shards(groups)
        self._inner = make_inner([self._inner_group(group) for group in groups])
        self._refuse_inner_clipping()
        self._is_set_up = False
        super().__init__([unnamed(group) for group in groups], self._inner.defaults)
        self._is_set_up = True
        self._pull_options()
        self._late = self._make_late_gather() if overlap_gather and ddp is not None else None

    @property
    def shared_bytes(self) -> int:
        """Memory that other ranks read, which torch.cuda.memory_allocated does not count."""
        return sum(shard.shared_bytes for shard in self._shards)

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse copies and pickles: the parameters are views that the ranks fill together.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a ShardedOptimizer cannot be copied or pickled, as the copy's parameters would not be "
            "gathered: save state_dict() or state_tensors(), and load them into a new one"
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore
        """Update this rank's part and start to gather the others'.

        Args:
            closure: Computes the loss anew and returns it.

        Returns:
            The closure's result.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._ddp is not None:
            self._ddp.finish_if_arrived()
        self.wait_for_parameters()
        self._push_options()
        for shard in self._shards:
            shard.take_gradients()
        with self._scaled():
            self._inner.step()
        self._pull_options()
        for shard in self._shards:
            shard.drop_gradients()
        self._gather()
        return loss

    def wait_for_parameters(self) -> None:
        """Wait for what the last step gathers, before parameters are read outside of forward."""
        if self._late is not None:
            with naming_the_missing(self._group, "gathering parameters"):
                self._late.wait_all()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero the gradients of all parameters."""
        super().zero_grad(set_to_none)
        if self._reducer is not None:
            self._reducer.gradients_are_gone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which are sharded among themselves.

        With a wrapper, their gradients are averaged on every rank, as buckets are fixed by then.
        """
        if not self._is_set_up:
            super().add_param_group(param_group)
            return
        (group,) = named_groups([param_group], self._ddp, first=len(self._parameters))
        super().add_param_group(unnamed(group))
        self._parameters |= dict(group["params"])
        self._shards += self._shards_alone(group["params"], self._partition_of(group))
        self._push_options()
        self._inner.add_param_group(self._inner_group(group))
        self._pull_options()

    def state_dict(self) -> dict[str, Any]:
        """This rank's states and where they belong; loads into an optimizer of the same layout."""
        own = super().state_dict()
        return own | {"state": self._inner.state_dict()["state"], "layout": self.layout()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyrefly: ignore
        """Load what `state_dict` of the same layout, or `full_state_dict`, gave.

        Raises:
            ValueError: Of another layout.
        """
        self.wait_for_parameters()
        if "layout" in state_dict:
            if state_dict["layout"]["pieces"] != self.layout()["pieces"]:
                raise ValueError(
                    "the states are of another division among ranks: load the state_tensors() of "
                    "all ranks with load_state_tensors, or a full_state_dict"
                )
            states = state_dict["state"]
        else:
            whole = {self._numbered()[n]: state for n, state in state_dict["state"].items()}
            sizes = {name: parameter.numel() for name, parameter in self._parameters.items()}
            pieces = sharded_state.cut(whole, sizes, self._owned())
            states = self._by_place(pieces)
        self._load(states, state_dict["param_groups"])

    def full_state_dict(self) -> dict[str, Any]:
        """On rank 0 what the unsharded optimizer's state_dict would be, on the CPU. Collective.

        States travel one by one, so no device holds more than one tensor beside its own.

        Returns:
            An empty dict on other ranks.
        """
        states = sharded_state.collect(
            self._states(), describe(self._parameters), self._group, self._device
        )
        if self._group.rank() != 0:
            return {}
        numbers = {name: number for number, name in self._numbered().items()}
        return super().state_dict() | {"state": {numbers[n]: s for n, s in states.items()}}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's states by «parameter name.state», for safetensors; see `layout`."""
        return sharded_state.to_tensors(self._states())

    def layout(self) -> dict[str, Any]:
        """What has to be saved beside `state_tensors`, as JSON: parts, numbers, groups' options."""
        return {
            "rank": self._group.rank(),
            "world_size": self._group.size(),
            "pieces": {n: [s.start, s.stop] for n, (_, s) in self._owned().items()},
            "numbers": sharded_state.to_numbers(self._states()),
            "param_groups": [
                sharded_state.to_json(options_of(group)) for group in self.param_groups
            ],
        }

    def load_state_tensors(self, saved: Sequence[tuple[Tensors, Mapping[str, Any]]]) -> None:
        """Load states that any number of ranks saved.

        Args:
            saved: `state_tensors` and `layout` of every rank that saved, in any order. A mapping
                that reads tensors when asked (safetensors.safe_open) keeps memory low.

        Raises:
            ValueError: A part of a state is missing.
        """
        self.wait_for_parameters()
        pieces = sharded_state.assemble(saved, self._owned())
        self._load(self._by_place(pieces), saved[0][1]["param_groups"])

    def _make_shards(self, groups: list[dict[str, Any]]) -> list[Shard]:
        if self._reducer is None:
            return [
                s for g in groups for s in self._shards_alone(g["params"], self._partition_of(g))
            ]
        partitions = {
            name: self._partition_of(group)
            for group in groups
            for name, parameter in group["params"]
            if parameter.requires_grad
        }
        self._reducer.attach(partitions, self._group)
        # Copies leave gradients where they are: there is no bucket then.
        memories = [bucket.memory for bucket in self._reducer.buckets]
        pairs = itertools.zip_longest(self._reducer.layouts, memories)
        divided = [(x, m) for x, m in pairs if x.partition != "replicated"][::-1]
        shared = self._shared_memory(self._reducer, [layout for layout, _ in divided])
        rank = self._group.rank()
        return [
            Shard(layout, self._parameters, rank, memory, buffer)
            for (layout, memory), buffer in zip(divided, shared, strict=True)
        ]

    def _shared_memory(
        self, reducer: BucketedReducer, layouts: Sequence[BucketLayout]
    ) -> Sequence[PeerBuffer | None]:
        """Memory for parameters that other ranks read; None where collectives gather them."""
        peers = self._peers
        if peers is not None:
            try:
                return made_by_all(lambda: shared_memory(layouts, peers), self._group, self._device)
            except RuntimeError as error:
                reducer.refuse_copies(error)
                self._peers = None
        return shared_memory(layouts, None)

    def _shards_alone(
        self, named: Iterable[tuple[str, nn.Parameter]], partition: Partition
    ) -> list[Shard]:
        """Shards of parameters whose `.grad` holds whole averages."""
        parameters = {name: p for name, p in named if p.requires_grad}
        specs = describe(parameters, dict.fromkeys(parameters, partition))
        layouts = plan_buckets(
            specs, self._group.size(), cap_bytes=BUCKET_BYTES, first_cap_bytes=BUCKET_BYTES
        )
        return [Shard(layout, parameters, self._group.rank(), None) for layout in layouts]

    def _partition_of(self, group: Mapping[str, Any]) -> Partition:
        if self._partition == "flat" or self._partition == "matrix":
            return self._partition
        if "kind" in group:
            return "flat" if group["kind"] == "adamw" else "matrix"
        # A class that nobody listed may look at whole tensors: those it gets.
        return "flat" if self._inner_class.__name__ in ELEMENTWISE else "matrix"

    def _inner_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The same group with this rank's pieces for parameters, also if it has none."""
        pieces = {name: piece for name, (piece, _) in self._owned().items()}
        mine = [pieces[name] for name, _ in group["params"] if name in pieces]
        return options_of(group) | {"params": mine}

    def _refuse_inner_clipping(self) -> None:
        own = {"max_grad_norm": getattr(self._inner, "max_grad_norm", None)}
        for options in [own, self._inner.defaults, *self._inner.param_groups]:
            if options.get("max_grad_norm") is not None:
                raise ValueError(
                    "max_grad_norm of the inner optimizer would clip by the norm of one rank's "
                    "part: pass it to ShardedOptimizer"
                )

    def _make_late_gather(self) -> LateGather:
        assert self._ddp is not None
        number_of = {name: i for i, shard in enumerate(self._shards) for name in shard.names()}
        # By every name of a tied parameter, whichever module reads it.
        named = {id(p): number_of[n] for n, p in self._parameters.items() if n in number_of}
        everyone = self._ddp.module.named_parameters(remove_duplicate=False)
        return LateGather(
            self._ddp.module, {name: named[id(p)] for name, p in everyone if id(p) in named}
        )

    def _gather(self) -> None:
        late = self._late.order if self._late is not None else []
        # Shards of groups added later are not among those that forward waits for.
        now = range(len(late), len(self._shards))
        handles = {
            number: self._channel.start(self._shards[number].gather(self._group, self._peers))
            for number in (*late, *now)
        }
        if self._late is not None:
            self._late.hold({number: handles[number] for number in late})
        with naming_the_missing(self._group, "gathering parameters"):
            for number in now:
                handles[number].wait()

    @contextlib.contextmanager
    def _scaled(self):
        """Clip, and pass on what GradScaler set, where the inner optimizer's step divides."""
        found_inf = getattr(self, "found_inf", None)
        divisor = getattr(self, "grad_scale", None)
        if self._max_grad_norm is not None:
            norm = self._total_norm()
            self.grad_norm = norm if divisor is None else norm / divisor
            clip = (self.grad_norm / self._max_grad_norm).clamp(min=1.0)
            divisor = clip if divisor is None else divisor * clip
        if not getattr(self._inner, "_step_supports_amp_scaling", False):
            gradients = self._piece_gradients()
            if divisor is not None and gradients:
                torch._foreach_div_(gradients, divisor)
            yield
            return
        inner: Any = self._inner
        inner.grad_scale, inner.found_inf = divisor, found_inf
        try:
            yield
        finally:
            inner.grad_scale = inner.found_inf = None

    def _piece_gradients(self) -> list[torch.Tensor]:
        pieces = (piece for shard in self._shards for piece in shard.pieces.values())
        return [piece.grad for piece in pieces if piece.grad is not None]

    def _total_norm(self) -> torch.Tensor:
        """0-d float32: norm over all ranks' pieces."""
        squares = torch.zeros((), device=self._device)
        gradients = self._piece_gradients()
        if gradients:
            norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
            squares = torch.stack(list(norms)).square().sum()
        with naming_the_missing(self._group, "the norm of all gradients"), collective_errors():
            dist.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def _owned(self) -> dict[str, tuple[nn.Parameter, Segment]]:
        """Piece and segment of this rank by parameter."""
        return {
            name: (shard.pieces[name], segment)
            for shard in self._shards
            for name, segment in shard.segments.items()
        }

    def _states(self) -> dict[str, tuple[Segment, dict[str, Any]]]:
        """Segment and states of this rank by parameter."""
        return {
            name: (segment, self._inner.state.get(piece, {}))
            for name, (piece, segment) in self._owned().items()
        }

    def _numbered(self) -> dict[int, str]:
        """Names by place among all parameters, as torch's state dicts count."""
        names = {id(p): name for name, p in self._parameters.items()}
        everyone = [p for group in self.param_groups for p in group["params"]]
        return {number: names[id(p)] for number, p in enumerate(everyone)}

    def _by_place(self, pieces: Mapping[str, Any]) -> dict[int, Any]:
        """The same, by place among this rank's pieces."""
        names = {id(piece): name for name, (piece, _) in self._owned().items()}
        everyone = [names[id(p)] for group in self._inner.param_groups for p in group["params"]]
        return {number: pieces[name] for number, name in enumerate(everyone) if name in pieces}

    def _load(self, states: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Load this rank's states, by place, and all groups' options."""
        if len(groups) != len(self.param_groups):
            raise ValueError(f"{len(groups)} groups were saved, {len(self.param_groups)} are here")
        inner = self._inner.state_dict()
        self._inner.load_state_dict({"state": dict(states), "param_groups": inner["param_groups"]})
        for mine, saved in zip(self.param_groups, groups, strict=True):
            mine |= sharded_state.restored(saved, mine)
        self._push_options()


def _reducer_of(ddp: DistributedDataParallel | None) -> BucketedReducer | None:
    if ddp is None:
        return None
    if not isinstance(ddp.reducer, BucketedReducer):
        raise ValueError(f"strategy {ddp.strategy!r} has no buckets to scatter: use 'bucketed'")
    return ddp.reducer
