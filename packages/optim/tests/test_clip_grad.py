"""clip_grad_norm_ against torch.nn.utils', and its norm against float64."""

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_kernels.testing import check_deterministic, count_launches, no_synchronization
from tilewright_optim import clip_grad_norm_
from tilewright_optim._norm_kernel import CHUNK
from tilewright_optim.clip_grad import total_norm

SIZES = (1, 0, 15, CHUNK, 2 * CHUNK + 48, CHUNK + 1)


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def make(device, dtypes=(torch.float32,), sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    params = []
    for i, size in enumerate(sizes):
        param = torch.nn.Parameter(torch.zeros(size, device=device, dtype=dtypes[i % len(dtypes)]))
        param.grad = torch.randn(size, generator=generator).to(param)
        params.append(param)
    return params


def grads_of(params):
    return [p.grad for p in params if p.grad is not None]


def exact_norm(params):
    return torch.stack([g.double().square().sum() for g in grads_of(params)]).sum().sqrt()


@pytest.mark.smoke
@pytest.mark.parametrize("limit", [0.5, 1e9], ids=["clips", "does not clip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_is_torchs(dtype, limit, device):
    ours, torchs = make(device, (dtype,)), make(device, (dtype,))
    before = [g.clone() for g in grads_of(ours)]
    exact = exact_norm(ours)
    with count_launches() as launches:
        norm = clip_grad_norm_(ours, limit)
    assert launches["clip_grad_norm_"] == 2
    expected = torch.nn.utils.clip_grad_norm_(torchs, limit)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    assert norm.shape == expected.shape == ()
    for g, t, b in zip(grads_of(ours), grads_of(torchs), before, strict=True):
        if limit > norm:
            assert torch.equal(g, b)
        else:
            eps = torch.finfo(dtype).eps
            # torch rounds the norm and the factor to float16.
            torch.testing.assert_close(g, t, rtol=4 * max(eps, 2**-24), atol=eps * limit)


def test_several_dtypes(device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    sizes = (*SIZES, 7, CHUNK + 16)
    params = make(device, dtypes, sizes)
    before = [g.to(torch.float64, copy=True) for g in grads_of(params)]
    exact = exact_norm(params)
    with count_launches() as launches:
        norm = clip_grad_norm_(params, 0.5)
    assert launches["clip_grad_norm_"] == 2
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    for p, b in zip(params, before, strict=True):
        assert p.grad is not None
        # The interpreter truncates to bfloat16.
        eps = max(torch.finfo(p.dtype).eps, 2e-7)
        torch.testing.assert_close(p.grad.double(), b * 0.5 / (exact + 1e-6), rtol=eps, atol=1e-9)


def test_layouts(device):
    ours, torchs = make(device, sizes=(24, 24)), make(device, sizes=(24, 24))
    for params in (ours, torchs):
        for p in params:
            p.data = p.data.view(4, 6)
        a, b = (g.view(4, 6) for g in (torch.randn(24, device=device), torch.arange(24.0)))
        b = b.to(device)
        params[0].grad = b.T.contiguous().T
        params[1].grad = torch.stack([b, a], -1)[..., 0]  # every second element
    norm = clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0))
    for g, t in zip(grads_of(ours), grads_of(torchs), strict=True):
        torch.testing.assert_close(g, t)


def test_views_at_odd_addresses(device):
    flat = torch.randn(2 * CHUNK + 100, device=device)
    param = torch.nn.Parameter(torch.zeros(CHUNK + 50, device=device))
    param.grad = flat[1 : CHUNK + 51]
    before = flat.clone()
    norm = clip_grad_norm_(param, 1.0)
    torch.testing.assert_close(norm, before[1 : CHUNK + 51].norm())
    torch.testing.assert_close(flat[1 : CHUNK + 51], before[1 : CHUNK + 51] / (norm + 1e-6))
    assert torch.equal(flat[CHUNK + 51 :], before[CHUNK + 51 :])
    assert flat[0] == before[0]


def test_norm_repeats_bit_for_bit(device):
    params = make(device, sizes=(9 * CHUNK + 5, 3 * CHUNK))
    check_deterministic(lambda: [clip_grad_norm_(params, 1e9)], runs=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite(value, device):
    ours, torchs = make(device), make(device)
    for params in (ours, torchs):
        grads_of(params)[2][3] = value
    norm = clip_grad_norm_(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0), equal_nan=True)
    for g, t in zip(grads_of(ours), grads_of(torchs), strict=True):
        torch.testing.assert_close(g, t, equal_nan=True)
    grads_of(ours)[2][3] = value
    with pytest.raises(RuntimeError, match=r"norm of the gradients is (nan|inf)"):
        clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)


def test_other_norms_and_no_gradients_are_torchs(device):
    ours, torchs = make(device, sizes=(3, 5)), make(device, sizes=(3, 5))
    norm = clip_grad_norm_(ours, 1.0, norm_type=torch.inf)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(torchs, 1.0, norm_type=torch.inf))
    assert clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0
    assert clip_grad_norm_(iter([]), 1.0) == 0


@pytest.mark.gpu
def test_waits_for_nothing():
    params = make("cuda")
    clip_grad_norm_(params, 1.0)
    for p in params:
        p.grad = torch.randn_like(p)
    with no_synchronization():
        clip_grad_norm_(params, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graphs"])
def test_streams_at_once(captured):
    # Long enough to overlap. Graphs captured one after the other share a stream of torch's.
    streams = [torch.cuda.Stream() for _ in range(2)]
    everything = [make("cuda", sizes=(64 * CHUNK, 100 * CHUNK + 3)) for _ in streams]
    grads_of(everything[1])[0].mul_(3)
    expected = [exact_norm(params) for params in everything]
    norms = [[], []]
    graphs = []
    for params, stream in zip(everything, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            clip_grad_norm_(params, 1e9)
    torch.cuda.synchronize()
    if captured:
        for params, seen in zip(everything, norms, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                seen += [clip_grad_norm_(params, 1e9) for _ in range(50)]
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    else:
        for _ in range(50):
            for params, stream, seen in zip(everything, streams, norms, strict=True):
                with torch.cuda.stream(stream):
                    seen.append(clip_grad_norm_(params, 1e9))
    torch.cuda.synchronize()
    for seen, exact in zip(norms, expected, strict=True):
        torch.testing.assert_close(torch.stack(seen).double(), exact.expand(50), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_norm_of_low_precision_has_floats_precision(backend, device):
    params = make(device, (torch.bfloat16, torch.float16))
    with use_backend(backend):
        norm = total_norm(grads_of(params))
    torch.testing.assert_close(norm.double(), exact_norm(params), rtol=1e-6, atol=0)
