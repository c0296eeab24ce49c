"""What a step should take on one GPU, and on several, before anything has run.

Forward and backward are products at the rate that is reached of the peak, and element-wise passes
over what is kept; or the host that launches them, where that is slower. An update is its bytes.
Several GPUs add the communication that tilewright_dist predicts.
"""

from dataclasses import dataclass

from tilewright_dist import Cluster, Layer, Link, Workload
from tilewright_dist import plan as predict
from tilewright_model import (
    ModelConfig,
    activation_bytes,
    count_parameters,
    flops_per_token,
)
from tilewright_train.hardware import (
    NETWORK,
    NVLINK,
    REACHED_BANDWIDTH,
    REACHED_FLOPS,
    Accelerator,
)
from tilewright_train.memory_plan import MemoryPlan, StepShape
from tilewright_train.precision import arithmetic

# On an H200, 0.5b in bf16, 16 rows of 2048: 198 ms (docs/model.md), 160 of them products at the
# rate above; what is left are so many passes over the activations that are kept.
_PASSES = 6.5
# The same model's eager launches took 79 ms of the host, 16 blocks forward and backward.
_HOST_SECONDS_A_BLOCK = 79e-3 / 16
_GPUS_PER_HOST = 8
# Seconds that computation loses for one of communication beside it (docs/parallelism.md).
_INTERFERENCE = 0.9


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, and what it is made of."""

    step: float
    """All of it."""
    computation: float
    """Forward and backward."""
    optimizer: float
    """The update."""
    exposed: float
    """What communication adds."""


def predict_step(
    config: ModelConfig,
    step: StepShape,
    memory: MemoryPlan,
    gpu: Accelerator,
    *,
    tf32: bool = False,
) -> StepTime:
    """Seconds of one step of `step.rows * step.parts` rows a GPU.

    Args:
        config: Of the model.
        step: What a process computes.
        memory: Of `plan_memory`.
        gpu: What computes it; all GPUs are equal, eight a host.
        tf32: Whether float32 products take the tensor cores.
    """
    tokens = step.tokens * step.parts
    again = {"none": 0.0, "selective": 2 / 9, "full": 1 / 3}[step.recompute]
    # A reference takes a forward: a third of what training takes.
    flops = flops_per_token(config, step.seq_len) * (1 + again + step.has_reference / 3)
    products = tokens * flops / (gpu.peak(step.precision, tf32) * REACHED_FLOPS)
    bandwidth = gpu.bandwidth * REACHED_BANDWIDTH
    passes = _PASSES * (1 + again) * _activations(config, step) * step.parts / bandwidth
    host = _HOST_SECONDS_A_BLOCK * (1 + again) * config.num_hidden_layers * step.parts
    computation = max(products + passes, host)
    # Bytes of all processes together; the prediction divides the seconds.
    states = memory.optimizer * (1 if step.parallel == "ddp" else step.world_size)
    weights = memory.weights * (step.world_size if step.parallel == "fsdp" else 1)
    optimizer = (3 * weights + 2 * states) / bandwidth
    return _over_gpus(config, step, computation, optimizer)


def _activations(config: ModelConfig, step: StepShape) -> int:
    """Activations of one part's forward, all of which some pass reads or writes."""
    return activation_bytes(
        config, step.rows * step.sequences, step.seq_len, dtype=arithmetic(step.precision).products
    )


def _over_gpus(
    config: ModelConfig, step: StepShape, computation: float, optimizer: float
) -> StepTime:
    count, layers = count_parameters(config), config.num_hidden_layers
    dtypes, divided = arithmetic(step.precision), step.parallel == "fsdp"
    weight = dtypes.weights.itemsize
    parts = step.parts if divided else 1  # each gathers weights and sends its gradients
    ends = count.embedding + count.position + count.lm_head
    a_block = (count.total - ends) // layers
    workload = Workload(
        layers=[Layer(parameters=ends), *[Layer(parameters=a_block)] * layers],
        forward=computation / 3,
        backward=computation * 2 / 3,
        optimizer=optimizer,
        weight_bytes=weight,
        gradient_bytes=weight,
        reduce_bytes=weight * parts,
        gather_bytes=dtypes.products.itemsize * parts if divided else weight,
    )
    cluster = Cluster(
        gpus_per_host=_GPUS_PER_HOST,
        inside=Link(bandwidth=NVLINK, latency=2e-5),
        between=Link(bandwidth=NETWORK, latency=5e-5),
        interference=_INTERFERENCE,
    )
    scheme = "zero3" if step.parallel == "fsdp" else step.parallel
    predicted = predict(workload, cluster, step.world_size, scheme)
    return StepTime(
        step=predicted.step,
        computation=computation,
        optimizer=predicted.computation - computation,
        exposed=predicted.exposed,
    )
