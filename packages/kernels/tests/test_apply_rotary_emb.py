"""apply_rotary_emb: the kernel against float64, two independent formulas and finite differences."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright_kernels import (
    apply_rotary_emb,
    apply_rotary_emb_reference,
    rotary_table,
    use_backend,
)
from tilewright_kernels.apply_rotary_emb import _OP
from tilewright_kernels.testing import (
    FLOATING,
    check_against_float64,
    check_compiles,
    check_deterministic,
    check_gradients,
    count_launches,
    no_synchronization,
    poisoned_memory,
)

# B, T, H, K, D, R: one a regime.
SHAPES = (
    (1, 1, 1, 1, 2, 2),  # the smallest there is
    (2, 5, 3, 1, 11, 6),  # odd in all, one key head, five dimensions handed through
    (2, 3, 4, 2, 64, 64),  # powers of two
    (1, 9, 6, 3, 80, 80),  # half a head is no power of two
    (1, 2, 40, 5, 128, 128),  # heads of a token shared out to three programs, one takes q's and k's
    (2, 0, 2, 2, 8, 8),  # no tokens
)
FORMS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, dtype, device, seed=0):
    B, T, H, K, D, R = shape
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(B, T, heads, D, generator=generator).to(device, dtype).requires_grad_()
        for heads in (H, K)
    )
    return q, k, *rotary_table(R, T + 3, 100.0, device=device)


def functions(**options):
    """The public function and the reference, with the same options."""
    return (
        lambda *inputs: apply_rotary_emb(*inputs, **options),
        lambda *inputs: apply_rotary_emb_reference(*inputs, **options),
    )


def check(inputs, **options):
    check_against_float64(*functions(**options), inputs, operator="apply_rotary_emb")


def random_positions(shape, rows, device, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(rows, shape, generator=generator).to(device, dtype)


@FORMS
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, interleaved, device):
    check(make(shape, dtype, device), interleaved=interleaved)


def test_is_multiplication_by_a_complex_number(device):
    q, k, cos, sin = make((2, 5, 3, 2, 16, 16), torch.float64, device)
    angle = torch.complex(cos, sin).to(torch.complex128)[:5, None]
    with use_backend("triton"):
        ours = apply_rotary_emb(q, k, cos, sin, interleaved=True)
    for x, y in zip((q, k), ours, strict=True):
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angle
        torch.testing.assert_close(y, torch.view_as_real(turned).flatten(-2))


@pytest.mark.smoke
def test_is_hugging_faces_rotate_half(device):
    q, k, cos, sin = make((2, 5, 3, 2, 16, 16), torch.float64, device)
    cos2, sin2 = (torch.cat((table, table), -1)[:5, None].double() for table in (cos, sin))
    for x, y in zip((q, k), apply_rotary_emb(q, k, cos, sin), strict=True):
        rotated_half = torch.cat((-x[..., 8:], x[..., :8]), -1)
        torch.testing.assert_close(y, x * cos2 + rotated_half * sin2)


@FORMS
def test_products_depend_on_distance_alone(interleaved, device):
    # What RoPE is for: q at m times k at n is a function of m - n.
    q, k, _, _ = make((1, 1, 2, 2, 16, 16), torch.float64, device)
    tables = rotary_table(16, 1000, device=device)

    def product(m, n):
        at_m, at_n = (torch.tensor([[p]], device=device) for p in (m, n))
        turned_q, _ = apply_rotary_emb(q, k, *tables, position_ids=at_m, interleaved=interleaved)
        _, turned_k = apply_rotary_emb(q, k, *tables, position_ids=at_n, interleaved=interleaved)
        return (turned_q * turned_k).sum(-1)

    with use_backend("triton"):
        # Both tables are rounded to float32: six digits are the same.
        torch.testing.assert_close(product(7, 3), product(907, 903), rtol=1e-6, atol=1e-5)
        assert (product(7, 3) - product(8, 3)).abs().min() > 1e-2


@FORMS
def test_turns_without_stretching_and_gradient_turns_back(interleaved, device):
    q, k, cos, sin = make((2, 6, 3, 2, 12, 8), torch.float64, device)
    with use_backend("triton"):
        outs = apply_rotary_emb(q, k, cos, sin, interleaved=interleaved)
        back = torch.autograd.grad(outs, (q, k), outs)
    for x, y, z in zip((q, k), outs, back, strict=True):
        torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-6)
        assert torch.equal(x[..., 8:], y[..., 8:])
        assert not torch.isclose(x[:, 1:, :, :8], y[:, 1:, :, :8]).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_positions(dtype, device):
    q, k, cos, sin = make((3, 4, 2, 1, 8, 8), torch.float32, device)
    # An offset as in decoding, repeats as in packing, and anything else.
    for ids in ([3, 4, 5, 6], [0, 1, 0, 1], [6, 0, 0, 2]):
        position_ids = torch.tensor([ids, [0, 1, 2, 3], [1, 1, 1, 1]], dtype=dtype, device=device)
        check((q, k, cos, sin), position_ids=position_ids)
        with use_backend("triton"):
            turned, _ = apply_rotary_emb(q, k, cos, sin, position_ids=position_ids)
            for t, position in enumerate(ids):
                one, _ = apply_rotary_emb(
                    q[:1, t, None], k[:1, t, None], cos[position:], sin[position:]
                )
                assert torch.equal(turned[0, t], one[0, 0])
    # One row of positions for all sequences: a stride of 0.
    check((q, k, cos, sin), position_ids=position_ids[:1].expand(3, 4))


def test_positions_outside_the_tables_give_nan(device):
    q, k, cos, sin = make((1, 4, 2, 1, 10, 8), torch.float32, device)
    position_ids = torch.tensor([[-1, 0, len(cos), len(cos) - 1]], device=device)
    with use_backend("triton"):
        outs = apply_rotary_emb(q, k, cos, sin, position_ids=position_ids)
    for x, y in zip((q, k), outs, strict=True):
        assert y[:, [0, 2], :, :8].isnan().all()
        assert y[:, [1, 3]].isfinite().all()
        assert torch.equal(y[..., 8:], x[..., 8:])


@FORMS
@pytest.mark.parametrize("given", [None, "position_ids", "cu_seqlens"])
def test_packed_sequences(given, interleaved, device):
    q, k, *tables = make((1, 7, 3, 2, 12, 8), torch.float32, device)
    # Sequences of 3, 0 and 2 tokens, and two of padding.
    ids = torch.tensor([0, 1, 2, 0, 1, 0, 1], device=device)
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    packed = {
        None: {},
        "position_ids": {"position_ids": ids},
        "cu_seqlens": {"cu_seqlens": cu_seqlens},
    }
    inputs = (*(x.detach()[0].requires_grad_() for x in (q, k)), *tables)
    check(inputs, **packed[given], interleaved=interleaved)
    with use_backend("triton"):
        ours = apply_rotary_emb(*inputs, **packed[given], interleaved=interleaved)
        batched_ids = ids[None] if given else None
        expected = apply_rotary_emb(
            q, k, *tables, position_ids=batched_ids, interleaved=interleaved
        )
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b[0])


def strided(device):
    """q [2, 3, 4, 8] and k [2, 3, 2, 8], filled alike, in the layouts that callers bring along."""
    q, k, _, _ = make((2, 3, 4, 2, 8, 8), torch.float32, device)
    q, k = q.detach(), k.detach()
    yield "contiguous", q.clone(), k.clone()
    joint = torch.cat((q, k, k), -2)
    yield "slices of a joint projection", *joint.split([4, 2, 2], -2)[:2]
    yield "[B, H, T, D]", *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    yield "[T, B, H, D]", *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    yield "[D, B, T, H]", *(x.movedim(-1, 0).contiguous().movedim(0, -1) for x in (q, k))
    yield "[B, H, D, T]", *(x.movedim(1, 3).contiguous().movedim(3, 1) for x in (q, k))
    yield "q contiguous, k not", q.clone(), k.transpose(1, 2).contiguous().transpose(1, 2)
    yield "every second", *(x.repeat_interleave(2, -1)[..., ::2] for x in (q, k))
    yield "expanded heads", *(x[:, :, :1].expand_as(x) for x in (q, k))
    yield "expanded batch", *(x[:1].expand_as(x) for x in (q, k))


@FORMS
def test_layouts(interleaved, device):
    tables = rotary_table(6, 5, device=device)
    for name, q, k in strided(device):
        try:
            check((q.requires_grad_(), k.requires_grad_(), *tables), interleaved=interleaved)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        for function in functions(interleaved=interleaved):
            assert all(x.is_contiguous() for x in function(q, k, *tables)), name


def test_output_gradient_layouts(device):
    q, k, *tables = make((2, 3, 4, 2, 8, 6), torch.float32, device)
    one = torch.ones((), device=device)
    for dq, dk in [
        *(layout[1:] for layout in strided(device)),
        (one.expand_as(q), one.expand_as(k)),
    ]:
        with use_backend("triton"):
            ours = torch.autograd.grad(apply_rotary_emb(q, k, *tables), (q, k), (dq, dk))
        outs = apply_rotary_emb_reference(q, k, *tables)
        for a, b in zip(ours, torch.autograd.grad(outs, (q, k), (dq, dk)), strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_copied_first(device, monkeypatch):
    """The kernel gets pointers into the caller's own memory, whatever the strides."""
    tables = rotary_table(6, 5, device=device)
    launched = []
    monkeypatch.setattr(_OP, "launch", lambda kernel, grid, *args, **meta: launched.append(args))
    with use_backend("triton"):
        for name, q, k in strided(device):
            apply_rotary_emb(q, k, *tables)
            pointers = [x.data_ptr() for x in launched.pop()[:4]]
            assert pointers == [x.data_ptr() for x in (q, k, *tables)], name


def test_table_layouts(device):
    q, k, cos, sin = make((2, 3, 2, 1, 8, 6), torch.float32, device)
    # Tables that hold each angle twice, cut by the caller; a window of a longer table; columns.
    twice = [torch.cat((table, table), -1)[:, :3] for table in (cos, sin)]
    window = [torch.cat((table[:2], table))[2:] for table in (cos, sin)]
    columns = [table.T.contiguous().T for table in (cos, sin)]
    with use_backend("triton"):
        expected = apply_rotary_emb(q, k, cos, sin)
        for tables in (twice, window, columns, (twice[0], columns[1])):
            for a, b in zip(apply_rotary_emb(q, k, *tables), expected, strict=True):
                assert torch.equal(a, b)


def test_one_launch_each_way(device):
    q, k, *tables = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    with use_backend("triton"):
        with count_launches() as forward:
            outs = apply_rotary_emb(q, k, *tables)
        with count_launches() as backward:
            torch.autograd.grad([x.sum() for x in outs], (q, k))
    assert forward.total() == backward.total() == 1


def test_tables_are_not_rounded(device):
    q, k, *tables = make((1, 32, 2, 1, 16, 16), torch.float16, device)
    exact, _ = apply_rotary_emb_reference(q.double(), k.double(), *tables)
    halved = [table.half().double() for table in tables]
    rounded, _ = apply_rotary_emb_reference(q.double(), k.double(), *halved)
    with use_backend("triton"):
        ours, _ = apply_rotary_emb(q, k, *tables)
    # The result's own rounding, half an ulp, is all that float32 tables leave.
    allowed = 2**-11 * exact.abs() + 2**-20
    assert ((ours.double() - exact).abs() <= allowed).all()
    assert ((rounded - exact).abs() > allowed).any()


@pytest.mark.parametrize("frozen", [0, 1], ids=["q", "k"])
def test_gradient_of_one_input_only(frozen, device):
    inputs = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    inputs[frozen].requires_grad_(False)
    with use_backend("triton"):
        assert not apply_rotary_emb(*inputs)[frozen].requires_grad
    check_against_float64(
        lambda *inputs: apply_rotary_emb(*inputs)[1 - frozen],
        lambda *inputs: apply_rotary_emb_reference(*inputs)[1 - frozen],
        inputs,
        operator="apply_rotary_emb",
    )


def test_only_one_output_is_used(device):
    q, k, *tables = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    for i in (0, 1):
        with use_backend("triton"):
            used = apply_rotary_emb(q, k, *tables)[i]
            ours = torch.autograd.grad(used.sum(), (q, k), allow_unused=True)
        used = apply_rotary_emb_reference(q, k, *tables)[i]
        torch.testing.assert_close(ours[i], torch.autograd.grad(used.sum(), (q, k)[i])[0])
        assert ours[1 - i] is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 7, 9, 9))),
    rest=st.integers(0, 20),
    pairs=st.integers(1, 40),
    orders=st.tuples(st.permutations(range(4)), st.permutations(range(4))),
    pad=st.integers(0, 3),
    interleaved=st.booleans(),
    with_positions=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_any_shape_and_strides(sizes, rest, pairs, orders, pad, interleaved, with_positions, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    B, T, H, K = sizes
    q, k, cos, sin = make((B, T, H, K, 2 * pairs + rest + pad, 2 * pairs), dtype, device)
    q, k = (
        x.detach().permute(order).contiguous().permute(sorted(range(4), key=order.__getitem__))
        for x, order in zip((q, k), orders, strict=True)
    )
    q, k = (x[..., pad:].requires_grad_() for x in (q, k))
    position_ids = random_positions((B, T), len(cos), device) if with_positions else None
    check((q, k, cos, sin), position_ids=position_ids, interleaved=interleaved)


@FORMS
def test_extreme_values(interleaved, device):
    values = [0.0, 1e30, -1e30, 1e-30, torch.inf, 1.0, torch.nan, 2.0]
    q = torch.tensor(values, device=device).expand(1, 3, 1, 8)
    tables = rotary_table(8, 3, device=device)
    with use_backend("triton"):
        ours = apply_rotary_emb(q, q, *tables, interleaved=interleaved)
    expected = apply_rotary_emb_reference(q, q, *tables, interleaved=interleaved)
    torch.testing.assert_close(ours, expected, equal_nan=True)


@FORMS
def test_gradcheck(interleaved):
    q, k, *tables = make((1, 3, 2, 1, 5, 4), torch.float64, torch.device("cpu"))
    function, _ = functions(
        position_ids=torch.tensor([[2, 0, 2]]) if interleaved else None, interleaved=interleaved
    )
    check_gradients(lambda q, k: function(q, k, *tables), (q, k), operator="apply_rotary_emb")


def test_second_derivative_is_refused(device):
    q, k, *tables = make((1, 2, 2, 1, 4, 4), torch.float32, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(apply_rotary_emb(q, k, *tables)[0].sum(), q, create_graph=True)


def test_compiles(device):
    q, k, *tables = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    position_ids = random_positions((2, 5), 5, device)
    cu_seqlens = torch.tensor([0, 3, 5], device=device)

    def function(q, k):
        q, k = apply_rotary_emb(q, k, *tables)
        q, k = apply_rotary_emb(q, k, *tables, position_ids=position_ids)
        return apply_rotary_emb(q[0], k[0], *tables, cu_seqlens=cu_seqlens)

    check_compiles(function, (q, k), operator="apply_rotary_emb")


def test_compiled_code_follows_the_backend_and_the_length(device):
    compiled = torch.compile(apply_rotary_emb, fullgraph=True, dynamic=True, backend="aot_eager")
    for backend, tokens in (("triton", 5), ("torch", 5), ("triton", 7)):
        inputs = make((2, tokens, 3, 1, 10, 6), torch.float32, device)
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), apply_rotary_emb_reference(*inputs))


@FORMS
@pytest.mark.parametrize("conjugate", [False, True])
def test_opcheck(conjugate, interleaved, device):
    inputs = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    position_ids = random_positions((2, 5), 5, device) if conjugate else None
    torch.library.opcheck(
        torch.ops.tilewright.rotate_heads.default, (*inputs, position_ids, interleaved, conjugate)
    )


@FORMS
@pytest.mark.parametrize("shape", [(2, 5, 3, 1, 11, 6), (1, 2, 40, 5, 128, 128)], ids=str)
def test_every_element_is_written_and_bits_repeat(shape, interleaved, device):
    q, k, *tables = make(shape, torch.float32, device)
    dq, dk = torch.rand_like(q), torch.rand_like(k)

    def run():
        outs = apply_rotary_emb(q, k, *tables, interleaved=interleaved)
        return (*outs, *torch.autograd.grad(outs, (q, k), (dq, dk)))

    with use_backend("triton"), poisoned_memory():
        assert all(t.isfinite().all() for t in run())
        check_deterministic(run)


def test_inputs_are_left_alone(device):
    q, k, *tables = make((2, 5, 3, 1, 11, 6), torch.float32, device)
    position_ids = random_positions((2, 5), 5, device)
    dq, dk = torch.rand_like(q), torch.rand_like(k)
    tensors = (q, k, *tables, position_ids, dq, dk)
    before = [t.detach().clone() for t in tensors]
    with use_backend("triton"):
        outs = apply_rotary_emb(q, k, *tables, position_ids=position_ids)
        torch.autograd.backward(outs, (dq, dk))
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    device = torch.device("cuda")
    q, k, *tables = make((1, 5, 3, 1, 11, 6), torch.float32, device)
    cu_seqlens = torch.tensor([0, 3, 5], device=device)
    dq, dk = torch.rand_like(q[0]), torch.rand_like(k[0])
    with no_synchronization():
        outs = apply_rotary_emb(q[0], k[0], *tables, cu_seqlens=cu_seqlens)
        torch.autograd.backward(outs, (dq, dk))


@pytest.mark.gpu
@FORMS
def test_more_than_two_to_the_31_elements(interleaved):
    # 2³¹ elements and some in [B, H, T, D]: offsets of heads that int32 cannot hold.
    T, H, D, period = 2**19 + 8, 32, 128, 8
    q = torch.randn(1, H, period, D, device="cuda", dtype=torch.bfloat16)
    q = q.repeat(1, 1, T // period, 1).transpose(1, 2).requires_grad_()
    position_ids = (torch.arange(T, device="cuda") % period)[None]
    cos, sin = rotary_table(D, period, device="cuda")
    outs = apply_rotary_emb(
        q, q[:, :, :1], cos, sin, position_ids=position_ids, interleaved=interleaved
    )
    expected = apply_rotary_emb_reference(
        q[:, :period], q[:, :period, :1], cos, sin, interleaved=interleaved
    )
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a[:, -period:], b)
    (gradient,) = torch.autograd.grad(outs[0], q, outs[0].detach())
    torch.testing.assert_close(gradient[:, -period:], q[:, -period:], rtol=2e-2, atol=2e-2)


@pytest.mark.multigpu(2)
def test_tensors_on_another_than_the_current_device():
    assert torch.cuda.current_device() == 0
    check(make((2, 5, 3, 1, 11, 6), torch.float32, torch.device("cuda:1")))


def test_more_sequences_than_an_axis_of_a_launch_has(device, monkeypatch):
    # Three launches of two, two and one sequence, each way.
    module = import_module("tilewright_kernels.apply_rotary_emb")
    monkeypatch.setattr(module, "AXIS", 2)
    monkeypatch.setattr(module, "_unsupported", lambda q, k: None)
    inputs = make((5, 3, 2, 1, 8, 6), torch.float32, device)
    check(inputs)
    check(inputs, position_ids=random_positions((5, 3), 3, device))


def test_more_heads_than_an_axis_of_a_launch_has(device):
    q = torch.ones(1, 1, 65535, 2, device=device)
    tables = rotary_table(2, 1, device=device)
    with use_backend("triton"), pytest.raises(ValueError, match="more than 65535 heads: give q in"):
        apply_rotary_emb(q, q, *tables)
    assert torch.equal(apply_rotary_emb(q, q, *tables)[0], q)


def test_bad_heads(device):
    q, k, *tables = make((2, 5, 3, 1, 8, 8), torch.float32, device)
    with pytest.raises(TypeError, match=r"q is torch.int64.*to\(torch.bfloat16\)"):
        apply_rotary_emb(q.detach().long(), k, *tables)
    with pytest.raises(TypeError, match=r"q is torch.float32 and k torch.float16"):
        apply_rotary_emb(q, k.half(), *tables)
    for bad_q, bad_k in ((q[0, 0], k[0, 0]), (q[0], k)):
        with pytest.raises(ValueError, match=r"give \[B, T, heads, D\], or \[N, heads, D\]"):
            apply_rotary_emb(bad_q, bad_k, *tables)
    for bad in (k[:1], k[:, :4], k[..., :6], k.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"\(2, 5, 3, 8\) and k .* may differ"):
            apply_rotary_emb(q, bad, *tables)
    with pytest.raises(ValueError, match=r"q on .*, k on meta"):
        apply_rotary_emb(q, k.to("meta"), *tables)


def test_bad_tables(device):
    q, k, cos, sin = make((2, 5, 3, 1, 8, 8), torch.float32, device)
    with pytest.raises(TypeError, match=r"sin is torch.bfloat16; the tables stay float32"):
        apply_rotary_emb(q, k, cos, sin.bfloat16())
    with pytest.raises(ValueError, match=r"cos requires grad.*cos.detach\(\)"):
        apply_rotary_emb(q, k, cos.clone().requires_grad_(), sin)
    for bad_cos, bad_sin in ((cos, sin[:-1]), (cos[None], sin[None])):
        with pytest.raises(ValueError, match=r"both must be \[P, R/2\]"):
            apply_rotary_emb(q, k, bad_cos, bad_sin)
    twice = [torch.cat((table, table), -1) for table in (cos, sin)]
    with pytest.raises(ValueError, match=r"8 columns.*R = 16 dimensions.*D is 8.*halved"):
        apply_rotary_emb(q, k, *twice)
    with pytest.raises(ValueError, match=r"0 columns.*R must lie in \[2, D\]"):
        apply_rotary_emb(q, k, cos[:, :0], sin[:, :0])
    with pytest.raises(ValueError, match=r"q has 5 tokens a sequence and the tables have 4 rows"):
        apply_rotary_emb(q, k, cos[:4], sin[:4])
    with pytest.raises(ValueError, match=r"cos on meta"):
        apply_rotary_emb(q, k, cos.to("meta"), sin)


def test_bad_positions(device):
    q, k, *tables = make((2, 5, 3, 1, 8, 8), torch.float32, device)
    ids = torch.arange(5, device=device).expand(2, 5)
    with pytest.raises(TypeError, match=r"position_ids is torch.float32.*long\(\)"):
        apply_rotary_emb(q, k, *tables, position_ids=ids.float())
    for bad in (ids[0], ids[:1], ids[:, :4]):
        with pytest.raises(ValueError, match=r"it must be \(2, 5\), for example by .*expand"):
            apply_rotary_emb(q, k, *tables, position_ids=bad)
    with pytest.raises(ValueError, match=r"position_ids on meta"):
        apply_rotary_emb(q, k, *tables, position_ids=ids.to("meta"))
    cu_seqlens = torch.tensor([0, 2, 5], device=device)
    with pytest.raises(ValueError, match=r"q has shape \(2, 5, 3, 8\); cu_seqlens.*packed"):
        apply_rotary_emb(q, k, *tables, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"give one of them"):
        apply_rotary_emb(q[0], k[0], *tables, position_ids=ids[0], cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match=r"cu_seqlens is torch.float32.*long\(\)"):
        apply_rotary_emb(q[0], k[0], *tables, cu_seqlens=cu_seqlens.float())
