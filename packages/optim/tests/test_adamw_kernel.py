"""The kernel against adamw_reference: sizes, layouts, dtypes, alignments, tables."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright_kernels import use_backend
from tilewright_kernels.testing import (
    FLOATING,
    assert_as_accurate,
    check_deterministic,
    count_launches,
)
from tilewright_optim import AdamW, adam_reference, adamw_reference
from tilewright_optim._adam_kernel import CHUNK, adam_triton
from tilewright_optim._plan import Columns, Launch
from tilewright_optim._tables import PointerTables

# One element; odd; a whole chunk; one past it, ragged; several, ragged but whole 16-byte vectors.
SIZES = (1, 15, CHUNK, CHUNK + 1, 2 * CHUNK + 48)
HYPER: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def tensors(sizes, dtype, device, grad_dtype=None, state_dtype=None, seed=0):
    """[params, grads, m, v, max v, steps] in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype, spread):
        return [
            (torch.randn(size, generator=generator) * spread).to(device, dtype) for size in sizes
        ]

    state_dtype = state_dtype or dtype
    squares = [[t.abs() for t in draw(state_dtype, 1e-2)] for _ in range(2)]
    steps = [torch.tensor(float(3 * i)) for i in range(len(sizes))]
    return [
        draw(dtype, 1.0), draw(grad_dtype or dtype, 0.1), draw(state_dtype, 0.1), *squares, steps,
    ]  # fmt: skip


def copies(columns, dtype=None):
    return [[t.to(dtype or t.dtype, copy=True) for t in column] for column in columns]


def launch(columns, capturable=False, tables=None, **options):
    device = columns[0][0].device
    tables = tables or PointerTables(device, CHUNK)
    if capturable:
        columns[5][:] = [step.to(device) for step in columns[5]]
    params, grads, m, v, maxima, steps = columns
    maxima = maxima if options.get("amsgrad") else []
    seeds = list(range(len(params)))
    given = Launch(Columns(params, grads, m, v, maxima, [], [], [], steps, seeds), capturable, ())
    with count_launches() as launches:
        chosen: dict[str, Any] = {**HYPER, "decoupled": True, **options}
        adam_triton(given, tables, **chosen)
    assert launches["adamw" if options.get("decoupled", True) else "adam"] == 1


def check(columns, **options):
    """One launch against the reference in the same dtypes and in float64."""
    same, wide = copies(columns), [*copies(columns[:5], torch.float64), copies(columns[5:])[0]]
    chosen: dict[str, Any] = {**HYPER, "decoupled": True, **options}
    chosen.pop("capturable", None)
    adam_reference(*same, **chosen)
    adam_reference(*wide, **chosen)
    grads = [g.clone() for g in columns[1]]
    launch(columns, **options)
    written = {0: "parameter", 2: "exp_avg", 3: "exp_avg_sq"}
    if options.get("amsgrad"):
        written[4] = "max_exp_avg_sq"
    for i, name in written.items():
        for triple in zip(columns[i], same[i], wide[i], strict=True):
            assert_as_accurate(*triple, what=f"{name} of {triple[0].numel()} elements")
    assert [s.item() for s in columns[5]] == [s.item() for s in same[5]]
    assert all(torch.equal(a, b) for a, b in zip(columns[1], grads, strict=True))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
def test_matches_float64(dtype, capturable, device):
    check(tensors(SIZES, dtype, device), capturable=capturable)


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3},
        {"lr": 0.0},
        {"decoupled": False},
        {"decoupled": False, "amsgrad": True, "maximize": True},
        {"cautious": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(options, dtype, device):
    check(tensors((5, CHUNK + 16), dtype, device), **options)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_lr_and_grad_scale_from_the_device(lr_dtype, device):
    lr = torch.tensor(3e-2, dtype=lr_dtype, device=device)
    scale = torch.tensor(1024.0, device=device)
    check(tensors((5, 40), torch.float32, device), lr=lr, grad_scale=scale)


def test_mixed_dtypes(device):
    check(tensors((5, 40), torch.bfloat16, device, torch.float32, torch.float32))
    check(tensors((5, 40), torch.float32, device, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("first_steps", [0, 10000])
def test_bias_corrections_at_any_age(first_steps, capturable, device):
    columns = tensors((8, 8, 8), torch.float64, device)
    columns[5] = [torch.tensor(float(first_steps + i)) for i in range(3)]
    check(columns, capturable=capturable)


# Each count is read by one program, which adds 1; two share one; one belongs to no program.
@pytest.mark.parametrize("sizes", [(5, CHUNK, 1), (5, CHUNK + 1), (5, 0)], ids=str)
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_counts_on_the_device(found_inf, sizes, device):
    columns = tensors(sizes, torch.float32, device)
    flag = None if found_inf is None else torch.tensor(found_inf, device=device)
    expected = [s.item() + (found_inf != 1) for s in columns[5]]
    launch(columns, capturable=True, found_inf=flag)
    assert [s.item() for s in columns[5]] == expected


@pytest.mark.parametrize(("size", "additions"), [(CHUNK, 0), (CHUNK + 1, 1)])
def test_small_tensors_are_counted_by_their_own_kernel(size, additions, device):
    class Additions(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += "add_" in func.name()
            return func(*args, **(kwargs or {}))

    columns = tensors((size, 3), torch.float32, device)
    with Additions() as additions_seen:
        launch(columns, capturable=True)
    assert additions_seen.seen == additions


@pytest.mark.parametrize("sizes", [(5, CHUNK + 1), (5, 7)], ids=str)
def test_found_inf(sizes, device):
    columns = tensors(sizes, torch.float32, device)
    before = copies(columns)
    launch(columns, capturable=True, found_inf=torch.ones((), device=device))
    for ours, unchanged in zip(columns, before, strict=True):
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, unchanged, strict=True))
    check(columns, capturable=True, found_inf=torch.zeros((), device=device))


def test_views_at_odd_addresses(device):
    # Slices of one flat buffer, as in gradient buckets: 4-byte aligned only.
    columns = tensors((7, 2 * CHUNK + 3), torch.float32, device)
    for column in columns[:5]:
        flat = torch.cat([torch.zeros(1, device=device), *column])
        column[:] = flat[1:].split([t.numel() for t in column])
    assert columns[0][0].data_ptr() % 16
    check(columns)


def test_neighbours_are_not_touched(device):
    columns = tensors((CHUNK + 5,), torch.float32, device)
    flats = [torch.full((CHUNK + 37,), 7.0, device=device) for _ in columns[:5]]
    for column, flat in zip(columns, flats, strict=False):
        flat[16 : CHUNK + 21] = column[0]
        column[0] = flat[16 : CHUNK + 21]
    check(columns, amsgrad=True)
    assert all((flat[:16] == 7).all() and (flat[CHUNK + 21 :] == 7).all() for flat in flats)


def test_layouts(device):
    def view(t, shape, name):
        if name == "transposed":
            return t.view(shape[::-1]).T
        if name == "every second column":
            return torch.stack([t.view(shape), t.view(shape)], -1).flatten(1)[:, ::2]
        return t.view(shape)

    names = ("contiguous", "transposed", "every second column")
    for param_layout in names:
        for other_layout in names:
            columns = tensors((24,), torch.float32, device)
            columns[0] = [view(columns[0][0], (4, 6), param_layout)]
            for column in columns[1:5]:
                column[0] = view(column[0], (4, 6), other_layout)
            check(columns, amsgrad=True)


def test_many_sizes_and_empty_tensors(device):
    sizes = (0, 3, 0, 1, CHUNK, 2, 0)
    columns = tensors(sizes, torch.float32, device)
    check(columns)
    check(tensors(sizes, torch.float32, device), capturable=True)


def test_bits_repeat(device):
    def run():
        columns = tensors((5, CHUNK + 3), torch.float32, device)
        launch(columns)
        return [t for column in columns[:4] for t in column]

    check_deterministic(run)


def test_same_tables_serve_new_gradients_and_new_steps(device):
    tables = PointerTables(device, CHUNK)
    columns = tensors((5, 40), torch.float32, device)
    same = copies(columns)
    for seed in range(3):
        grads = tensors((5, 40), torch.float32, device, seed=seed)[1]
        columns[1], same[1] = grads, copies([grads])[0]
        launch(columns, tables=tables)
        adamw_reference(*same, **HYPER)
    for a, b in zip(columns[0], same[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_a_tensor_past_two_to_the_31_elements():
    # 2³¹ elements and a tail, in bfloat16: 16 GiB for p, g, m, v.
    size = 2**31 + 40
    columns = [[torch.zeros(size, dtype=torch.bfloat16, device="cuda")] for _ in range(5)]
    columns[1][0][-40:] = 1.0
    columns[1][0][:40] = 1.0
    columns.append([torch.tensor(0.0)])
    launch(columns)
    torch.testing.assert_close(columns[0][0][-40:], columns[0][0][:40])
    assert (columns[0][0][-40:] < 0).all()
    assert not columns[0][0][40:-40].any()


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(tensors((5, CHUNK + 1), torch.float32, torch.device("cuda:1")))
    param = torch.nn.Parameter(torch.ones(5, device="cuda:1"))
    param.grad = torch.ones_like(param)
    with use_backend("triton"):
        AdamW([param]).step()
    assert (param < 1).all()
