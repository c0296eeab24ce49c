"""The gated MLP of a decoder block."""

from torch import Tensor, nn

from tilewright_kernels import swiglu
from tilewright_model.config import ModelConfig


class MLP(nn.Module):
    """W_down·(silu(W_gate·x) ∘ W_up·x) (SwiGLU: Shazeer 2020, arXiv:2002.05202).

    `gate_up_proj.weight` is [2I, C] with the rows of W_gate first; `down_proj.weight` is [C, I].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        return self.down_proj(swiglu(self.gate_up_proj(x_BTC)))
