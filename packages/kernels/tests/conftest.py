"""What several of the kernels' tests share: dtypes, and tiles that are small."""

import importlib

import pytest
import torch

from tilewright_kernels._product_tiles import Tile
from tilewright_kernels._triton import INTERPRETED
from tilewright_kernels.flash_attention import backward, forward
from tilewright_kernels.grouped_mm import launches as grouped_launches
from tilewright_kernels.matmul import launches
from tilewright_kernels.testing import FLOATING

# The package's attribute of this name is the function.
symmetric_matmul = importlib.import_module("tilewright_kernels.symmetric_matmul")

# The interpreter multiplies bfloat16 as bits; float64 is for the interpreter.
ATTENTION_DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.float16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


@pytest.fixture(params=range(3))
def attention_dtype(request, device):
    return ATTENTION_DTYPES[device.type][request.param]


@pytest.fixture(params=FLOATING, ids=str)
def dot_dtype(request, device):
    """Every dtype that is multiplied; bfloat16 on the GPU alone."""
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("needs a GPU: the interpreter multiplies bfloat16 as raw bits")
    return request.param


@pytest.fixture
def small_attention_tiles(request, monkeypatch):
    """In the interpreter tiles of 32 queries and 64 keys, whatever the dtype and the head is."""
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    of_every_size = {size: {256: forward.Tile(32, 64, 2, 4)} for size in (2, 4, 8)}
    monkeypatch.setattr(forward, "TILES", of_every_size)
    of_every_size = {size: {256: backward.Tile(32, 64, 2, 4)} for size in (2, 4, 8)}
    monkeypatch.setattr(backward, "TILES", dict.fromkeys(backward.TILES, of_every_size))
    for module in (forward, backward):
        module.tile_for.cache_clear()
    yield
    for module in (forward, backward):
        module.tile_for.cache_clear()


@pytest.fixture(params=[True, False], ids=["wide", "single"])
def small_triangle_tiles(request, monkeypatch):
    """Several rows of blocks in small matrices, wide tiles and single ones."""
    tile = symmetric_matmul.Tile(16, request.param, 16, 2, 4, 1, 1.0)
    monkeypatch.setattr(symmetric_matmul, "TILES", {2: (tile,), 4: (tile,)})
    small = {"BLOCK": 16, "BLOCK_K": 16, "num_stages": 2, "num_warps": 4}
    monkeypatch.setattr(symmetric_matmul, "POINTER_TILES", {2: small, 4: small, 8: small})


@pytest.fixture
def small_group_tiles(request, monkeypatch):
    """In the interpreter tiles of 16: several blocks in a group, or for an expert, of few rows."""
    if request.node.get_closest_marker("gpu") is None:
        small = Tile(16, 32, 16, 2, 2, 4)
        monkeypatch.setattr(grouped_launches, "POINTER_TILES", dict.fromkeys((2, 4, 8), small))
    grouped_launches.tile_for.cache_clear()
    yield
    grouped_launches.tile_for.cache_clear()


@pytest.fixture
def small_matmul_tiles(monkeypatch):
    """Tiles of 16 on the CPU: several of them in matrices that the interpreter is quick with."""
    if INTERPRETED:
        for tiles in launches.TILES.values():
            for size, tile in tiles.items():
                small = tile._replace(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16)
                monkeypatch.setitem(tiles, size, small)
    launches.tile_for.cache_clear()
    yield
    launches.tile_for.cache_clear()
