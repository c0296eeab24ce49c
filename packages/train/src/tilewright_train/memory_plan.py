"""The peak of a training step's memory, by kind, in closed form: nothing is built.

tilewright_model counts what a model keeps, in one dtype. Here is what a step adds to that: mixed
dtypes, and time. A step is followed through the moments at which memory can be highest: the loss
(all activations), the backward of each block (fewer activations, more gradients) and the update.

The Triton operators are counted; plain torch keeps more. The CUDA context, NCCL's buffers and what
the allocator leaves unused come on top.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from tilewright_model import (
    ModelConfig,
    activation_bytes,
    count_parameters,
    logits_bytes,
    optimizer_bytes,
)
from tilewright_train.precision import arithmetic

Optim = Literal["adamw", "muon"]
Recompute = Literal["none", "selective", "full"]

MARGIN = 0.06
"""Share of a GPU's memory that a plan leaves: contexts, NCCL, fragments, what is not counted."""

_LEAST_FUSED_TOKENS = 4096  # below, the gated MLP is plain torch's
_MUON_BATCH = 1 << 28  # elements; as tilewright_optim divides them


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one process at the highest moment of a step."""

    weights: int
    """Parameters as they are stored, and those of a reference in float32."""
    optimizer: int
    """States and masters: what this process holds of them."""
    gradients: int
    """Those that are there at that moment."""
    casts: int
    """Weights in the dtype of products, which autocast keeps for backward."""
    activations: int
    """What blocks keep for backward."""
    logits: int
    """A chunk of logits, and the loss's gradients."""
    workspace: int
    """What the block or the update under way needs besides."""
    moment: str
    """When: «loss», «backward» or «update»."""
    gathered: int = 0
    """Under FSDP: embedding and head, a block and the next one, whole; gradients on their way."""

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "moment"}


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a process computes in a step, as far as memory goes."""

    rows: int
    """Sequences that are computed together."""
    seq_len: int
    """Tokens of a sequence."""
    precision: str = "bf16"
    """As `--precision`, not «auto»."""
    optim: Optim = "adamw"
    """The optimizer."""
    recompute: Recompute = "none"
    """What backward computes anew."""
    parts: int = 1
    """Forward and backward passes a step; with several, gradients wait for each other."""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """What is divided, where there are several processes."""
    world_size: int = 1
    """Processes."""
    fused_mlp: bool | None = None
    """Whether the gated MLP is the fused operator; None asks its own rule, `_fuses_mlp`."""
    sequences: int = 1
    """Of a row: two where rows are pairs."""
    has_reference: bool = False
    """Whether a second model of the same size, which is not trained, is held."""

    @property
    def tokens(self) -> int:
        """That are computed together."""
        return self.rows * self.sequences * self.seq_len


def plan_memory(config: ModelConfig, step: StepShape) -> MemoryPlan:
    """The highest moment of a step.

    Args:
        config: Of the model.
        step: What a process computes.

    Raises:
        ValueError: Sizes that do not fit the model; an unknown precision or mode.
    """
    return max(_moments(config, step), key=lambda plan: plan.total)


def at_the_loss(config: ModelConfig, step: StepShape) -> MemoryPlan:
    """The moment at which all activations are there."""
    return next(plan for plan in _moments(config, step) if plan.moment == "loss")


def largest_micro_batch(
    config: ModelConfig, step: StepShape, memory: int, rows: int
) -> tuple[int, MemoryPlan] | None:
    """The most rows at a time that fit, and their plan; None if a single one does not.

    Args:
        config: Of the model.
        step: Its `rows` and `parts` are tried anew.
        memory: Bytes of the device, of which `MARGIN` is left.
        rows: Of a process in a step; a divisor of them is given.
    """
    for together in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        tried = dataclasses.replace(step, rows=together, parts=rows // together)
        plan = plan_memory(config, tried)
        if plan.total <= (1 - MARGIN) * memory:
            return together, plan
    return None


def _moments(config: ModelConfig, step: StepShape) -> Iterator[MemoryPlan]:
    """The moments at which memory may be highest; blocks are taken to be alike.

    Between the backward of the last block and that of the first, memory changes evenly.
    """
    dtypes = arithmetic(step.precision)
    weight, product = dtypes.weights.itemsize, dtypes.products.itemsize
    layers, tokens = config.num_hidden_layers, step.tokens
    count = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    block = _BlockBytes.of(config, step)
    if step.parallel == "fsdp" and step.world_size > 1:
        yield from _moments_fully_sharded(config, step, block)
        return
    sharded = step.world_size if step.parallel == "zero1" else 1
    base = {
        "weights": count.total * (weight + 4 * step.has_reference),
        "optimizer": _state_bytes(config, step) // sharded,
    }
    # Buckets of gradients stay; without them backward makes gradients and the update forgets them.
    stay = step.parts > 1 or step.world_size > 1
    whole = count.total * weight
    yield MemoryPlan(
        **base,
        gradients=whole if stay else 0,
        casts=layers * block.casts + (head * product if dtypes.autocasts else 0),
        activations=layers * block.kept + tokens * (config.hidden_size * (weight + product) + 4),
        logits=logits_bytes(config, tokens, dtype=dtypes.products) + head * product,
        workspace=0,
        moment="loss",
    )
    a_block = (count.total - count.embedding - count.position - count.lm_head) // layers
    for left in (layers, 1):
        yield MemoryPlan(
            **base,
            gradients=whole if stay else (head + (layers - left) * a_block) * weight,
            casts=left * block.casts,
            activations=left * block.kept,
            logits=0,
            workspace=block.workspace + a_block * (weight + product * dtypes.autocasts),
            moment="backward",
        )
    # The update of Muon, or the tied embedding's second gradient, which is added to the first.
    tied = head * weight if config.tie_word_embeddings or stay else 0
    yield MemoryPlan(
        **base,
        gradients=whole,
        casts=0,
        activations=0,
        logits=0,
        workspace=max(tied, _muon_bytes(config) if step.optim == "muon" else 0),
        moment="update",
    )


def _moments_fully_sharded(
    config: ModelConfig, step: StepShape, block: "_BlockBytes"
) -> Iterator[MemoryPlan]:
    """The same where weights, gradients and states are divided and blocks gathered as they come.

    Blocks are gathered in the dtype of products, so autocast keeps no casts of them. Embedding and
    head are whole from the beginning of a step to its end, as they are stored.
    """
    dtypes, ranks = arithmetic(step.precision), step.world_size
    weight, product = dtypes.weights.itemsize, dtypes.products.itemsize
    layers, tokens = config.num_hidden_layers, step.tokens
    count = count_parameters(config)
    ends = count.embedding + count.position + count.lm_head
    head = config.vocab_size * config.hidden_size
    a_block = (count.total - ends) // layers
    base = {
        "weights": count.total * (weight + 4 * step.has_reference) // ranks,
        "optimizer": _state_bytes(config, step) // ranks,
    }
    rows = count.total * weight // ranks
    # The block at work and the next; the latter arrives in one piece, which is copied out.
    blocks = 3 * a_block * product
    yield MemoryPlan(
        **base,
        gradients=rows if step.parts > 1 else 0,
        casts=head * product if dtypes.autocasts else 0,
        activations=layers * block.kept + tokens * (config.hidden_size * (weight + product) + 4),
        logits=logits_bytes(config, tokens, dtype=dtypes.products) + head * product,
        workspace=0,
        moment="loss",
        gathered=ends * weight + blocks,
    )
    # A block's gradient as backward makes it, and as it is sent; the one before may be on its way.
    sent = a_block * (product + 2 * weight)
    for left in (layers, 1):
        made = (layers - left) * a_block * weight // ranks
        yield MemoryPlan(
            **base,
            gradients=(rows if step.parts > 1 else made) + head * weight,
            casts=0,
            activations=left * block.kept,
            logits=0,
            workspace=block.workspace,
            moment="backward",
            gathered=ends * weight + blocks + sent,
        )
    # The end of backward: gradients of embedding and head as they are, and as they are sent.
    yield MemoryPlan(
        **base,
        gradients=rows,
        casts=0,
        activations=0,
        logits=0,
        workspace=0,
        moment="update",
        gathered=3 * ends * weight,
    )


@dataclass(frozen=True)
class _BlockBytes:
    """Of one block: the mean, where some are dense and some sparse."""

    kept: int
    """Activations between its forward and its backward."""
    casts: int
    """Weights in the dtype of products, in between."""
    workspace: int
    """During its backward: what is computed anew, and gradients of activations."""

    @classmethod
    def of(cls, config: ModelConfig, step: StepShape) -> "_BlockBytes":
        dtypes = arithmetic(step.precision)
        stream = config.hidden_size * dtypes.weights.itemsize
        narrow = config.hidden_size * dtypes.products.itemsize
        count, layers = count_parameters(config), config.num_hidden_layers
        tokens = step.tokens
        whole = _a_block(config, dtypes.products, "none")
        again, mlp = 0, whole - _a_block(config, dtypes.products, "selective")
        # The stream stays wide before attention and before the MLP.
        kept = whole + 2 * (stream - narrow)
        if not _fuses_mlp(config, step):
            # Plain torch keeps the activation and its product with the other half as well.
            plain = 2 * config.intermediate_size * dtypes.products.itemsize
            kept, mlp = kept + plain, mlp + plain
        cast = dtypes.products.itemsize if dtypes.autocasts else 0
        casts = cast * (count.attention + count.mlp + count.experts + count.router) // layers
        cast_again = 0
        if step.recompute == "full":
            again, kept = kept, stream
            casts, cast_again = 0, casts
        elif step.recompute == "selective":
            again, kept = mlp, kept - mlp
            cast_again = casts - cast * count.attention // layers
            casts -= cast_again
        inside = mlp * 3 // 2  # gradients of gate and up, and their product anew
        if step.parallel == "fsdp" and step.world_size > 1:
            casts = cast_again = 0
        return cls(
            kept=tokens * kept,
            casts=casts,
            workspace=tokens * (again + inside + stream + narrow) + cast_again,
        )


def _fuses_mlp(config: ModelConfig, step: StepShape) -> bool:
    """As `tilewright_kernels.gated_mlp` chooses; mixtures of experts are always fused."""
    if step.fused_mlp is not None:
        return step.fused_mlp
    if config.sparse_layers:
        return True
    whole = config.hidden_size % 8 == 0 and config.intermediate_size % 8 == 0
    two_bytes = arithmetic(step.precision).products.itemsize == 2
    return two_bytes and whole and step.tokens >= _LEAST_FUSED_TOKENS


def _a_block(config: ModelConfig, dtype: torch.dtype, recompute: Recompute) -> int:
    """Bytes that a block keeps a token, all in one dtype, and nothing computed anew."""
    layers = max(2, config.num_hidden_layers)
    same = dataclasses.replace(config, num_hidden_layers=layers, layer_types=None)
    output = 2 * config.hidden_size * dtype.itemsize + 4
    none = activation_bytes(same, 1, 1, dtype=dtype) - output
    if recompute == "none":
        return none // layers
    # All blocks but one keep the input of their MLP in place of its inside.
    saved = none - (activation_bytes(same, 1, 1, dtype=dtype, recompute=recompute) - output)
    return none // layers - saved // (layers - 1)


def _state_bytes(config: ModelConfig, step: StepShape) -> int:
    dtypes = arithmetic(step.precision)
    states = optimizer_bytes(
        config,
        "muonw" if step.optim == "muon" else "adamw",
        dtype=dtypes.weights,
        master=dtypes.master == "exact",
    )
    if step.optim == "muon" and dtypes.weights.itemsize == 2:
        count = count_parameters(config)
        states -= 2 * (count.attention + count.mlp + count.experts)  # momentum is as gradients are
    return states


def _muon_bytes(config: ModelConfig) -> int:
    """Matrices of one batch of Newton–Schulz in float16: X twice, and three products of them.

    A batch holds matrices of one shape, up to `_MUON_BATCH` elements.
    """
    count = count_parameters(config)
    hidden = count.attention + count.mlp + count.experts
    return 5 * 2 * min(_MUON_BATCH, hidden)
