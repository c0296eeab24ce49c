"""Which tensors may be walked side by side, and which go through a copy."""

import torch

from tilewright_optim._layout import aligned


def test_contiguous_and_equally_strided_tensors_are_taken_as_they_are():
    for layout in (
        lambda: torch.rand(3, 4),
        lambda: torch.rand(3, 4).T,
        lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.rand(0, 4).T,
    ):
        grad, param, state = layout(), layout(), layout()
        result = aligned([grad], ([param], [state]))
        assert result.grads[0] is grad
        assert [column[0] for column in result.written] == [param, state]
        assert not result.copies


def test_strides_of_dimensions_of_size_one_do_not_count():
    param = torch.rand(4, 3).T.unsqueeze(0)
    grad = param.clone().as_strided((1, 3, 4), (7, 1, 3))
    assert not aligned([grad], ([param],)).copies
    assert aligned([grad], ([param],)).grads[0] is grad


def test_other_layouts_are_copied_into_the_parameters():
    param = torch.rand(3, 4).T
    grad, state = torch.rand(4, 3), torch.rand(4, 3)
    result = aligned([grad, grad], ([param, state], [state, state]))
    assert result.grads[0].stride() == param.stride()
    assert torch.equal(result.grads[0], grad)
    assert result.written[0][0] is param
    ((original, copy),) = result.copies
    assert original is state
    assert copy is result.written[1][0]
    assert copy.stride() == param.stride()
    assert torch.equal(copy, state)
    # The second parameter's tensors lie alike.
    assert [column[1] for column in (result.grads, *result.written)] == [grad, state, state]


def test_a_sliced_parameter_is_copied_and_an_expanded_gradient_too():
    param, grad = torch.rand(4, 6)[:, ::2], torch.rand(1, 1).expand(4, 3)
    result = aligned([grad], ([param],))
    assert result.grads[0].is_contiguous()
    ((original, copy),) = result.copies  # the gradient is only read
    assert original is param
    assert copy.is_contiguous()
