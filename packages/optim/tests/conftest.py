"""What tests of several optimizers take."""

import pytest

from tilewright_kernels import use_backend


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    """Each backend in turn, chosen for every operator."""
    with use_backend(request.param):
        yield request.param
