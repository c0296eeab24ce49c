"""rotary_table and RotaryEmbedding: values against math, and tables that stay float32."""

import copy
import math

import pytest
import torch

from tilewright_kernels import RotaryEmbedding, apply_rotary_emb, rotary_table, use_backend


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.smoke
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_table_is_the_formula(theta, device):
    cos, sin = rotary_table(8, 40000, theta, device=device)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.device.type == device.type
    # Far out, where angles in float32 would be off by a thousandth.
    for t, i in ((0, 0), (1, 0), (39999, 0), (39999, 1), (12345, 3)):
        angle = t * theta ** (-2 * i / 8)
        expected = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        ours = torch.stack((cos[t, i], sin[t, i])).cpu().double()
        torch.testing.assert_close(ours, expected, rtol=2**-24, atol=2**-40)


def test_table_follows_the_default_device():
    with torch.device("meta"):
        assert rotary_table(8, 4)[0].is_meta
        assert rotary_table(8, 4, device="cpu")[0].device.type == "cpu"


def test_bad_table():
    for dim in (7, 0, -2):
        with pytest.raises(ValueError, match=f"dim is {dim}; .* even"):
            rotary_table(dim, 4)
    with pytest.raises(ValueError, match="length is -1"):
        rotary_table(8, -1)
    with pytest.raises(ValueError, match=r"theta is 0\.0"):
        rotary_table(8, 4, 0.0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_module_is_the_function(interleaved, device):
    module = RotaryEmbedding(6, 9, 100.0, interleaved=interleaved, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 8, generator=generator).to(device) for heads in (3, 1))
    position_ids = torch.tensor([[0, 1, 2, 3, 4], [8, 8, 0, 1, 2]], device=device)
    tables = rotary_table(6, 9, 100.0, device=device)
    with use_backend("triton"):
        for ids in (None, position_ids):
            expected = apply_rotary_emb(q, k, *tables, position_ids=ids, interleaved=interleaved)
            for a, b in zip(module(q, k, ids), expected, strict=True):
                assert torch.equal(a, b)
        cu_seqlens = torch.tensor([0, 2, 5], device=device)
        expected = apply_rotary_emb(
            q[0], k[0], *tables, cu_seqlens=cu_seqlens, interleaved=interleaved
        )
        for a, b in zip(module(q[0], k[0], cu_seqlens=cu_seqlens), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m).bfloat16(),
    ],
    ids=["to(bfloat16)", "half", "double", "copy"],
)
def test_casts_leave_the_tables_alone(cast, device):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4, device=device), RotaryEmbedding(8, 300, device=device)
    )
    expected = rotary_table(8, 300, device=device)
    cast_model = cast(model)
    assert cast_model[0].weight.dtype != torch.float32
    for table, right in zip((cast_model[1].cos, cast_model[1].sin), expected, strict=True):
        assert table.dtype == torch.float32
        assert table.device.type == device.type
        assert torch.equal(table, right)


def test_tables_are_filled_when_a_meta_module_becomes_real(device):
    with torch.device("meta"):
        module = RotaryEmbedding(8, 30)
    assert module.cos.is_meta
    module.to_empty(device=device)
    cos, sin = rotary_table(8, 30, device=device)
    assert torch.equal(module.cos, cos)
    assert torch.equal(module.sin, sin)


def test_tables_are_kept_where_nothing_changes():
    module = RotaryEmbedding(8, 30, device="cpu")
    cos, sin = module.cos, module.sin
    module.share_memory().to("cpu", torch.float32)
    assert module.cos is cos
    assert module.sin is sin
    assert cos.is_shared()


def test_tables_are_buffers_outside_the_state_dict():
    module = RotaryEmbedding(8, 30)
    assert [name for name, _ in module.named_buffers()] == ["cos", "sin"]
    assert not module.state_dict()
    assert not list(module.parameters())


def test_module_compiles(device):
    module = RotaryEmbedding(8, 30, device=device)
    q = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0)).to(device)
    torch._dynamo.reset()
    with use_backend("triton"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(q, q), module(q, q), strict=True):
            assert torch.equal(a, b)
