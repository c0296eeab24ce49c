import torch

from tilewright_model import ModelConfig
from tilewright_model.mlp import MLP


def test_gate_is_the_first_half() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=8,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=10,
        max_position_embeddings=4,
    )
    mlp = MLP(config).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = mlp.gate_up_proj.weight[:10], mlp.gate_up_proj.weight[10:]
    a = x @ gate.T
    expected = (a * a.sigmoid() * (x @ up.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)
