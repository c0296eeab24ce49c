import pytest
import torch

from tilewright_bench import roofline
from tilewright_bench.saved import SavedRunError, load


@pytest.fixture
def ceilings(monkeypatch):
    """Measured on the CPU, on sizes that take no time."""
    monkeypatch.setattr(roofline, "COPY_BYTES", (2**10, 2**12))
    monkeypatch.setattr(roofline, "CACHED_BYTES", 2**10)
    monkeypatch.setattr(roofline, "MATMUL_SIZE", 16)
    monkeypatch.setattr(roofline, "SECONDS", 1e-3)
    monkeypatch.setattr(roofline, "DTYPES", {"bf16": torch.bfloat16, "fp32": torch.float32})
    return roofline.measure(torch.device("cpu"), say=lambda line: None)


def test_ceilings_say_where_they_were_measured(ceilings, tmp_path):
    assert ceilings["copy_gb_per_s"].keys() == {"1024", "4096"}
    assert ceilings["matmul_tflop_per_s"].keys() == {"bf16", "fp32"}
    assert min(*ceilings["copy_gb_per_s"].values(), *ceilings["matmul_tflop_per_s"].values()) > 0
    assert {"gpu", "driver", "torch"} <= ceilings["machine_info"].keys()
    assert "id" in ceilings["commit_info"]
    roofline.save(ceilings, tmp_path / "roofline" / "here.json")
    assert roofline.load(tmp_path / "roofline" / "here.json") == ceilings


def test_the_choice_of_tf32_is_put_back(ceilings):
    assert not torch.backends.cuda.matmul.allow_tf32


def test_our_operators_lie_at_their_intensity_and_speed(ceilings, info, write_run, tmp_path):
    infos = {"a": info(), "b": info(provider="torch"), "c": info(flops=0)}
    path = write_run(tmp_path / "h200-norms.json", dict.fromkeys(infos, 1.0), infos=infos)
    drawn = roofline.roofline(ceilings, [load(path)])
    assert drawn.points == (("norms", "fwd", 1.0, 3.91),)
    assert dict(drawn.bandwidths)["memory"] == round(ceilings["copy_gb_per_s"]["4096"])


def test_a_file_without_ceilings_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"machine_info": {}, "matmul_tflop_per_s": {}}')
    with pytest.raises(SavedRunError, match="holds no ceilings"):
        roofline.load(tmp_path / "run.json")
    with pytest.raises(SavedRunError, match="cannot be read"):
        roofline.load(tmp_path / "nothing.json")
