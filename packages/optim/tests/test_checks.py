"""What AdamW refuses: options out of range, parameters and gradients that it cannot update."""

import pytest
import torch

from tilewright_optim import AdamW

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"shape \(2,\); give one of one element"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9,)}, "give two floats"),
        ({"betas": (torch.tensor(0.9), torch.tensor(0.9))}, "give two floats"),
    ],
)
def test_bad_options(options, message, device):
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (1, 5)]
    with pytest.raises(ValueError, match=message):
        AdamW(params, **options)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": params, **options}])
    optimizer = AdamW(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


def test_bad_params(device):
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"shape \(3,\) is torch.complex64.*view_as_real"):
        AdamW([param]).step()
    param = torch.nn.Parameter(torch.ones(3, 2, device=device))
    param.grad = torch.ones(3, 2, device=device).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse_coo.*to_dense"):
        AdamW([param]).step()


@pytest.mark.gpu
def test_tensors_of_one_parameter_on_two_devices():
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].cpu()
    with pytest.raises(ValueError, match=r"is on cuda:0 and its state on cpu; move the model"):
        optimizer.step()
