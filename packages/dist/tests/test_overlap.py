"""Gathered parameters are waited for by the block that reads them, compiled or not."""

import pytest
import torch
from torch import nn

from tilewright_dist.overlap import LateGather


class Noted:
    """A gather that notes when it is waited for."""

    def __init__(self, name, events):
        self._name, self._events = name, events

    def wait(self):
        self._events.append(f"wait {self._name}")


class Block(nn.Linear):
    def forward(self, input):
        # Of its own: torch's is not compiled as such.
        return input @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(Block(2, 2) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def noting(events):
    """A backend of torch.compile whose code notes when it runs."""

    def backend(graph, _):
        def run(*args):
            events.append("block")
            return graph(*args)

        return run

    return backend


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_compiled_blocks_wait_for_their_own(when):
    events: list[str] = []
    model = Model()

    backend = noting(events)

    def compile_blocks():
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)

    if when != "after":
        compile_blocks()
    names = ["embed", *(f"blocks.{number}" for number in range(3))]
    late = LateGather(model, {f"{name}.weight": i for i, name in enumerate(names)})
    if when == "after":
        compile_blocks()
    for _ in range(3):
        if when == "twice":
            compile_blocks()
        events.clear()
        late.hold({number: Noted(name, events) for number, name in enumerate(names)})
        model(torch.ones(1, 2))
        assert events == [
            *("wait embed", "wait blocks.0", "block"),
            *("wait blocks.1", "block", "wait blocks.2", "block"),
        ]


def test_blocks_that_are_not_compiled_wait_for_their_own():
    events: list[str] = []
    model = Model()
    for block in model.blocks:
        block.register_forward_hook(lambda *_: events.append("block"))
    late = LateGather(model, {"embed.weight": 0, "blocks.0.weight": 1, "blocks.2.bias": 2})
    late.hold({number: Noted(str(number), events) for number in range(3)})
    model(torch.ones(1, 2))
    assert events == ["wait 0", "wait 1", "block", "block", "wait 2", "block"]
