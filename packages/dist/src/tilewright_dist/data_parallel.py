"""DistributedDataParallel: the wrapper that all strategies share.

Every rank holds a whole replica and computes on its own part of the batch. After backward each
gradient is replaced by its average over the ranks, so replicas that start equal stay equal, and W
ranks take the step that one process would take on the joined batch.

Here: checks at the door, equal starting weights, the gradient hooks, `no_sync` and the moment at
which the averaging happens. How the bytes travel is a strategy's own file: `naive.py`. Left out, as
torch's class has them and nobody here needs them: several devices a process, buffers broadcast at
every forward, uneven inputs (Join).
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from tilewright_dist.module_state import broadcast_module_state, verify_module_state
from tilewright_dist.naive import NaiveReducer

Strategy = Literal["naive"]

_REDUCERS = {"naive": NaiveReducer}


class DistributedDataParallel(nn.Module):
    """A module whose gradients are averaged over the ranks of a process group.

    Parameters and buffers are taken from rank 0 of the group at construction. Wrap a complete
    module, once, on its device, before the optimizer is built: which parameters exist and which
    are trainable is fixed here. Keep the wrapper: dropping it ends the synchronization.

    Attributes are not forwarded: the wrapped module is `.module`, and the keys of `state_dict()`
    begin with `module.`, both as in torch.nn.parallel.DistributedDataParallel. Save
    `wrapper.module.state_dict()` for a file that a single process loads.

    Buffers are broadcast at construction only. A buffer that changes in training (the running
    statistics of BatchNorm) is each rank's own from then on.

    Construction, the end of every backward outside `no_sync` and
    `finish_gradient_synchronization` are collective: all ranks do them, in the same order.

    Args:
        module: The replica of this rank, with at least one trainable parameter.
        process_group: Ranks to average over; None is the default group.
        strategy: "naive" averages gradient by gradient when backward is over.

    Raises:
        TypeError: module is not an nn.Module.
        ValueError: An unknown strategy; no process group, or one that this rank is not part of or
            that cannot move tensors of the module's device; a module without trainable
            parameters, with parameters on several devices or on the meta device; modules that
            differ between ranks (raised on every rank, with the tensor and the ranks).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        process_group: dist.ProcessGroup | None = None,
        strategy: Strategy = "naive",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        if strategy not in _REDUCERS:
            valid = ", ".join(repr(name) for name in get_args(Strategy))
            raise ValueError(f"unknown strategy {strategy!r}; valid: {valid}")
        self.module = module
        self.strategy = strategy

        process_group = _checked_process_group(process_group)
        # Compared first: from here on all ranks pass or fail the same checks, none is left waiting.
        verify_module_state(module, process_group)
        trainable = _trainable_parameters(module)
        device = _common_device(trainable, process_group)
        broadcast_module_state(module, process_group, device)

        # Weakly: gloo's threads end with the last reference to their group. Were one kept until
        # the interpreter shuts down, a thread could ask for the GIL then, which aborts the
        # process (in 6 of 40 runs of a short program with torch 2.11).
        self._process_group = weakref.ref(process_group)
        self._frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        self._reducer = _REDUCERS[strategy](trainable)
        self._synchronize_after_backward = True
        self._unsynchronized = False
        self._register_gradient_hooks(trainable.values())

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
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when the module was wrapped and would not be "
                    "synchronized: set requires_grad first, then wrap the module"
                )
        # A rank whose loss reaches no parameter gets no hook call; through this mark
        # finish_gradient_synchronization() still makes it take part.
        if torch.is_grad_enabled():
            self._unsynchronized = True
        return self.module(*args, **kwargs)

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
        if self._unsynchronized:
            self._reducer.finish(self.process_group)
            self._unsynchronized = False

    def extra_repr(self) -> str:
        """The strategy, for print()."""
        return f"strategy={self.strategy!r}"

    def _register_gradient_hooks(self, parameters: Iterable[nn.Parameter]) -> None:
        # A strong reference would close the cycle parameter → hook → wrapper → parameter and keep
        # a dropped model's memory until the garbage collector comes by.
        reference = weakref.ref(self)

        def gradient_arrived(_: torch.Tensor) -> None:
            wrapper = reference()
            if wrapper is not None:
                wrapper._gradient_arrived()

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(gradient_arrived)

    def _gradient_arrived(self) -> None:
        self._unsynchronized = True
        if self._synchronize_after_backward:
            # Queued for every gradient, and only the first call has anything to do. A flag «queued
            # already» would outlive a backward that raised and silence all that follow.
            Variable._execution_engine.queue_callback(self.finish_gradient_synchronization)


def _checked_process_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
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
