"""The gated MLP of a dense decoder block."""

from torch import Tensor, nn

from tilewright_kernels import Linear, gated_mlp


class MLP(nn.Module):
    """W_down·(silu(W_gate·x) ∘ W_up·x) (SwiGLU: Shazeer 2020, arXiv:2002.05202).

    `gate_up_proj.weight` is [2I, C] with the rows of W_gate first; `down_proj.weight` is [C, I].

    Args:
        hidden_size: C.
        intermediate_size: I.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return gated_mlp(x_BTC, self.gate_up_proj.weight, self.down_proj.weight)
