import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import skinny_linear, use_backend
from tilewright_kernels._skinny_linear_tiles import (
    HopperTile,
    RowsTile,
    RowTile,
    hopper_tile,
    row_tile,
    rows_tile,
)
from tilewright_kernels.skinny_linear import (
    MAX_SCALED_ROWS,
    SUMMED,
    hands_norm_on,
    skinny_linear_reference,
    skinny_linear_scaled,
)
from tilewright_kernels.testing import (
    assert_as_accurate,
    check_deterministic,
    count_launches,
    layouts,
    no_synchronization,
    poisoned_memory,
    randn,
)

module = importlib.import_module("tilewright_kernels.skinny_linear")

EPS = 1e-6
# What a decoder asks for: q, k and v; the products that add to its stream; the MLP's first.
FORMS = ("norm", "residual", "norm gated", "plain", "norm gated residual")
# The interpreter multiplies bfloat16 as bits; one row is not multiplied by tensor cores.
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.float16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


@pytest.fixture(params=range(3))
def dtype(request, device):
    return DTYPES[device.type][request.param]


def make(form, rows, n, k, dtype, device, seed=0):
    x = randn(rows, k, dtype=dtype, device=device, seed=seed)
    gated = "gated" in form
    scale = k**-0.5
    weight = randn(n * (2 if gated else 1), k, dtype=torch.float64, device="cpu", seed=seed + 1)
    options: dict[str, Any] = {"gated": gated}
    if "norm" in form:
        options["norm_weight"] = randn(k, dtype=dtype, device=device, seed=seed + 2) + 1
        options["eps"] = EPS
    if "residual" in form:
        options["residual"] = randn(rows, n, dtype=dtype, device=device, seed=seed + 3)
    return x, (weight * scale).to(device, dtype), options


def check(x, weight, options):
    with use_backend("triton"), count_launches() as launches, poisoned_memory():
        ours = skinny_linear(x, weight, **options)
    assert launches["skinny_linear"] == 1
    plain = {k: v for k, v in options.items() if k not in ("counters", "prefetch_weight")}
    same = skinny_linear_reference(x, weight, **plain)
    wide: dict[str, Any] = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in plain.items()
    }
    oracle = skinny_linear_reference(x.double(), weight.double(), **wide)
    # Gated, sums of size 5 are multiplied with one another.
    assert_as_accurate(ours, same, oracle, scale=25.0)
    return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_matches_float64(form, rows, dtype, device):
    # 45 and 72 are multiples of no tile.
    check(*make(form, rows, 45, 72, dtype, device))


@pytest.mark.parametrize("form", ["norm gated residual", "plain"])
@pytest.mark.parametrize("splits", [2, 3])
def test_programs_that_share_k(form, splits, monkeypatch, dtype, device):
    # Steps of 16 among the programs: 5 for two, 2 + 1 + 2 for three.
    tile = RowsTile(16, 16, splits, 4)
    monkeypatch.setattr(module, "rows_tile", lambda *_: tile)
    x, weight, options = make(form, 5, 45, 72, dtype, device)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    ours = check(x, weight, options | {"counters": counters})
    assert not counters.any()
    own = check(x, weight, options)
    assert torch.equal(ours, own)


@pytest.mark.parametrize("form", ["norm gated residual", "plain"])
def test_one_row_in_several_steps(form, monkeypatch, dtype, device):
    monkeypatch.setattr(module, "row_tile", lambda *_: RowTile(4, 16, 1))
    check(*make(form, 1, 10, 72, dtype, device))


@pytest.mark.parametrize("rows", [1, 2])
def test_without_multiples(rows, device):
    check(*make("norm gated residual", rows, 1, 1, torch.float32, device))


def test_bfloat16_of_one_row(device):
    check(*make("norm gated residual", 1, 45, 72, torch.bfloat16, device))


def test_norm_weight_of_another_dtype(device):
    x, weight, options = make("norm", 3, 16, 24, torch.float16, device)
    options["norm_weight"] = options["norm_weight"].float()
    check(x, weight, options)


@pytest.mark.parametrize("rows", [1, 4])
def test_layouts(rows, device):
    x, weight, options = make("norm residual", rows, 16, 24, torch.float32, device)
    for _, other in layouts((rows, 24), torch.float32, device):
        check(other, weight, options)
    for _, other in layouts((16, 24), torch.float32, device):
        check(x, other, options)
    for _, other in layouts((rows, 16), torch.float32, device):
        check(x, weight, options | {"residual": other})


def test_leading_dimensions_are_kept(device):
    x, weight, options = make("norm residual", 6, 16, 24, torch.float32, device)
    flat = check(x, weight, options)
    residual = options.pop("residual").view(2, 3, 16)
    with use_backend("triton"):
        deep = skinny_linear(x.view(2, 3, 24), weight, residual=residual, **options)
    assert torch.equal(deep, flat.view(2, 3, 16))
    for empty in (x[:0], x[:0].view(2, 0, 24)):
        assert skinny_linear(empty, weight).shape == (*empty.shape[:-1], 16)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape(rows, n, k, form, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(*make(form, rows, n, k, dtype, device))


@pytest.mark.parametrize("rows", [1, 5])
def test_bits_repeat_and_nothing_else_is_written(rows, monkeypatch, device):
    monkeypatch.setattr(module, "rows_tile", lambda *_: RowsTile(16, 16, 2, 4))
    x, weight, options = make("norm residual", rows, 45, 72, torch.float32, device)
    before = x.clone(), weight.clone(), options["residual"].clone()
    with use_backend("triton"):
        check_deterministic(lambda: [skinny_linear(x, weight, **options)])
    for a, b in zip((x, weight, options["residual"]), before, strict=True):
        assert torch.equal(a, b)


def test_a_row_is_the_same_in_every_batch_of_several(device):
    # What one sequence gets may not depend on those beside it, where the tile is one.
    x, weight, options = make("norm gated", 7, 45, 72, torch.float32, device)
    with use_backend("triton"):
        together = skinny_linear(x, weight, **options)
        for rows in (2, 3):
            assert torch.equal(skinny_linear(x[:rows], weight, **options), together[:rows])


def test_tiles_fill_the_device():
    # Products of a 0.5 B decoder on 132 multiprocessors: each has a program, or more.
    shapes = ((4608, 1536, False), (1536, 1536, False), (4096, 1536, True), (1536, 4096, False))
    for n, k, gated in shapes:
        several, one = rows_tile(n, k, 2, gated, 132), row_tile(n, k, 2, gated)
        assert -(-n // several.BLOCK_N) * several.SPLITS >= 132
        assert -(-n // one.BLOCK_N) >= 132
        # What a thread holds of W at once: 256 bytes, which leaves registers for the rest.
        for tile in (several, one):
            rows = tile.BLOCK_N * (2 if gated else 1)
            assert rows * tile.BLOCK_K * 2 <= 256 * 32 * tile.num_warps


def test_rings_fit():
    # Of the same products: one program on a multiprocessor, 227 KiB, or two, for more than 32 rows.
    for n, k, gated in ((4608, 1536, False), (1536, 1536, False), (4096, 1536, True)):
        for block_m, room in ((16, 226), (32, 226), (64, 112)):
            tile = hopper_tile(n, k, gated, block_m)
            held = tile.STAGES * 64 + tile.X_STAGES * block_m
            assert held * tile.PIECES * 64 * 2 <= room * 1024
    # Nobody gets nothing: a program takes at least the columns of one step.
    assert hopper_tile(1536, 128, False, 16).SPLITS == 1
    assert hopper_tile(1536, 2100, False, 16).SPLITS == 2


def check_norm_handed_on(rows, n, k, dtype, device, **given):
    """h + y · W₁ᵀ and the normed products of that, plain and gated, against float64."""
    x, w1, options = make("residual", rows, n, k, dtype, device)
    _, w2, rest = make("norm gated", rows, 72, n, dtype, device, seed=7)
    norm, residual = rest["norm_weight"], options["residual"]
    with count_launches() as launches, poisoned_memory():
        made = skinny_linear_scaled(x, w1, norm, residual=residual, **given)
        ours = [
            skinny_linear(made.scaled, w2, squares=made.squares, eps=EPS, gated=gated, **given)
            for gated in (False, True)
        ]
    y = skinny_linear_reference(x.double(), w1.double(), residual=residual.double())
    same = skinny_linear_reference(x, w1, residual=residual)
    assert_as_accurate(made.y, same, y, scale=3.0)
    assert torch.equal(made.scaled, (made.y.float() * norm.float()).to(dtype))
    squares = made.y.double().square()
    assert made.squares.shape == (-(-n // SUMMED), rows)
    for block, part in enumerate(squares.split(SUMMED, 1)):
        torch.testing.assert_close(made.squares[block].double(), part.sum(1), rtol=1e-5, atol=1e-5)
    for gated, result in zip((False, True), ours, strict=True):
        wide: dict[str, Any] = {"norm_weight": norm.double(), "eps": EPS, "gated": gated}
        oracle = skinny_linear_reference(made.y.double(), w2.double(), **wide)
        plain = skinny_linear_reference(made.y, w2, norm_weight=norm, eps=EPS, gated=gated)
        assert_as_accurate(result, plain, oracle, scale=25.0)
    return launches["skinny_linear"]


def test_norm_that_is_handed_on_is_the_norm(device):
    for n in (64, 200):
        check_norm_handed_on(3, n, 128, torch.float32, device)


def test_bad_squares(device):
    x, weight, options = make("norm", 3, 16, 128, torch.float32, device)
    squares = torch.ones(2, 3, device=device)
    cases: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
        (ValueError, "both norm_weight and squares", {"norm_weight": options["norm_weight"]}),
        (ValueError, r"squares has shape \(3, 2\)", {"squares": squares.t()}),
        (TypeError, "squares is torch.float64", {"squares": squares.double()}),
    )
    for error, message, changes in cases:
        given: dict[str, Any] = {"squares": squares, **changes}
        with pytest.raises(error, match=message):
            skinny_linear(x, weight, **given)
    with pytest.raises(ValueError, match=r"next_norm_weight has shape \(3,\); it must be \(16,\)"):
        skinny_linear_scaled(x, weight, squares[0])
    with pytest.raises(ValueError, match="give \\[M, K\\]"):
        skinny_linear_scaled(x[0], weight, options["norm_weight"])


def test_opcheck(device):
    x, weight, options = make("norm residual", 3, 16, 24, torch.float32, device)
    norm_weight, residual = options["norm_weight"], options["residual"]
    counters = torch.zeros(1, dtype=torch.int32, device=device)
    args = (x, weight, norm_weight, None, residual, counters, EPS, False, False)
    torch.library.opcheck(torch.ops.tilewright.skinny_linear_forward.default, args)


def test_compiles(device):
    x, weight, options = make("norm residual", 3, 16, 24, torch.float32, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with use_backend("triton"), torch.no_grad(), count_launches() as launches:
        expected = skinny_linear(x, weight, **options)
        compiled = torch.compile(skinny_linear, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x, weight, **options), expected)
    assert launches["skinny_linear"] == 2


def test_no_gradient(device):
    x, weight, options = make("norm", 3, 16, 24, torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="no gradient; call it under"):
        skinny_linear(x.requires_grad_(), weight, **options).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_one_by_one_is_the_same(form, device):
    x, weight, options = make(form, 3, 45, 72, torch.float32, device)
    gated, norm_weight = options["gated"], options.get("norm_weight")
    ours = module.by_parts(x, weight, norm_weight, EPS, options.get("residual"), gated)
    expected = skinny_linear_reference(x, weight, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_auto_takes_the_faster_way():
    cuda = torch.device("cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    for rows, launches_expected in ((1, 1), (3, int(hopper)), (70, 0)):
        x, weight, options = make("norm gated", rows, 64, 128, torch.bfloat16, cuda)
        with use_backend("auto"), count_launches() as launches:
            ours = skinny_linear(x, weight, **options)
        assert launches["skinny_linear"] == launches_expected
        expected = skinny_linear_reference(x, weight, **options)
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_more_rows_take_torch(device):
    x, weight, options = make("norm", 65, 16, 24, torch.float32, device)
    with count_launches() as launches:
        ours = skinny_linear(x, weight, **options)
    assert launches["skinny_linear"] == 0
    expected = skinny_linear_reference(x, weight, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    with use_backend("triton"), pytest.raises(ValueError, match="x has 65 rows, more than 64"):
        skinny_linear(x, weight, **options)


def test_bad_input(device):
    x, weight, options = make("norm residual", 3, 16, 24, torch.float32, device)

    def refused(error, message, x=x, weight=weight, **changes):
        with pytest.raises(error, match=message):
            skinny_linear(x, weight, **(options | changes))

    refused(ValueError, r"weight has shape \(16, 20\); it must be \[N, 24\]", weight=weight[:, :20])
    refused(ValueError, r"norm_weight has shape \(16,\); it must be \(24,\)",
            norm_weight=options["residual"][0])  # fmt: skip
    refused(ValueError, r"residual has shape \(3, 24\); it must be \(3, 16\)", residual=x)
    refused(ValueError, "weight has 15 rows; gated", weight=weight[:15], gated=True, residual=None)
    refused(ValueError, "x is a scalar", x=x[0, 0])
    refused(TypeError, "weight is torch.float16 and x torch.float32", weight=weight.half())
    refused(TypeError, "x is torch.int64", x=x.long())
    few = torch.zeros(0, dtype=torch.int32, device=device)
    refused(ValueError, r"counters has shape \(0,\); give 1 contiguous", counters=few)
    refused(TypeError, "counters is torch.int64", counters=few.long())
    refused(ValueError, "weight on meta", weight=weight.to("meta"))


# One row in one step and in several; several rows with and without shared K, one and two tiles.
REAL = [
    (rows, n, k, form)
    for rows in (1, 2, 32, 64)
    for n, k, form in (
        (4608, 1536, "norm"),
        (1536, 1536, "residual"),
        (4096, 1536, "norm gated"),
        (1536, 4096, "residual"),
        (1001, 8576, "norm gated residual"),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "n", "k", "form"), REAL, ids=str)
def test_matches_float64_at_real_sizes(rows, n, k, form, dtype):
    x, weight, options = make(form, rows, n, k, dtype, torch.device("cuda"))
    check(x, weight, options)


# Fewer steps than the ring has buffers, as many and more; the last program has less to do.
RINGS = [
    HopperTile(1, 4, 2, 6), HopperTile(1, 2, 1, 2), HopperTile(4, 2, 2, 2), HopperTile(3, 4, 4, 2)
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("form", ["norm gated residual", "plain"])
def test_rings_of_hopper(form, ring, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(module, "hopper_tile", lambda *_: ring)
    x, weight, options = make(form, 19, 200, 832, torch.bfloat16, cuda)
    counters = torch.zeros(13, dtype=torch.int32, device=cuda)
    ours = check(x, weight, options | {"counters": counters})
    assert not counters.any()
    assert torch.equal(ours, check(x, weight, options))
    with use_backend("triton"):
        fewer = {k: v[:17] if k == "residual" else v for k, v in options.items()}
        assert torch.equal(skinny_linear(x[:17], weight, **fewer), ours[:17])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(32, 1536, 4096), (32, 1536, 1536), (3, 200, 832)])
def test_norm_is_handed_on_in_one_launch(rows, n, k, dtype, monkeypatch):
    cuda = torch.device("cuda")
    launch, launched = module.skinny_linear_scaled_forward, []
    monkeypatch.setattr(
        module, "skinny_linear_scaled_forward", lambda *given: launched.append(1) or launch(*given)
    )
    x, weight, _ = make("plain", rows, n, k, dtype, cuda)
    counters = torch.zeros(96, dtype=torch.int32, device=cuda)
    takes = hands_norm_on(x, weight)
    assert takes == (torch.cuda.get_device_capability()[0] == 9)
    assert not hands_norm_on(x[:1], weight)
    assert not hands_norm_on(x.new_empty(MAX_SCALED_ROWS + 1, k), weight)
    launches = check_norm_handed_on(rows, n, k, dtype, cuda, counters=counters)
    # The second products have 200 columns, too few for the tensor memory accelerator's pieces.
    assert launches == 3 or not takes
    assert len(launched) == takes  # by operators one by one there would be three launches, too
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32])
def test_one_graph_of_launches_that_overlap(rows):
    # Each product reads what the one before has written, in a graph where launches overlap.
    cuda = torch.device("cuda")
    x, weight, options = make("norm residual", rows, 1536, 1536, torch.bfloat16, cuda)
    x = options.pop("residual")

    def chain(backend):
        h = x
        with use_backend(backend):
            for _ in range(20):
                h = skinny_linear(h, weight, residual=h, prefetch_weight=True, **options)
        return h

    eager, expected = chain("triton"), chain("torch")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain("triton")
    for _ in range(5):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
    torch.testing.assert_close(eager, expected, rtol=0.05, atol=0.5)


@pytest.mark.gpu
def test_counters_given_nobody_waits():
    cuda = torch.device("cuda")
    x, weight, options = make("residual", 32, 1536, 4096, torch.bfloat16, cuda)
    counters = torch.zeros(96, dtype=torch.int32, device=cuda)
    skinny_linear(x, weight, counters=counters, **options)
    with no_synchronization(), count_launches() as launches:
        skinny_linear(x, weight, counters=counters, **options)
    assert launches["skinny_linear"] == 1
