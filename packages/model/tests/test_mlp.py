import torch

from tilewright_model.mlp import MLP


def test_gate_is_the_first_half() -> None:
    torch.manual_seed(0)
    mlp = MLP(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = mlp.gate_up_proj.weight[:10], mlp.gate_up_proj.weight[10:]
    a = x @ gate.T
    expected = (a * a.sigmoid() * (x @ up.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
