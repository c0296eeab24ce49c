"""Muon's step on tensors of one kind: which matrices, in which batches, through which launches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from torch.autograd.graph import increment_version

from tilewright_optim._coefficients import Coefficients, triples
from tilewright_optim._muon_kernels import Tensors, momentum_and_normalize, send, update
from tilewright_optim._muon_matrices import Batch, batches_of, matrices_of
from tilewright_optim._newton_schulz_products import iterate
from tilewright_optim._tables import PointerTables
from tilewright_optim.muon_functional import AdjustLr, lr_factor

MOST_ELEMENTS = 2**28
"""Elements of a batch, for which X and its successors take 8 to 10 bytes each for a while. Halves
of it are 2.5 % slower over 453 M parameters on an H200, twice as much is no faster."""


@dataclass
class Plan:
    """The batches of one kind of tensors, and their tables on the device; kept between steps."""

    key: object = None
    batches: list[Batch] = field(default_factory=list)
    tables: list[PointerTables] = field(default_factory=list)

    def follow(self, params: Sequence[Tensor], split_sizes: Sequence[int] | None) -> None:
        """Make the batches anew where other shapes take part than in the step before."""
        shapes = [param.shape for param in params]
        key = shapes, None if split_sizes is None else tuple(split_sizes)
        if key == self.key:
            return
        self.key = key
        matrices = [x for i, s in enumerate(shapes) for x in matrices_of(i, s, split_sizes)]
        self.batches = batches_of(matrices, MOST_ELEMENTS)
        self.tables = [PointerTables(params[0].device, chunk=16) for _ in self.batches]


def muon_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lows: Sequence[Tensor] = (),
    *,
    plan: Plan,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Coefficients,
    eps: float,
    ns_steps: int,
    adjust_lr_fn: AdjustLr | None = None,
    split_sizes: Sequence[int] | None = None,
    cautious: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    form: str = "auto",
) -> None:
    """`muon_reference` for tensors on one device and of one dtype a column, in batches.

    Arguments are as there; lr, grad_scale and found_inf on the parameters' device where they are
    tensors. `plan` belongs to these parameters and is kept by the caller from step to step; `form`
    is that of `newton_schulz`.
    """
    plan.follow(params, split_sizes)
    steps = triples(ns_coefficients, ns_steps)
    rows = [_in_rows(column) for column in (params, grads, momentum_buffers, lows)]
    tensors = Tensors(*(column for column, _ in rows))
    sent = send(plan.batches, plan.tables, tensors)
    for batch, tables in zip(plan.batches, sent, strict=True):
        x = momentum_and_normalize(
            batch, tensors, tables, momentum=momentum, nesterov=nesterov, eps=eps,
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        x = iterate(x, steps, form)
        update(
            batch, tensors, tables, x, lr=lr, weight_decay=weight_decay,
            factor=partial(lr_factor, adjust_lr_fn), cautious=cautious, found_inf=found_inf,
        )  # fmt: skip
    for i in (0, 2, 3):  # gradients are only read
        for original, copy in rows[i][1]:
            original.copy_(copy)
    increment_version(params)


def _in_rows(column: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The tensors, contiguous without a negative bit, and which of them are copies of which."""
    contiguous = [tensor.contiguous().resolve_neg() for tensor in column]
    pairs = zip(column, contiguous, strict=True)
    return contiguous, [(old, new) for old, new in pairs if old is not new]
