"""grouped_mm: both products against float64, groups of every size, what is no group's."""

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.grouped_mm import blocks, grouped_mm, grouped_mm_reference, launches
from tilewright_kernels.grouped_mm.functional import _OP
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    layouts,
    no_synchronization,
    poisoned_memory,
    randn,
)

pytestmark = pytest.mark.usefixtures("small_group_tiles")

GROUPS = {
    "one": [37],
    "uneven": [5, 33, 1, 16],
    "empty ones": [0, 20, 0, 0, 19, 0],
    "all to one": [0, 0, 40, 0],
    "none": [0, 0, 0],
    "many of one row": [1] * 21,
}
"""Rows of each group; of 16 they are whole tiles, else ends inside of one."""

OPERANDS = ("rows", "sums", "columns")


def make(operands, counts, m, n, *, rest=0, dtype=torch.float32, device="cpu"):
    """a, b and offs; m and n are the sizes that are not grouped, `rest` rows are no group's."""
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
    total, groups = sum(counts) + rest, len(counts)
    shapes = {
        "rows": ((total, m), (groups, m, n)),
        "sums": ((m, total), (total, n)),
        "columns": ((groups, n, m), (m, total)),
    }[operands]
    a, b = (randn(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes))
    return (a * m**-0.5).requires_grad_(), b.requires_grad_(), ends


def ours(a, b, offs):
    return grouped_mm(a, b, offs=offs)


def reference(a, b, offs):
    return grouped_mm_reference(a, b, offs=offs)


def check(a, b, offs):
    check_against_float64(ours, reference, (a, b, offs), operator="grouped_mm")


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("operands", OPERANDS)
def test_matches_float64(operands, counts, device):
    check(*make(operands, counts, 24, 40, device=device))


@pytest.mark.parametrize("operands", OPERANDS)
def test_dtypes(operands, dot_dtype, device):
    check(*make(operands, GROUPS["uneven"], 24, 40, dtype=dot_dtype, device=device))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (19, 23), (16, 8), (33, 5)])
@pytest.mark.parametrize("operands", OPERANDS)
def test_sizes(operands, m, n, device):
    check(*make(operands, [3, 0, 18], m, n, device=device))


@pytest.mark.smoke
def test_is_torchs(device):
    # torch's own, in what it takes.
    a, b, offs = make("rows", [5, 0, 11], 16, 8, device=device)
    torch.testing.assert_close(
        grouped_mm_reference(a, b, offs=offs), torch.nn.functional.grouped_mm(a, b, offs=offs)
    )
    a, b, offs = make("sums", [5, 0, 11], 16, 8, device=device)
    torch.testing.assert_close(
        grouped_mm_reference(a, b, offs=offs), torch.nn.functional.grouped_mm(a, b, offs=offs)
    )


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("sizes", [(16, 24), (7, 9)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_no_groups_is_zero_and_not_read(backend, sizes, operands, device):
    a, b, offs = make(operands, [5, 0, 11], *sizes, rest=8, device=device)
    rest = slice(16, None)
    with torch.no_grad():
        if operands != "columns":
            (a if operands == "rows" else a.T)[rest] = torch.nan
        if operands != "rows":
            (b if operands == "sums" else b.T)[rest] = torch.nan
    with use_backend(backend), poisoned_memory():
        out = grouped_mm(a, b, offs=offs)
        grads = torch.autograd.grad(out, (a, b), torch.ones_like(out))
    for t in (out, *grads):
        assert t.isfinite().all()
    if operands == "rows":
        assert not out[rest].any()
        assert not grads[0][rest].any()
    elif operands == "columns":
        assert not out[:, rest].any()
        assert not grads[1][:, rest].any()
    else:
        assert not grads[0][:, rest].any()
        assert not grads[1][rest].any()


@pytest.mark.parametrize("operands", ["rows", "sums"])
def test_nans_stay_in_their_group(operands, device):
    a, b, offs = make(operands, [5, 9, 11], 16, 24, dtype=torch.float16, device=device)
    sick, healthy = (a.detach().clone(), b.detach().clone()), [0, 2]
    group = slice(5, 14)
    (sick[0] if operands == "rows" else sick[0].T)[group] = torch.nan
    if operands == "sums":
        sick[1][group] = torch.inf
    with use_backend("triton"):
        expected, out = ours(a, b, offs), ours(*sick, offs)
    if operands == "rows":
        healthy = [*range(5), *range(14, 25)]
    assert torch.equal(out[healthy], expected[healthy])
    assert out[group if operands == "rows" else 1].isnan().all()


@pytest.mark.parametrize("operands", OPERANDS)
def test_layouts_of_every_operand(operands, device):
    tensors = make(operands, [5, 0, 11], 16, 24, dtype=torch.float16, device=device)
    for position in (0, 1):
        for name, strided in layouts(tensors[position].shape, torch.float16, device):
            given = list(tensors)
            given[position] = strided.mul_(0.25) if name != "expanded rows" else strided * 0.25
            given[position].requires_grad_()
            try:
                check(*given)
            except AssertionError as error:
                raise AssertionError(f"operand {position}, {name}: {error}") from error


def test_gradients_lie_as_their_matrices(device):
    # A parameter [groups, N, K] that is multiplied transposed, as checkpoints have it.
    a, b, offs = make("rows", [5, 0, 11], 16, 24, device=device)
    weight = b.detach().mT.contiguous().requires_grad_()
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(ours(a, weight.mT, offs).sum(), weight)
        (expected,) = torch.autograd.grad(ours(a, b, offs).sum(), b)
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, expected.mT)


@pytest.mark.parametrize("operands", OPERANDS)
def test_gradcheck(operands):
    a, b, offs = make(operands, [2, 0, 3], 3, 2, rest=1, dtype=torch.float64)
    check_gradients(lambda a, b: ours(a, b, offs), (a, b), operator="grouped_mm")


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("operands", OPERANDS)
def test_gradient_of_one_input_only(operands, needed, device):
    a, b, offs = make(operands, [5, 0, 11], 16, 24, device=device)
    check(a.requires_grad_(needed[0]), b.requires_grad_(needed[1]), offs)


@pytest.mark.parametrize("operands", OPERANDS)
def test_compiles(operands, device):
    check_compiles(ours, make(operands, [5, 0, 11], 16, 24, device=device), operator="grouped_mm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 24), (16, 9), (9, 16), (9, 7)], ids=str)
@pytest.mark.parametrize("operands", OPERANDS)
def test_torch_backend_with_its_gradient(operands, sizes, dtype, device):
    # Sizes that torch's product takes, and such that only it or only its gradient refuses.
    a, b, offs = make(operands, [3, 0, 13], *sizes, dtype=dtype, device=device)
    transposed = b.detach().mT.contiguous().mT.requires_grad_()
    for given in ((a, b), (a, transposed)):
        expected = reference(*given, offs)
        one = torch.ones((), dtype=dtype, device=device)
        for dout in (one.expand_as(expected), torch.rand_like(expected.mT).mT):
            with use_backend("torch"):
                out = ours(*given, offs)
                grads = torch.autograd.grad(out, given, dout)
            theirs = torch.autograd.grad(expected, given, dout, retain_graph=True)
            for x, y in zip((out, *grads), (expected, *theirs), strict=True):
                torch.testing.assert_close(
                    x, y, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 24), (16, 9)], ids=str)
@pytest.mark.parametrize("operands", OPERANDS)
def test_torch_backend_compiles(operands, sizes, dtype, device):
    a, b, offs = make(operands, [3, 0, 13], *sizes, rest=8, dtype=dtype, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with use_backend("torch"):
        out = compiled(a, b, offs)
        grads = torch.autograd.grad(out.sum(), (a, b))
    expected = reference(a, b, offs)
    theirs = torch.autograd.grad(expected.sum(), (a, b))
    for x, y in zip((out, *grads), (expected, *theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2)


def test_compiled_definition_keeps_nans_in_their_group(device):
    a, b, offs = make("rows", [5, 9], 16, 24, device=device)
    with torch.no_grad():
        b[0] = torch.nan
    torch._dynamo.reset()
    with use_backend("torch"):
        out = torch.compile(ours, fullgraph=True, backend="aot_eager")(a, b, offs)
        da, db = torch.autograd.grad(out.sum(), (a, b))
    assert out[:5].isnan().all()
    for healthy in (out[5:], da[5:], db[1]):
        assert healthy.isfinite().all()


def test_opcheck(device):
    a, b, offs = make("rows", [5, 0, 11], 16, 24, device=device)
    torch.library.opcheck(torch.ops.tilewright.grouped_rows.default, (a, b, offs))
    a, b, offs = make("sums", [5, 0, 11], 16, 24, device=device)
    rows = a.detach().mT.requires_grad_()
    torch.library.opcheck(torch.ops.tilewright.grouped_sums.default, (rows, b, offs))


@pytest.mark.parametrize("operands", OPERANDS)
def test_every_element_is_written_and_bits_repeat(operands, device):
    a, b, offs = make(operands, [5, 0, 30], 16, 24, rest=2, dtype=torch.float16, device=device)

    def run():
        out = ours(a, b, offs)
        return out, *torch.autograd.grad(out, (a, b), torch.ones_like(out))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_second_derivative_is_refused(device):
    a, b, offs = make("rows", [5, 3], 8, 8, device=device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(ours(a, b, offs).sum(), a, create_graph=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    a, b, offs = make("rows", [5, 0, 11], 16, 24, device=device)
    with torch.autocast(device.type, torch.float16), use_backend(backend):
        out = ours(a, b, offs)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), reference(a, b, offs), rtol=3e-3, atol=3e-3)


def test_no_groups_rows_no_columns_no_sum(device):
    for shape in (((0, 4), (2, 4, 3)), ((5, 4), (2, 4, 0)), ((5, 0), (2, 0, 3))):
        a, b = (torch.randn(s, device=device, requires_grad=True) for s in shape)
        offs = torch.tensor([min(2, len(a)), min(4, len(a))], dtype=torch.int32, device=device)
        with use_backend("triton"):
            out = ours(a, b, offs)
            grads = torch.autograd.grad(out.sum(), (a, b))
        assert out.shape == (a.shape[0], b.shape[2])
        assert not out.any()
        assert [g.shape for g in grads] == [a.shape, b.shape]


@pytest.mark.parametrize(
    ("a", "b", "offs", "error", "message"),
    [
        ((4, 8), (2, 7, 3), [2, 4], ValueError, "a's last dimension must be b's last but one"),
        ((2, 4, 8), (2, 8, 3), [2, 4], ValueError, r"use torch\.bmm\(a, b\)"),
        ((4,), (2, 4, 3), [2, 4], ValueError, r"a has shape \(4,\)"),
        ((4, 8), (2, 8, 3), [4], ValueError, "b has 2 matrices and offs ends 1 groups"),
        ((4, 8), (0, 8, 3), [], ValueError, r"offs has shape \(0,\)"),
        ((4, 8), (8, 3), [], ValueError, r"offs has shape \(0,\)"),
    ],
    ids=str,
)
def test_bad_shapes(a, b, offs, error, message):
    with pytest.raises(error, match=message):
        grouped_mm(torch.ones(a), torch.ones(b), offs=torch.tensor(offs, dtype=torch.int32))


def test_bad_dtypes():
    a, b, offs = torch.ones(4, 8), torch.ones(1, 8, 3), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"give offs\.to\(torch\.int32\)"):
        grouped_mm(a, b, offs=offs.long())
    with pytest.raises(TypeError, match=r"give b\.to\(a\.dtype\)"):
        grouped_mm(a, b.half(), offs=offs)
    with pytest.raises(TypeError, match=r"a is torch\.int64"):
        grouped_mm(a.long(), b.long(), offs=offs)


@pytest.mark.parametrize("counts", GROUPS.values(), ids=GROUPS)
def test_table_of_blocks(counts, device):
    offs = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(device)
    rows = sum(counts) + 3
    number, *table = blocks.row_blocks(_OP, offs, rows, 8).tolist()
    expected, start = [], 0
    for group, end in enumerate(offs.tolist()):
        expected += [(group, row, end) for row in range(start, end, 8)]
        start = end
    assert number == len(expected) <= blocks.most_blocks(rows, len(counts), 8)
    entries = iter(table[: 3 * number])
    assert list(zip(entries, entries, entries, strict=True)) == expected


def test_a_group_of_more_blocks_than_a_step_of_the_table(device):
    offs = torch.tensor([3, 16 * (blocks.STEP + 2)], dtype=torch.int32, device=device)
    number, *table = blocks.row_blocks(_OP, offs, int(offs[-1]), 16).tolist()
    assert number == blocks.STEP + 3
    assert table[1 : 3 * number : 3] == [0, *range(3, int(offs[-1]), 16)]


REAL_GROUPS = {
    "uneven": [700, 0, 129, 1, 1153, 0, 64],
    "whole": [256, 128, 512],
    "all to one": [0, 2048, 0],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
@pytest.mark.parametrize("counts", REAL_GROUPS.values(), ids=REAL_GROUPS)
@pytest.mark.parametrize("operands", OPERANDS)
def test_matches_float64_at_real_shapes(operands, counts, dtype):
    check(*make(operands, counts, 520, 776, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["rows", "sums"])
def test_hopper_agrees_with_its_twin(operands, monkeypatch):
    a, b, offs = make(operands, REAL_GROUPS["uneven"], 520, 776, dtype=torch.float16, device="cuda")

    def run():
        out = ours(a, b, offs)
        return out, *torch.autograd.grad(out, (a, b), torch.ones_like(out))

    with use_backend("triton"):
        hopper = run()
        monkeypatch.setattr(launches, "is_hopper", lambda _: False)
        for x, y in zip(hopper, run(), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("operands", OPERANDS)
def test_graph_follows_the_groups(operands):
    # Captured with some groups, replayed with others: nothing has read them on the host.
    a, b, offs = make(operands, [100, 500, 0, 72], 64, 136, dtype=torch.float16, device="cuda")
    with use_backend("triton"), torch.no_grad():
        ours(a, b, offs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), no_synchronization():
            out = ours(a, b, offs)
        for counts in ([0, 0, 672, 0], [1, 2, 3, 666], [168] * 4):
            offs.copy_(torch.tensor(counts).cumsum(0, dtype=torch.int32))
            graph.replay()
            expected = reference(a.double(), b.double(), offs)
            assert (out - expected).norm() <= 1e-3 * expected.norm()
