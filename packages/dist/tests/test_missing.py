"""Gradients that some ranks lack, or all: who hears of it, and what is averaged."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from tilewright_dist import DistributedDataParallel
from tilewright_dist.testing import run_ranks

TINY_MB = 1e-6  # below every tensor: one bucket each


def leave_unused(rank):
    """Messages of errors, by strategy."""
    messages = {}
    partly: Any = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    strategies: list[Any] = ["naive", "per_parameter", "bucketed"]
    for strategy in strategies:
        wrapper = DistributedDataParallel(partly, strategy=strategy)
        with pytest.raises(RuntimeError, match="no gradient arrived") as unused:
            partly["used"](torch.ones(1, 2)).sum().backward()
        messages[strategy] = str(unused.value)
        del wrapper
        partly.zero_grad()
    return messages


def test_unused_parameters_are_named():
    for rank, messages in enumerate(run_ranks(leave_unused)):
        for message in messages.values():
            assert message.startswith(
                f"rank {rank}: no gradient arrived for 'unused.weight', 'unused.bias'."
            )


def lack_at_first(rank):
    """Backward passes in which rank 0 lacks a gradient, then one in which nobody does."""
    model: Any = nn.ModuleDict({"used": nn.Linear(2, 2), "late": nn.Linear(2, 2)})
    wrapper = DistributedDataParallel(model)

    def backward(names):
        model.zero_grad()
        rows = torch.full((1, 2), rank + 1.0)
        torch.stack([model[name](rows).sum() for name in names]).sum().backward()

    for inspected in (False, True):
        context = wrapper.detect_nonfinite_gradients() if inspected else contextlib.nullcontext()
        with context:
            if rank == 0:
                with pytest.raises(RuntimeError, match=r"no gradient arrived for 'late\.weight'"):
                    backward(["used"])
            else:
                backward(["late", "used"])
    backward(["used", "late"])
    return [p.grad for p in model.parameters()]


def test_a_rank_that_lacks_gradients_at_first_leaves_nobody_waiting():
    for gradients in run_ranks(lack_at_first, timeout=60):
        assert [g.unique().tolist() for g in gradients] == [[1.5], [1.0]] * 2


class _Branches(nn.Module):
    """The first branch on all ranks, the second on rank 1, the third on none."""

    def __init__(self, branches, own):
        super().__init__()
        self.branches, self.own = branches, own

    def forward(self, x):
        taken = self.branches[0](x)
        return taken + self.branches[1](x) if self.own in (1, None) else taken


def test_branch_that_some_or_no_rank_takes():
    for found, static, never in run_ranks(take_branches):
        assert found[0].tolist() == [[1.5] * 2]
        assert found[1].tolist() == [[1.0] * 2]
        assert found[2] is None
        assert static[0].tolist() == static[1].tolist() == [[1.5] * 2]
        assert never[0].tolist() == never[1].tolist() == [[1.5] * 2]
        assert never[2] is None


def take_branches(rank):
    found = []
    searching = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3)), own=rank)
    static = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(2)), own=None)
    never = _Branches(nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3)), own=None)
    cases: Any = (
        (searching, {"find_unused_parameters": True}),
        (static, {"static_graph": True}),
        (never, {"static_graph": True, "find_unused_parameters": True}),
    )
    for model, options in cases:
        wrapper = DistributedDataParallel(model, **options, bucket_cap_mb=TINY_MB)
        for _ in range(3):
            wrapper.zero_grad()
            wrapper(torch.full((1, 2), rank + 1.0)).sum().backward()
        found.append([b.weight.grad for b in model.branches])
    return found


def test_sparse_gradients_are_refused_by_name(one_rank_group):
    wrapper = DistributedDataParallel(nn.Embedding(3, 2, sparse=True))
    with pytest.raises(TypeError, match=r"gradient of 'weight' has layout torch\.sparse_coo"):
        wrapper(torch.tensor([1])).sum().backward()


class Looked(nn.Module):
    """An embedding whose gradient is sparse, or not, before a linear layer."""

    def __init__(self, sparse):
        super().__init__()
        self.table = nn.Embedding(3, 2, sparse=sparse)
        self.head = nn.Linear(2, 1, bias=False)

    def forward(self, tokens):
        return self.head(self.table(tokens))


def be_sparse_on_rank_0(rank):
    gradients = {}
    strategies: list[Any] = ["naive", "per_parameter", "bucketed"]
    for strategy in strategies:
        torch.manual_seed(0)
        model: Any = Looked(rank == 0)
        wrapper = DistributedDataParallel(model, strategy=strategy)
        loss = wrapper(torch.tensor([rank])).sum()
        if rank == 0:
            with pytest.raises(TypeError, match=r"gradient of 'table\.weight' has layout"):
                loss.backward()
        else:
            loss.backward()
            gradients[strategy] = model.table.weight.grad.clone()
        # What follows meets as well.
        wrapper.zero_grad()
        model.table.sparse = False
        wrapper(torch.tensor([rank])).sum().backward()
    return gradients


def test_a_sparse_gradient_on_one_rank_leaves_no_other_waiting():
    _, gradients = run_ranks(be_sparse_on_rank_0)
    for gradient in gradients.values():
        # Row 1 is rank 1's; rank 0 counts as zeros.
        assert gradient[1].abs().sum() > 0
        assert gradient[[0, 2]].abs().sum() == 0
