"""What tests beside several ranks, or on one, have in common."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def one_rank_group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup | None]:
    """The default group of this process alone, gloo unless a test asks for another backend."""
    backend = getattr(request, "param", "gloo")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many as a rank has: sums added up in another order would differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
