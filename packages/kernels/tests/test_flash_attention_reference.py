"""The specifications in plain torch: scores written out, and FlashAttention-2's tiles."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tilewright_kernels import attention_reference, flash_attention_reference

WINDOWS = (None, (5, -1), (-1, 3), (9, 4), (0, 0))


def make(len_q, len_k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, length, 16, generator=generator, dtype=dtype).requires_grad_()
        for length in (len_q, len_k, len_k)
    )
    return q, k, v


@pytest.mark.smoke
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 33), (33, 20)], ids=str)
def test_references_are_torchs(lengths, causal):
    inputs = make(*lengths)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=causal)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = torch.autograd.grad(expected, inputs, dout)
    for reference in (attention_reference, flash_attention_reference):
        out = reference(*inputs, is_causal=causal)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, dout), wanted)


def test_attn_mask_is_torchs():
    inputs = make(20, 33)
    generator = torch.Generator().manual_seed(0)
    for attn_mask in (
        torch.rand(20, 33, generator=generator) > 0.3,
        torch.randn(2, 1, 20, 33, generator=generator).double(),
    ):
        torch.testing.assert_close(
            attention_reference(*inputs, attn_mask),
            F.scaled_dot_product_attention(*inputs, attn_mask),
        )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_tiles_are_the_whole(alignment, window):
    # Tiles that divide neither length, of a shape of their own.
    for lengths, causal in itertools.product(((29, 53), (53, 29)), (False, True)):
        inputs = make(*lengths)
        options = {"is_causal": causal, "causal_alignment": alignment, "window_size": window}
        whole = attention_reference(*inputs, **options, return_lse=True)
        tiled = flash_attention_reference(
            *inputs, **options, block_q=8, block_k=12, return_lse=True
        )
        torch.testing.assert_close(tiled, whole)
        grad_outputs = [torch.full_like(t, 0.7) + t.detach().nan_to_num(neginf=0.0) for t in whole]
        torch.testing.assert_close(
            torch.autograd.grad(tiled, inputs, grad_outputs),
            torch.autograd.grad(whole, inputs, grad_outputs),
        )


# The compiler itself makes an instance of every autograd.Function it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_tiles_compile():
    inputs = make(20, 20, torch.float32)
    compiled = torch.compile(flash_attention_reference, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, True, block_q=8, block_k=8)
    expected = flash_attention_reference(*inputs, True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    )


def test_online_softmax_of_four_scores():
    # The row that docs/operators/attention.md works through, two keys at a time.
    q, v = torch.ones(1, 1), torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    k = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    out, lse = flash_attention_reference(q, k, v, block_q=1, block_k=2, return_lse=True)
    assert out.item() == pytest.approx(33.43, abs=5e-3)
    assert lse.item() == pytest.approx(4.4402, abs=5e-5)
