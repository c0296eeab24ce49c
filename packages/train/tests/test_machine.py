"""Devices, threads and peaks; settings that come back."""

import pytest
import torch

from tilewright_kernels import backend_report
from tilewright_train.errors import InputError
from tilewright_train.machine import (
    available_cores,
    backends,
    choose_device,
    choose_threads,
    configured,
    peak_flops,
    peak_memory,
    peak_of,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3090", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_peak_is_of_exactly_that_gpu_or_none(name: str, peak: float | None) -> None:
    # H200 contains H20, A100 contains A10: a table by prefix would be wrong.
    assert peak_of(name) == peak


def test_the_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


@pytest.mark.parametrize("name", ["cuda:99", "cuda:", "mps", "gpu", "cpu:1", ""])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(name: str) -> None:
    with pytest.raises(InputError, match=r"device .* is not .*: --device takes one of cpu"):
        choose_device(name)


def test_without_a_gpu_the_cpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == ("cpu", "no CUDA device on this machine")
    assert choose_device("cpu") == ("cpu", "asked for")
    with pytest.raises(InputError, match="'cuda' is not there"):
        choose_device("cuda")


def test_processes_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("tilewright_train.machine.available_cores", lambda: 8)
    assert choose_threads(1) == (8, "8 cores")
    assert choose_threads(2) == (4, "8 cores, 2 processes")
    assert choose_threads(16)[0] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(1)[1] == "OMP_NUM_THREADS is 3"
    assert available_cores() >= 1


def test_settings_last_as_long_as_the_run() -> None:
    before = torch.get_num_threads()
    backend = "auto,rms_norm=torch"
    with configured(threads=1, deterministic=True, backend=backend, device="cpu"):
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        assert backend_report()["rms_norm"].setting == "torch"
        assert backend_report()["swiglu"].setting == "auto"
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert backend_report()["rms_norm"].setting == "auto"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("trition", "'trition' is not a backend; choose from auto, triton, torch"),
        ("auto,rms_nrom=torch", "'rms_nrom' is not an operator"),
        ("auto,rms_norm=cuda", "'cuda' is not a backend"),
    ],
)
def test_an_unknown_backend_or_operator_is_an_error(backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backends(backend)


@pytest.mark.parametrize(
    "backend", ["triton", " triton", "auto,rms_norm=triton", "rms_norm = triton"]
)
def test_triton_on_the_cpu_needs_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = configured(threads=1, deterministic=True, backend=backend, device="cpu")
    with pytest.raises(InputError, match="needs a CUDA device"), settings:
        pass
    assert backend_report()["rms_norm"].setting == "auto"


def test_spaces_and_a_last_comma_are_no_mistake() -> None:
    with backends(" torch, rms_norm = auto,"):
        settings = {name: row.setting for name, row in backend_report().items()}
    assert (settings["rms_norm"], settings["swiglu"]) == ("auto", "torch")


def test_memory_counts_bytes() -> None:
    assert 10 * 2**20 < peak_memory(torch.device("cpu")) < 2**42
