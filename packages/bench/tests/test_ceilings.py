import pytest
import torch

from tilewright_bench.ceilings import (
    L2_MULTIPLE,
    MAX_INPUT_SETS,
    copies,
    input_sets,
    matmul_tflop_per_s,
    products,
)

CPU = torch.device("cpu")


def test_input_sets_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 60_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda", 0)
    for traffic in (1_000_000, 59_999_999, 134_217_728):
        sets = input_sets(traffic, cuda)
        assert traffic * (sets - 1) < L2_MULTIPLE * Properties.L2_cache_size <= traffic * sets
    assert input_sets(1 << 32, cuda) == 1, "larger than any cache: one set will do"
    assert input_sets(1, cuda) == MAX_INPUT_SETS


def test_copies_move_the_bytes_they_are_asked_for(device):
    first, second = copies(6400, 2, device)
    target, other = first(), second()
    assert target.nbytes == 3200, "each byte is read and written"
    assert target.data_ptr() != other.data_ptr()
    assert len(target.unique()) > 200, "random bytes, not zeros"


@pytest.mark.parametrize(("traffic", "size"), [(1, 128), (256, 128), (257, 256), (6000, 3072)])
def test_copies_are_of_whole_cache_lines(traffic, size):
    (copy,) = copies(traffic, 1, CPU)
    assert copy().nbytes == size


def test_a_product_is_one_of_random_matrices(device):
    result = products(16, torch.float32, device)()
    assert result.shape == (16, 16)
    assert result.std() > 1, "sums of 16 products of normal numbers"


def test_the_speed_of_products_is_measured_once_a_session():
    first = matmul_tflop_per_s(torch.float32, CPU)
    assert first > 0
    assert matmul_tflop_per_s(torch.float32, CPU) == first


@pytest.mark.gpu
def test_bfloat16_products_run_on_tensor_cores():
    cuda = torch.device("cuda")
    assert matmul_tflop_per_s(torch.bfloat16, cuda) > 2 * matmul_tflop_per_s(torch.float32, cuda)
