import platform

import pytest
import torch

from tilewright_bench.environment import by_device, default_device, describe


def put_nvidia_smi_on_path(folder, monkeypatch, script):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def pretend_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_cpu_is_described_without_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = describe()
    assert (place["gpu"], place["driver"], place["cuda"]) == (None, None, None)
    assert place["torch"] == torch.__version__
    assert place["python"] == platform.python_version()
    assert "liger-kernel" in place


@pytest.mark.usefixtures("pretend_gpu")
def test_a_gpu_is_described_with_its_driver(tmp_path, monkeypatch):
    put_nvidia_smi_on_path(tmp_path, monkeypatch, "echo 580.159.04; echo 580.159.04")
    place = describe()
    assert (place["gpu"], place["gpu_count"]) == ("NVIDIA H200", 2)
    assert place["driver"] == "580.159.04"


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize("script", ["exit 9", "true"], ids=["fails", "says nothing"])
def test_a_driver_that_cannot_be_asked_is_none(tmp_path, monkeypatch, script):
    put_nvidia_smi_on_path(tmp_path, monkeypatch, script)
    assert describe()["driver"] is None


@pytest.mark.usefixtures("pretend_gpu")
def test_a_driver_without_a_tool_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe()["driver"] is None


@pytest.mark.parametrize(("present", "device", "size"), [(True, "cuda", 9), (False, "cpu", 1)])
def test_the_device_at_hand_chooses(monkeypatch, present, device, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert default_device().type == device
    assert by_device(gpu=9, cpu=1) == size
