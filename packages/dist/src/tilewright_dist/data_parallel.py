"""DistributedDataParallel: the wrapper that all strategies share.

Every rank holds a whole replica and computes on its own part of the batch. Each gradient is
replaced by its average over the ranks, so replicas that start equal stay equal, and W ranks take
the step that one process would take on the joined batch.

Here: checks at the door, equal starting weights, the gradient hooks, `no_sync`, buffers and the
moment at which the averaging ends. How the bytes travel is a strategy's own file: `naive.py`,
`per_parameter.py`, `bucketed.py`. Left out, as nobody here needs them: several devices a process,
uneven inputs (Join).
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from tilewright_dist.agreement import verify_agreement
from tilewright_dist.bucketed import BucketedReducer
from tilewright_dist.channel import CollectiveError
from tilewright_dist.comm_hook import CommHook
from tilewright_dist.failure import NonFiniteGradients, naming_the_missing
from tilewright_dist.missing import MissingGradientError, SparseGradientError
from tilewright_dist.module_state import (
    broadcast_buffers,
    broadcast_module_state,
    persistent_buffers,
    verify_module_state,
)
from tilewright_dist.naive import NaiveReducer
from tilewright_dist.options import ReducerOptions, Transport
from tilewright_dist.peers import can_copy
from tilewright_dist.per_parameter import PerParameterReducer

Strategy = Literal["naive", "per_parameter", "bucketed"]


VERIFIED_RANKS = 2
"""Number of GPUs on which training by copies was compared with that by collectives."""


class Reducer(Protocol):
    """What a strategy does."""

    def begin(self) -> None:
        """Called before a forward pass outside of backward: no backward is under way."""

    def gradient_arrived(self, name: str, process_group: dist.ProcessGroup | None) -> None:
        """Called by every gradient's hook; under no_sync without a group."""

    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Called when backward is over: gradients are averages afterwards."""


_REDUCERS: dict[str, Callable[..., Reducer]] = {
    "naive": NaiveReducer,
    "per_parameter": PerParameterReducer,
    "bucketed": BucketedReducer,
}


class DistributedDataParallel(nn.Module):
    """A module whose gradients are averaged over the ranks of a process group.

    Parameters and buffers are taken from rank 0 of the group at construction. Wrap a complete
    module, once, on its device, before the optimizer is built: which parameters exist and which
    are trainable is fixed here. Keep the wrapper: dropping it ends the synchronization.

    Attributes are not forwarded: the wrapped module is `.module`, and the keys of `state_dict()`
    begin with `module.`, both as in torch.nn.parallel.DistributedDataParallel. Save
    `wrapper.module.state_dict()` for a file that a single process loads.

    Construction, the end of every backward outside `no_sync` and
    `finish_gradient_synchronization` are collective: all ranks do them, in the same order.

    Args:
        module: The replica of this rank, with at least one trainable parameter.
        process_group: Ranks to average over; None is the default group.
        strategy: "naive" averages gradient by gradient when backward is over, "per_parameter" each
            as it arrives, "bucketed" in buckets as they fill.
        bucket_cap_mb: Mebibytes at which a bucket is full.
        first_bucket_mb: Mebibytes of the bucket that starts first.
        reduce_dtype: What travels; None is the gradients' dtype. bfloat16 halves the bytes of
            float32 gradients; they are added in float32 all the same.
        gradient_as_bucket_view: Let `.grad` be the bucket's memory instead of a second copy.
        static_graph: Promise that every backward uses the same parameters, equally often: allows
            reentrant checkpointing. Parameters that never have a gradient are frozen before
            wrapping or need find_unused_parameters as well.
        find_unused_parameters: Let parameters lack gradients, at the cost of a small collective.
        broadcast_buffers: Send rank 0's persistent buffers to all at every forward in training mode
            with gradients enabled, outside `no_sync`.
        transport: What moves the buckets. "collective" is the backend's collectives. "copy", for
            GPUs of one host and the bucketed strategy, is copies between them, which take no
            multiprocessors from the kernels of backward: gradients stay where backward put them,
            and a communication hook replaces it. "auto" copies between two GPUs where that is
            possible, as copies have been verified on two only; else it is "collective".

    Raises:
        TypeError: module is not an nn.Module.
        ValueError: An unknown strategy or an option out of range; no process group, or one that
            this rank is not part of or that cannot move tensors of the module's device; a module
            without trainable parameters, with parameters on several devices or on the meta device;
            modules or options that differ between ranks (raised on every rank, with the ranks);
            reduce_dtype for a module with complex parameters; transport="copy" for another strategy
            or for ranks that are not GPUs of one host.
        RuntimeError: transport="copy", and the GPUs could not share memory (on every rank).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        process_group: dist.ProcessGroup | None = None,
        strategy: Strategy = "bucketed",
        bucket_cap_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        reduce_dtype: torch.dtype | None = None,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        transport: Transport = "collective",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        if strategy not in _REDUCERS:
            valid = ", ".join(repr(name) for name in get_args(Strategy))
            raise ValueError(f"unknown strategy {strategy!r}; valid: {valid}")
        options = ReducerOptions(
            bucket_cap_mb=bucket_cap_mb,
            first_bucket_mb=first_bucket_mb,
            reduce_dtype=reduce_dtype,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
            find_unused_parameters=find_unused_parameters,
            transport=transport,
        )
        self.module = module
        self.strategy: Strategy = strategy

        process_group = checked_process_group(process_group)
        # Compared first: from here on all ranks pass or fail the same checks, none is left waiting.
        verify_module_state(module, process_group)
        trainable = _trainable_parameters(module)
        _refuse_complex(trainable, reduce_dtype)
        device = _common_device(trainable, process_group)
        chosen = f"{strategy} ({options})"
        verify_agreement("how gradients are averaged", chosen, process_group, device)
        options = dataclasses.replace(
            options, transport=_settled_transport(transport, strategy, process_group, device)
        )
        broadcast_module_state(module, process_group, device)

        # Weakly: gloo's threads end with the last reference to their group. Were one kept until
        # the interpreter shuts down, a thread could ask for the GIL then, which aborts the
        # process (in 6 of 40 runs of a short program with torch 2.11).
        self._process_group = weakref.ref(process_group)
        self._device = device
        self._static_graph = static_graph
        self._broadcasts_buffers = broadcast_buffers and bool(persistent_buffers(module))
        self._frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        self._trainable = trainable
        self._reducer = _REDUCERS[strategy](trainable, process_group, options)
        self._synchronize_after_backward = True
        self._has_arrived = False
        self._has_run = False
        self._finishes_task = -1
        self._steps = 0
        self._inspected: NonFiniteGradients | None = None
        self._register_gradient_hooks(trainable)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The ranks that gradients are averaged over.

        Raises:
            RuntimeError: The group has been destroyed.
        """
        process_group = self._process_group()
        if process_group is None:
            raise RuntimeError(
                "the process group of this module has been destroyed: use `.module` from here on"
            )
        return process_group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module.

        Raises:
            RuntimeError: A parameter that was frozen at construction requires gradients now.
            TypeError: With static_graph, no tensor is found in what the module returns.
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when the module was wrapped and would not be "
                    "synchronized: set requires_grad first, then wrap the module"
                )
        if torch.is_grad_enabled() and not _inside_backward():
            # A rank whose loss reaches no parameter gets no hook call; through this mark
            # finish_gradient_synchronization() still makes it take part.
            self._has_run = True
            self._reducer.begin()
            if self._broadcasts_buffers and self.training and self._synchronize_after_backward:
                broadcast_buffers(self.module, self.process_group, self._device)
        outputs = self.module(*args, **kwargs)
        if self._static_graph and torch.is_grad_enabled():
            self._finish_after_backward_of(outputs)
        return outputs

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on each rank, without communication.

        What counts is where backward runs, not forward. The first backward outside averages all
        that has accumulated; after the last one inside, `finish_gradient_synchronization` does.
        An exception that leaves the block turns the synchronization on again.
        """
        before = self._synchronize_after_backward
        self._synchronize_after_backward = False
        try:
            yield
        finally:
            self._synchronize_after_backward = before

    def finish_gradient_synchronization(self) -> None:
        """Average over the ranks what has accumulated since the last synchronization.

        Runs by itself at the end of every backward outside `no_sync`, so that `.grad` holds the
        average as soon as `backward()` returns. By hand it is needed after a window that
        ended inside `no_sync`, and on every rank where the loss of some rank reaches no
        parameter. With nothing outstanding it does nothing.
        """
        if self._has_arrived or self._has_run:
            self._finish()

    def register_comm_hook(self, state: Any, hook: CommHook) -> None:
        """Have `hook(state, bucket)` average the buckets instead of an all-reduce.

        The protocol is torch's, so hooks of torch.distributed.algorithms.ddp_comm_hooks run as they
        are. Only for the bucketed strategy. Register it on every rank, before the first backward.

        Raises:
            RuntimeError: Another strategy; a hook or a ShardedOptimizer is there already.
        """
        if not isinstance(self._reducer, BucketedReducer):
            raise RuntimeError(f"strategy {self.strategy!r} has no buckets: use 'bucketed'")
        self._reducer.register_comm_hook(state, hook, self.process_group)

    @contextlib.contextmanager
    def detect_nonfinite_gradients(self) -> Iterator[None]:
        """Look at every gradient of this rank before it is averaged, which hides its origin.

        A backward inside that makes an infinity or a NaN on any rank ends, on all ranks, with a
        NonFiniteGradientError that names the parameters and the ranks. It reads each gradient once
        more and waits for the device: for finding the culprit, not for every step. Collective: all
        ranks enter it.
        """
        before = self._inspected
        self._inspected = NonFiniteGradients(list(self._trainable), self._device)
        try:
            yield
        finally:
            self._inspected = before

    def finish_if_arrived(self) -> None:
        """The same, unless no gradient of this rank arrived since the last time."""
        if self._has_arrived:
            self._finish()

    def __reduce_ex__(self, _: Any) -> Any:
        """Refuse copies and pickles: the hooks that average would not be in them.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a DistributedDataParallel cannot be copied or pickled, as the copy's gradients would "
            "not be averaged: copy or save `.module`, then wrap the copy"
        )

    @property
    def reducer(self) -> Reducer:
        """The strategy at work."""
        return self._reducer

    def extra_repr(self) -> str:
        """The strategy, for print()."""
        return f"strategy={self.strategy!r}"

    def _register_gradient_hooks(self, parameters: Mapping[str, nn.Parameter]) -> None:
        # A strong reference would close the cycle parameter → hook → wrapper → parameter and keep
        # a dropped model's memory until the garbage collector comes by.
        reference = weakref.ref(self)

        def hook_of(name: str) -> Callable[[torch.Tensor], None]:
            def gradient_arrived(_: torch.Tensor) -> None:
                wrapper = reference()
                if wrapper is not None:
                    wrapper._gradient_arrived(name)

            return gradient_arrived

        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(hook_of(name))

    def _gradient_arrived(self, name: str) -> None:
        self._has_arrived = True
        if self._inspected is not None:
            self._inspected.inspect(name, self._trainable[name].grad)
        if not self._synchronize_after_backward:
            self._reducer.gradient_arrived(name, None)
            return
        try:
            self._reducer.gradient_arrived(name, self.process_group)
        except (CollectiveError, dist.DistError):
            with self._naming_the_missing():
                raise
        task = torch._C._current_graph_task_id()
        if not self._static_graph and task != self._finishes_task:
            # Once a backward pass. Its number tells them apart: a flag «queued already» would
            # outlive one that raised and silence all that follow.
            self._finishes_task = task
            Variable._execution_engine.queue_callback(self.finish_if_arrived)

    def _finish_after_backward_of(self, outputs: Any) -> None:
        """Finish at the end of the backward that begins at the outputs.

        Inner backward passes of reentrant checkpoints end earlier: a callback that one of their
        gradients queued would come too soon.

        Raises:
            TypeError: No tensor is found in the outputs, so the end would go unnoticed.
        """

        def began(_: torch.Tensor) -> None:
            if self._synchronize_after_backward:
                Variable._execution_engine.queue_callback(self.finish_if_arrived)

        tensors = list(_tensors_in(outputs))
        if not tensors:
            raise TypeError(
                f"no tensor found in the {type(outputs).__name__} that the module returns, where a "
                "static_graph module's backward begins: return tensors, or mappings, sequences or "
                "dataclasses of them"
            )
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(began)

    def _finish(self) -> None:
        self._has_arrived = self._has_run = False
        with self._naming_the_missing():
            try:
                self._reducer.finish(self.process_group)
            except (MissingGradientError, SparseGradientError):
                # The other ranks compare notes: so does this one, before it says what it lacks.
                self._report_nonfinite()
                raise
            self._report_nonfinite()
        self._steps += 1

    def _report_nonfinite(self) -> None:
        if self._inspected is not None:
            self._inspected.report(self.process_group)

    def _naming_the_missing(self) -> contextlib.AbstractContextManager[None]:
        what = f"gradient synchronization {self._steps}"
        return naming_the_missing(self.process_group, what)


def _inside_backward() -> bool:
    # Where checkpoints run forward again.
    return torch._C._current_graph_task_id() != -1


def _tensors_in(outputs: Any) -> Iterator[torch.Tensor]:
    """All tensors of a module's result."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from _tensors_in(list(outputs.values()))
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            yield from _tensors_in(output)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        yield from _tensors_in([getattr(outputs, f.name) for f in dataclasses.fields(outputs)])


def checked_process_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group to use, which this process belongs to."""
    if process_group is None:
        process_group = dist.group.WORLD
        if process_group is None:
            raise ValueError(
                "no process group is initialised: start the program with torchrun (for example "
                "`torchrun --nproc-per-node 2 train.py`) and call "
                "tilewright_dist.init_from_environment() before wrapping the module"
            )
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group: wrap the module only on the "
            "ranks that were given to torch.distributed.new_group"
        )
    return process_group


def _trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, tied ones once, in the order of registration."""
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"no parameter of {type(module).__name__} requires gradients: there is nothing to "
            "average; use the module unwrapped"
        )
    return trainable


def _refuse_complex(
    parameters: Mapping[str, nn.Parameter], reduce_dtype: torch.dtype | None
) -> None:
    """A real dtype on the wire would drop the imaginary parts."""
    for name, parameter in parameters.items():
        if reduce_dtype is not None and parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}, whose imaginary part {reduce_dtype} "
                "cannot carry: leave reduce_dtype None"
            )


def _settled_transport(
    transport: Transport, strategy: Strategy, process_group: dist.ProcessGroup, device: torch.device
) -> Transport:
    """The choice if it can be had; "auto" stays where copies may be tried. Collective."""
    if transport == "collective":
        return transport
    if transport == "auto" and process_group.size() != VERIFIED_RANKS:
        return "collective"
    if strategy != "bucketed":
        obstacle = f"strategy {strategy!r} has no buckets"
    else:
        obstacle = can_copy(process_group, device)
    if transport == "copy" and obstacle:
        raise ValueError(
            f"transport='copy' is not possible, as {obstacle}: use transport='auto' or 'collective'"
        )
    return "collective" if obstacle else transport


def _common_device(
    parameters: dict[str, nn.Parameter], process_group: dist.ProcessGroup
) -> torch.device:
    """The device that holds all parameters, which the group's backend can reach."""
    first_name, first = next(iter(parameters.items()))
    for name, parameter in parameters.items():
        if parameter.device != first.device:
            raise ValueError(
                f"parameter {name!r} is on {parameter.device}, {first_name!r} on {first.device}: "
                "move the whole module to one device before wrapping it"
            )
    # "cpu:gloo,cuda:nccl" or, for a group of one backend, "cuda:nccl".
    config = dist.get_backend_config(process_group)
    reachable = [entry.partition(":")[0] for entry in config.split(",")]
    if first.device.type not in reachable:
        raise ValueError(
            f"the module is on {first.device}, the process group ({config}) moves tensors on "
            f"{' and '.join(reachable)}: move the module there before wrapping it"
        )
    return first.device
