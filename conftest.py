"""Which device a test runs on, for all packages.

A test that takes the fixture `device` runs on the CPU, through Triton's interpreter, and, carrying
the marker `gpu`, on a CUDA device. Tests that need hardware are skipped with one line that says
what they need.
"""

import importlib.util
import os

import pytest
import torch

# Triton reads this when a kernel is decorated, so it is set before any test module is imported. Its
# interpreter needs numpy, which the test group holds and not every environment does.
if not torch.cuda.is_available() and importlib.util.find_spec("numpy") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    devices = 0 if INTERPRETED else torch.cuda.device_count()
    if os.environ.get("TILEWRIGHT_REQUIRE_GPU") == "1" and devices == 0:
        raise pytest.UsageError("the GPU form of the tests was asked for, and torch sees no device")
    for item in items:
        multigpu = item.get_closest_marker("multigpu")
        needed = multigpu.args[0] if multigpu else int(item.get_closest_marker("gpu") is not None)
        if needed > devices:
            seen = "kernels are interpreted" if INTERPRETED else f"{devices} seen"
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), {seen}"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU (kernels interpreted) and, where there is one, the current CUDA device."""
    if request.param == "cpu" and HAS_TRITON and not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1: this process compiles its kernels for the GPU")
    return torch.device(request.param)
