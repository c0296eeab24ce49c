"""What a step costs on any number of GPUs: time, exposed communication and memory, predicted.

From what one GPU takes for a step, and from latency and bandwidth of the links, `plan` follows the
buckets of a step through time: gradients arrive along backward, a bucket's collective starts when
the bucket is full and the one before has ended, parameters arrive before the layers that read them.
Buckets fill by the rule that training uses (`layout.py`), but layer by layer: training may close
one between two tensors of a layer.

Two things make communication cost time. What lies under no computation is exposed outright. What
does takes multiprocessors and memory bandwidth from the kernels it runs beside: `interference`
seconds for every hidden one. That number is no constant of nature; measure it on two GPUs. It is
taken alike for links inside a host and between hosts, which is too much for the slower ones.

Activations are not counted: data parallelism does not change them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from tilewright_dist.layout import BucketLayout, TensorSpec, plan_buckets, round_up

Scheme = Literal["ddp", "zero1", "zero3"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank can send."""

    bandwidth: float
    """Bytes a second, as bus bandwidth: bench-collectives measures it."""
    latency: float = 0.0
    """Seconds of a collective of no size."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of equally many GPUs."""

    gpus_per_host: int
    """GPUs that share a host's links."""
    inside: Link
    """Between GPUs of a host."""
    between: Link
    """Between hosts, for one GPU: its share of the host's network."""
    interference: float = 0.0
    """Seconds that computation loses for a second of communication beside it."""

    def __post_init__(self) -> None:
        if self.gpus_per_host < 1:
            raise ValueError(f"gpus_per_host must be at least 1, not {self.gpus_per_host}")
        if not (self.inside.bandwidth > 0 and self.between.bandwidth > 0):
            raise ValueError("bandwidths must be positive bytes a second")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Parameters whose gradients arrive together."""

    parameters: int
    """Number of elements."""
    share: float | None = None
    """Of the forward and backward time; None is by number of parameters."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step of one replica, as one GPU runs it alone."""

    layers: Sequence[Layer]
    """In forward order. What is used first and last (a tied embedding) comes first."""
    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    optimizer: float
    """Seconds for all parameters."""
    weight_bytes: float = 4
    """A parameter's, as it is stored."""
    gradient_bytes: float = 4
    """A gradient's, as it is stored."""
    state_bytes: float = 8
    """Of the optimizer, for a parameter."""
    reduce_bytes: float = 4
    """A gradient's on the wire."""
    gather_bytes: float = 4
    """A parameter's on the wire: 2 where fully_shard gathers in bfloat16."""
    bucket_bytes: int = 25 * 2**20
    """Of gradients at which a bucket is full, counted in float32."""

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `plan` says."""

    scheme: Scheme
    """What is divided among the ranks."""
    world_size: int
    """Number of GPUs."""
    step: float
    """Seconds."""
    computation: float
    """Seconds of the step without any communication."""
    alone: float
    """Seconds of a step of one GPU that updates all parameters itself."""
    communication: float
    """Seconds that collectives run, hidden or not."""
    exposed: float
    """Seconds that they add to the computation: waiting, and interference."""
    sent_bytes: float
    """That a rank sends in a step."""
    held_bytes: float
    """Weights, gradients and states of a rank, between backward and step."""

    @property
    def efficiency(self) -> float:
        """Speed of a GPU against one that trains alone."""
        return self.alone / self.step


def plan(workload: Workload, cluster: Cluster, world_size: int, scheme: Scheme) -> Prediction:
    """Predict one step.

    Args:
        workload: What a GPU does alone.
        cluster: Links.
        world_size: Number of GPUs; hosts are filled one after another.
        scheme: "ddp" divides nothing but the batch, "zero1" the optimizer states, "zero3" also
            gradients and weights, which are gathered layer by layer in forward and in backward.

    Raises:
        ValueError: An unknown scheme, or GPUs that do not fill their hosts equally.
    """
    if scheme not in get_args(Scheme):
        valid = ", ".join(repr(name) for name in get_args(Scheme))
        raise ValueError(f"unknown scheme {scheme!r}; valid: {valid}")
    used = min(world_size, cluster.gpus_per_host)
    if world_size < 1 or world_size % used:
        raise ValueError(
            f"world_size {world_size} is not a multiple of gpus_per_host {cluster.gpus_per_host}"
        )
    # By half an all-reduce: a reduce-scatter, or an all-gather.
    half = _HalfAllReduce(cluster, world_size)
    optimizer = workload.optimizer / (1 if scheme == "ddp" else world_size)
    shares = _shares(workload.layers)
    if scheme == "zero3":
        waited, busy, sent = _layer_by_layer(workload, shares, half)
    else:
        waited, busy, sent = _bucket_by_bucket(workload, shares, half, scheme)
    computation = workload.forward + workload.backward + optimizer
    exposed = waited + cluster.interference * (busy - min(waited, busy))
    return Prediction(
        scheme=scheme,
        world_size=world_size,
        step=computation + exposed,
        computation=computation,
        alone=workload.forward + workload.backward + workload.optimizer,
        communication=busy,
        exposed=exposed,
        sent_bytes=sent,
        held_bytes=held_bytes(workload, world_size, scheme),
    )


def held_bytes(workload: Workload, world_size: int, scheme: Scheme) -> float:
    """Weights, gradients and states that a rank holds, and a gathered layer under "zero3"."""
    n, w = workload.parameters, world_size
    kept = workload.weight_bytes + workload.gradient_bytes
    if scheme == "ddp":
        return n * (kept + workload.state_bytes)
    if scheme == "zero1":
        return n * (kept + workload.state_bytes / w)
    largest = max(layer.parameters for layer in workload.layers)
    # The layer at work and the one that is on its way; the gradient of the one at work.
    gathered = largest * (2 * workload.gather_bytes + workload.gradient_bytes) * (w > 1)
    return n * (kept + workload.state_bytes) / w + gathered


def table(predictions: Iterable[Prediction]) -> str:
    """Predictions as text, a line each."""
    lines = [
        f"{'scheme':<8}{'GPUs':>6}{'step':>12}{'exposed':>12}{'efficiency':>12}"
        f"{'sent':>11}{'held':>11}"
    ]
    for p in predictions:
        lines.append(
            f"{p.scheme:<8}{p.world_size:>6}{p.step * 1e3:>9.1f} ms{p.exposed * 1e3:>9.1f} ms"
            f"{p.efficiency:>12.1%}{p.sent_bytes / 2**30:>7.2f} GiB"
            f"{p.held_bytes / 2**30:>7.2f} GiB"
        )
    return "\n".join(lines)


class _HalfAllReduce:
    """Time and bytes of a reduce-scatter or an all-gather over both levels."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        self._cluster = cluster
        self._gpus = min(world_size, cluster.gpus_per_host)
        self._hosts = world_size // self._gpus

    def sent(self, size: float) -> float:
        """Bytes a rank sends: among its host's GPUs, and a GPU's part to the other hosts."""
        inside = (self._gpus - 1) / self._gpus * size
        return inside + (self._hosts - 1) / self._hosts * size / self._gpus

    def seconds(self, size: float) -> float:
        """One level after the other; latency between hosts grows with their number's logarithm."""
        if self._gpus * self._hosts == 1:
            return 0.0
        inside, between = self._cluster.inside, self._cluster.between
        seconds = 0.0
        if self._gpus > 1:
            seconds += inside.latency + (self._gpus - 1) / self._gpus * size / inside.bandwidth
        if self._hosts > 1:
            outgoing = (self._hosts - 1) / self._hosts * size / self._gpus
            seconds += between.latency * math.ceil(math.log2(self._hosts))
            seconds += outgoing / between.bandwidth
        return seconds


def _shares(layers: Sequence[Layer]) -> list[float]:
    """Each layer's part of forward and backward; they add up to 1."""
    total = sum(layer.parameters for layer in layers)
    shares = [x.parameters / total if x.share is None else x.share for x in layers]
    return [share / sum(shares) for share in shares]


def _buckets(workload: Workload) -> tuple[BucketLayout, ...]:
    """Buckets of gradients in starting order, of whole layers: each is one tensor in float32.

    A layer beyond the cap is one bucket, so what it sends starts when all of it is there.
    """
    specs = []
    for index, layer in reversed(list(enumerate(workload.layers))):
        specs.append(TensorSpec(name=str(index), shape=(layer.parameters,), dtype=torch.float32))
    cap = round_up(workload.bucket_bytes, 4)
    return plan_buckets(specs, 1, cap_bytes=cap, first_cap_bytes=min(cap, 2**20))


def _bucket_by_bucket(
    workload: Workload, shares: list[float], half: _HalfAllReduce, scheme: Scheme
) -> tuple[float, float, float]:
    """Seconds waited for, seconds communicated, bytes sent."""
    arrival, now = {}, 0.0
    for index in reversed(range(len(shares))):
        now += shares[index] * workload.backward
        arrival[str(index)] = now
    halves = 2 if scheme == "ddp" else 1
    busy = sent = end = 0.0
    buckets = _buckets(workload)
    for bucket in buckets:
        size = sum(slot.stop - slot.start for slot in bucket.slots) * workload.reduce_bytes
        took = halves * half.seconds(size)
        end = max(end, max(arrival[slot.name] for slot in bucket.slots)) + took
        busy, sent = busy + took, sent + halves * half.sent(size)
    waited = max(0.0, end - workload.backward)
    if scheme == "zero1":
        late, gathering, gathered = _gather_under_forward(workload, shares, half, buckets)
        waited, busy, sent = waited + late, busy + gathering, sent + gathered
    return waited, busy, sent


def _gather_under_forward(
    workload: Workload,
    shares: list[float],
    half: _HalfAllReduce,
    buckets: Sequence[BucketLayout],
) -> tuple[float, float, float]:
    """The same for parameters that are gathered while the next forward pass runs."""
    there, end, sent = {}, 0.0, 0.0
    for bucket in reversed(buckets):
        size = sum(slot.stop - slot.start for slot in bucket.slots) * workload.gather_bytes
        end, sent = end + half.seconds(size), sent + half.sent(size)
        there |= {slot.name: end for slot in bucket.slots}
    now = 0.0
    for index, share in enumerate(shares):
        now = max(now, there[str(index)]) + share * workload.forward
    return max(0.0, now - workload.forward), end, sent


def _layer_by_layer(
    workload: Workload, shares: list[float], half: _HalfAllReduce
) -> tuple[float, float, float]:
    """The same where weights are gathered before a layer and forgotten after it."""
    busy = sent = 0.0
    now = link = 0.0  # when the GPU and the link are free

    def send(size: float, start: float) -> float:
        nonlocal busy, sent, link
        took = half.seconds(size)
        busy, sent = busy + took, sent + half.sent(size)
        link = max(link, start) + took
        return link

    sizes = [layer.parameters for layer in workload.layers]
    passes = [
        (range(len(sizes)), workload.forward, False),
        (range(len(sizes) - 1, -1, -1), workload.backward, True),
    ]
    for order, seconds, is_backward in passes:
        order = list(order)
        ready = send(sizes[order[0]] * workload.gather_bytes, now)
        for place, index in enumerate(order):
            start = max(now, ready)
            if place + 1 < len(order):
                # One layer ahead of the one at work.
                ready = send(sizes[order[place + 1]] * workload.gather_bytes, start)
            now = start + shares[index] * seconds
            if is_backward:
                send(sizes[index] * workload.reduce_bytes, now)
    end = max(now, link)
    return max(0.0, end - workload.forward - workload.backward), busy, sent
