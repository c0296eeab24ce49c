"""Options that cannot work, or differ between ranks, are refused at the door."""

from typing import Any

import pytest
import torch
from torch import nn

from tilewright_dist import DistributedDataParallel
from tilewright_dist.testing import run_ranks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_cap_mb": 0}, "bucket_cap_mb must be positive, not 0"),
        ({"first_bucket_mb": -1.0}, "first_bucket_mb must be positive"),
        ({"reduce_dtype": torch.int32}, "floating-point dtype, not torch.int32"),
        (
            {"transport": "pigeon"},
            "unknown transport 'pigeon'; valid: 'auto', 'collective', 'copy'",
        ),
    ],
)
def test_options_out_of_range(one_rank_group, options, message):
    with pytest.raises(ValueError, match=message):
        DistributedDataParallel(nn.Linear(2, 1), **options)


def test_complex_gradients_travel_whole_or_are_refused(one_rank_group):
    model = nn.Linear(2, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'weight' is torch\.complex64, whose imaginary part"):
        DistributedDataParallel(model, reduce_dtype=torch.bfloat16)
    DistributedDataParallel(model)


def test_static_graph_needs_tensors_in_the_output(one_rank_group):
    class Hiding(nn.Sequential):
        def forward(self, input) -> Any:
            return iter([super().forward(input)])

    wrapper = DistributedDataParallel(Hiding(nn.Linear(2, 2)), static_graph=True)
    with pytest.raises(TypeError, match="no tensor found in the list_iterator that the module"):
        wrapper(torch.ones(1, 2))
    with torch.no_grad():
        assert next(wrapper(torch.ones(1, 2))).shape == (1, 2)


def differ(rank):
    strategies: list[Any] = ["naive", "per_parameter", "bucketed"]
    messages = []
    for strategy in strategies:
        with pytest.raises(ValueError, match="averaged differs between ranks") as differs:
            DistributedDataParallel(nn.Linear(2, 1), strategy=strategy, bucket_cap_mb=1.0 + rank)
        messages.append(str(differs.value))
    with pytest.raises(ValueError, match=r"naive .* on ranks 0; bucketed .* on ranks 1"):
        DistributedDataParallel(nn.Linear(2, 1), strategy=strategies[2 * rank])
    return messages


def test_options_that_differ_are_named():
    for messages in run_ranks(differ):
        for differs in messages:
            assert "bucket_cap_mb=2.0" in differs
            assert differs.endswith("on ranks 1. Pass the same on every rank")
