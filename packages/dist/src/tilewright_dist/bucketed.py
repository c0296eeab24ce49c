"""The bucketed strategy: gradients gather in flat buckets, which travel while backward goes on.

A bucket (25 MiB) is large enough that bandwidth counts and latency does not, and small enough that
the first one leaves early and the last one, which nothing can hide, is short. Buckets fill from the
last layer to the first, at first by the order of registration and after the first backward in the
order in which gradients arrived on rank 0.

`.grad` is a view of its bucket. A gradient that backward allocated (after zero_grad) is copied in
once, with all others of its bucket when that starts, which costs less than zeroing the bucket and
adding to it; one that is there already (in accumulation) is added to in place.

A sharded optimizer may `attach`: its buckets are then divided among the ranks (layout.Partition),
and each rank receives the averages of its piece only.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tilewright_dist import copies
from tilewright_dist.agreement import from_first, verify_agreement
from tilewright_dist.buckets import Bucket, allocate, describe, has_other_users
from tilewright_dist.channel import Exchange
from tilewright_dist.comm_hook import CommHook, GradBucket, HookHandle
from tilewright_dist.layout import BucketLayout, Partition, fingerprint, plan_buckets
from tilewright_dist.missing import give_missing, lacks
from tilewright_dist.options import ReducerOptions
from tilewright_dist.overlapped_reducer import OverlappedReducer
from tilewright_dist.peers import GPUPeers, PeerBuffer, Peers, made_by_all
from tilewright_dist.readiness import ReadyQueue
from tilewright_dist.wire import all_reduce, reduce_scatter

SMALL_BYTES = 2**20
"""Below it gradients are copied to their bucket together; above, one copy each is as fast as memory
and a kernel for several is not."""


class BucketedReducer(OverlappedReducer):
    """Averages gradients bucket by bucket, beside backward.

    Args:
        parameters: Trainable parameters by name, the same on all ranks, on one device.
        process_group: The ranks; not kept.
        options: Those of the wrapper.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        process_group: dist.ProcessGroup,
        options: ReducerOptions,
    ) -> None:
        super().__init__(parameters, process_group, options)
        self._hook: tuple[Any, CommHook] | None = None
        self._partitions: dict[str, Partition] = {}
        self._is_final = False
        self._scattered: dict[str, torch.Tensor] = {}
        self._buckets: list[Bucket] = []
        self._views: dict[str, torch.Tensor] = {}
        self._peers: Peers | None = None
        self._landing: PeerBuffer | None = None
        self._exchanges: dict[int, copies.Averaging | copies.Scattering] = {}
        self._filled: dict[str, torch.Tensor] = {}
        if options.transport != "collective" and process_group.size() > 1:
            self._meet(process_group)
        self._build(list(reversed(list(parameters))), process_group, learns=options.static_graph)

    @property
    def buckets(self) -> list[Bucket]:
        """In starting order."""
        return self._buckets

    @property
    def shared_bytes(self) -> int:
        """Memory that other ranks read, which torch.cuda.memory_allocated does not count."""
        return 0 if self._landing is None else self._landing.memory.nbytes

    @property
    def layouts(self) -> list[BucketLayout]:
        """Where gradients lie, and whose they are, in starting order."""
        return self._layouts

    def begin(self) -> None:
        """Forget what a backward that raised has left behind, and gradients that are gone."""
        super().begin()
        self._scattered = {n: g for n, g in self._scattered.items() if self._still_has(n)}

    @torch.no_grad()
    def gradient_arrived(self, name: str, process_group: dist.ProcessGroup | None) -> None:
        """Start what may start; without a group (no_sync) put the gradient into its bucket.

        Raises:
            RuntimeError: It arrived too often, or on top of one that was scattered.
        """
        self._enter_backward()
        self._refuse_scattered(name)
        if process_group is None:
            if self._is_loose:
                self._separate([name])
            else:
                self._put([name])
            return
        for unit in self._queue.arrived(name):
            self._start(unit, process_group)

    @torch.no_grad()
    def finish(self, process_group: dist.ProcessGroup) -> None:
        """Start the rest and wait for all; after the first time, rebuild the buckets.

        Raises:
            TypeError: A gradient is sparse.
            RuntimeError: A gradient is missing, without find_unused_parameters; or all of this
                window are averaged and scattered already.
        """
        if any(self._still_has(name) for name in self._scattered):
            raise RuntimeError("gradients have been scattered already: call zero_grad() first")
        missing = [name for name, p in self._parameters.items() if lacks(p.grad)]
        for unit in self._queue.rest():
            self._start(unit, process_group)
        anywhere = self._ask_for_missing(process_group)
        counts = self._queue.counts
        self._abandon()
        self._copy_back()
        averages = self._averages_of(missing)
        try:
            give_missing(self._parameters, averages, anywhere)
        finally:
            self._scattered = self._divided()
            # Collective: the ranks that lack nothing are in it.
            if not self._is_final:
                self._rebuild([*counts], process_group)
            if self._options.static_graph and self._learns:
                self._set_queue(counts)

    def attach(self, partitions: Mapping[str, Partition], process_group: dist.ProcessGroup) -> None:
        """Divide the buckets among the ranks, for good. Gradients that are there are kept.

        Raises:
            ValueError: Gradients are copies: of a second backward it could not be told whether it
                adds to what was scattered.
            RuntimeError: A communication hook is registered; or an optimizer is attached already.
        """
        if not self._options.gradient_as_bucket_view:
            raise ValueError(
                "gradient_as_bucket_view=False keeps whole gradients, sharding divides them: wrap "
                "the module with gradient_as_bucket_view=True"
            )
        if self._hook is not None:
            raise RuntimeError("a communication hook averages on every rank: it excludes sharding")
        if self._partitions:
            raise RuntimeError("a ShardedOptimizer is attached to this module already")
        self._partitions = dict(partitions)
        self._is_final = True
        self._build([*self._names()], process_group, learns=self._learns)

    def more_peers(self, process_group: dist.ProcessGroup) -> Peers | None:
        """The same ranks for another stream; None where collectives move the buckets. Collective.

        Raises:
            RuntimeError: They could not share more memory, on every rank.
        """
        if self._peers is None:
            return None
        try:
            return GPUPeers(process_group, self._device)
        except RuntimeError as error:
            self.refuse_copies(error)
            return None

    def refuse_copies(self, error: RuntimeError) -> None:
        """Raise, where they were asked for; "auto" goes on with collectives."""
        if self._options.transport == "copy":
            raise RuntimeError(
                f"the GPUs cannot share memory ({error}): use transport='collective'"
            ) from error

    def gradients_are_gone(self) -> None:
        """Let the next backward begin: the scattered gradients have been used or zeroed."""
        self._scattered.clear()

    def register_comm_hook(
        self, state: Any, hook: CommHook, process_group: dist.ProcessGroup
    ) -> None:
        """Have a hook average the buckets.

        Raises:
            RuntimeError: There is one already, or the buckets are divided among the ranks.
        """
        if self._hook is not None:
            raise RuntimeError("a communication hook is registered already")
        if self._partitions:
            raise RuntimeError("the buckets belong to a ShardedOptimizer, which scatters averages")
        was_loose = self._is_loose
        self._hook = (state, hook)
        if was_loose:
            self._build([*self._names()], process_group, learns=self._learns)

    def _meet(self, process_group: dist.ProcessGroup) -> None:
        """Share memory with the other ranks; with "auto" collectives are used if one cannot."""
        try:
            peers = GPUPeers(process_group, self._device)
            sizes = [copies.landing_bytes(peers)]
            (landing,) = made_by_all(
                lambda: peers.allocate(sizes, [torch.uint8]), process_group, self._device
            )
        except RuntimeError as error:
            self.refuse_copies(error)
            return
        self._peers, self._landing = peers, landing

    def _build(self, order: list[str], process_group: dist.ProcessGroup, *, learns: bool) -> None:
        """Lay the gradients out anew, in the order in which they are expected."""
        specs = describe({name: self._parameters[name] for name in order}, self._partitions)
        layouts = plan_buckets(
            specs,
            process_group.size(),
            cap_bytes=self._options.cap_bytes,
            first_cap_bytes=self._options.first_cap_bytes,
        )
        digest = fingerprint(specs, layouts)[:12]
        what = "how gradients are laid out in buckets"
        verify_agreement(what, f"{digest} ({self._options})", process_group, self._device)
        kept = [name for name in self._views if self._is_in_bucket(name)]
        self._layouts = list(layouts)
        self._units = [[slot.name for slot in layout.slots] for layout in layouts]
        self._strides = {spec.name: spec.strides for spec in specs}
        # Of the former buckets only those stay, until they are copied, that hold gradients.
        self._buckets, self._views = [], {}
        self._exchanges.clear()
        if not self._is_loose:
            self._buckets = allocate(layouts, specs, self._device)
        self._views = {n: view for bucket in self._buckets for n, view in bucket.views.items()}
        self._put(kept)
        self._learns = learns
        self._set_queue(None)

    def _set_queue(self, expected: Mapping[str, int] | None) -> None:
        self._learns = self._learns and expected is None
        self._queue = ReadyQueue(self._units, expected, learns=self._learns)

    def _rebuild(self, arrivals: list[str], process_group: dist.ProcessGroup) -> None:
        """Buckets in the order of rank 0's arrivals; those that did not arrive come last."""
        self._is_final = True
        late = [name for name in self._names() if name not in set(arrivals)]
        order = from_first(arrivals + late, process_group, self._device)
        if order != [*self._names()]:
            self._build(order, process_group, learns=self._learns)

    def _put(self, names: Iterable[str]) -> None:
        """Make buckets hold parameters' gradients, zeros where there is none."""
        found: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for name in names:
            parameter, view = self._parameters[name], self._views[name]
            gradient = parameter.grad
            if gradient is None or lacks(gradient):
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                found.append((parameter, gradient, view))
        if not found:
            return
        small = [(g, view) for _, g, view in found if g.nbytes < SMALL_BYTES]
        if small:
            gradients, views = zip(*small, strict=True)
            torch._foreach_copy_(views, gradients)
        for _, gradient, view in found:
            if gradient.nbytes >= SMALL_BYTES:
                view.copy_(gradient)
        for parameter, gradient, view in found:
            # One that is part of a graph (create_graph) has to stay what it is.
            if self._options.gradient_as_bucket_view and not gradient.requires_grad:
                parameter.grad = view

    def _copy_back(self) -> None:
        """Give the averages to the gradients that are not views of their bucket."""
        for name, view in self._views.items():
            gradient = self._parameters[name].grad
            if gradient is None or lacks(gradient):
                continue
            if gradient.data_ptr() != view.data_ptr():
                gradient.detach().copy_(view)

    @property
    def _is_loose(self) -> bool:
        """Whether gradients stay where backward put them: copies fetch them from anywhere."""
        return self._peers is not None and self._hook is None

    def _separate(self, names: Iterable[str]) -> None:
        """Give gradients memory of their own where it is used by others as well.

        Autograd hands the views that a sum's backward makes to both of its parameters. What is
        averaged in place, or added to, would change the other's.
        """
        for name in names:
            parameter = self._parameters[name]
            gradient = parameter.grad
            if gradient is None or lacks(gradient) or gradient.requires_grad:
                continue
            if has_other_users(gradient):
                parameter.grad = gradient.clone()

    def _divided(self) -> dict[str, torch.Tensor]:
        """Gradients of which each rank has its part only."""
        names = (name for name, partition in self._partitions.items() if partition != "replicated")
        found = ((name, self._parameters[name].grad) for name in names)
        return {name: gradient for name, gradient in found if gradient is not None}

    def _still_has(self, name: str) -> bool:
        """Whether a parameter has the gradient that was scattered: held, so its address is its."""
        gradient = self._parameters[name].grad
        if gradient is None or lacks(gradient):
            return False
        return gradient.data_ptr() == self._scattered[name].data_ptr()

    def _names(self) -> Iterator[str]:
        """All parameters in the order in which they are expected."""
        return itertools.chain.from_iterable(self._units)

    def _averages_of(self, missing: Iterable[str]) -> dict[str, torch.Tensor]:
        """Of parameters that lack a gradient here, to be theirs."""
        if self._is_loose:
            averages, self._filled = self._filled, {}
            return averages
        if self._options.gradient_as_bucket_view:
            return {name: self._views[name] for name in missing}
        return {name: self._views[name].clone() for name in missing}

    def _start(self, unit: int, process_group: dist.ProcessGroup) -> None:
        if self._is_loose:
            names = self._units[unit]
            self._separate(names)
            held = [g for n in names if (g := self._parameters[n].grad) is not None]
            self._send(self._average(unit), held)
            return
        bucket = self._buckets[unit]
        self._put(bucket.views)
        if self._hook is not None:
            state, hook = self._hook
            is_last = unit == len(self._buckets) - 1
            seen = GradBucket(bucket, self._parameters, index=unit, is_last=is_last)
            self._handles.append(HookHandle(hook(state, seen), bucket.memory))
            return
        dtype = self._options.reduce_dtype
        if bucket.layout.partition == "replicated":
            exchange = all_reduce(bucket.memory, process_group, dtype)
        else:
            exchange = reduce_scatter(bucket.memory, bucket.layout.bounds, process_group, dtype)
        self._send(exchange)

    def _average(self, unit: int) -> Exchange:
        """Average gradients where they are, by copies between GPUs."""
        values: list[torch.Tensor] = []
        ordered: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in self._units[unit]:
            parameter = self._parameters[name]
            gradient = parameter.grad
            if gradient is None or lacks(gradient):
                gradient = self._filled[name] = torch.zeros_like(parameter)
            strides = self._strides[name]
            if gradient.requires_grad:
                gradient = gradient.detach()
            if gradient.stride() != strides:
                # A layout of this rank's own must not reach the others.
                dense = torch.empty_strided(
                    gradient.shape, strides, dtype=gradient.dtype, device=gradient.device
                ).copy_(gradient)
                ordered.append((gradient, dense))
                gradient = dense
            values.append(gradient)
        if unit not in self._exchanges:
            self._exchanges[unit] = self._exchange_of(self._layouts[unit])
        yield from self._exchanges[unit].run(values)
        for gradient, dense in ordered:
            gradient.copy_(dense)

    def _exchange_of(self, layout: BucketLayout) -> copies.Averaging | copies.Scattering:
        """What can be used in every step."""
        assert self._landing is not None
        assert self._peers is not None
        dtype = self._options.reduce_dtype
        if layout.partition != "replicated":
            return copies.Scattering(layout, self._landing, self._peers, dtype)
        sizes = [slot.stop - slot.start for slot in layout.slots]
        return copies.Averaging(sizes, layout.dtype, self._landing, self._peers, dtype)

    def _is_in_bucket(self, name: str) -> bool:
        gradient = self._parameters[name].grad
        if gradient is None or lacks(gradient):
            return False
        return gradient.data_ptr() == self._views[name].data_ptr()

    def _refuse_scattered(self, name: str) -> None:
        """Accept a gradient after scattering only if it was not added to what was scattered."""
        if name not in self._scattered:
            return
        if self._still_has(name):
            raise RuntimeError(
                f"the gradient of {name!r} was added to one that is averaged and scattered: run "
                "all but the last backward of a step under no_sync(), zero_grad() after the step"
            )
        del self._scattered[name]
