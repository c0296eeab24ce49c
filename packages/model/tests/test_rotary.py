import math

import pytest
import torch

from tilewright_model.rotary import RotaryTables, rotary_tables


def test_tables_hold_the_angles_of_the_formula() -> None:
    cos, sin = rotary_tables(head_dim=6, max_positions=40, theta=500.0)
    assert cos.shape == sin.shape == (40, 3)
    assert cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 39):
        for i in range(3):
            angle = position * 500.0 ** (-2 * i / 6)
            # Angles are float32: an error of up to half an ulp of 39, 2e-6, before the cosine.
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=4e-6)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=4e-6)


def test_rows_are_views_of_the_tables() -> None:
    rotary = RotaryTables(4, 10, 100.0)
    cos, sin = rotary(3, 5)
    assert torch.equal(cos, rotary.cos[3:8])
    assert torch.equal(sin, rotary.sin[3:8])
    assert cos.untyped_storage().data_ptr() == rotary.cos.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_tables_exact(dtype: torch.dtype) -> None:
    rotary = RotaryTables(8, 300, 10000.0)
    cos, sin = rotary.cos.clone(), rotary.sin.clone()
    rotary.to(dtype)
    assert torch.equal(rotary.cos, cos)
    assert torch.equal(rotary.sin, sin)


def test_tables_move_with_the_model(device: torch.device) -> None:
    rotary = RotaryTables(8, 300, 10000.0).to(device)
    assert rotary.cos.device.type == device.type
    assert torch.equal(rotary.cos.cpu(), rotary_tables(8, 300, 10000.0)[0])


def test_leaving_the_meta_device_fills_the_tables() -> None:
    with torch.device("meta"):
        rotary = RotaryTables(8, 20, 10000.0)
    assert rotary.cos.is_meta
    rotary.to_empty(device="cpu")
    cos, sin = rotary_tables(8, 20, 10000.0)
    assert torch.equal(rotary.cos, cos)
    assert torch.equal(rotary.sin, sin)


def test_tables_are_not_part_of_a_checkpoint() -> None:
    assert RotaryTables(8, 20, 10000.0).state_dict() == {}
