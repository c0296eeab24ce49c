"""The sparse half of a decoder block: a router, experts, and experts that all tokens share.

    y = Σ over the k chosen e of g_e · Expert_e(x)  (+ Shared(x)),   g = route(W_router · x)

Each expert is a gated MLP (Shazeer et al. 2017, arXiv:1701.06538; with shared experts Dai et al.
2024, arXiv:2401.06066). Nothing is dropped or padded, and the host waits for nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewright_kernels import Linear, moe_mlp, moe_route
from tilewright_model.config import ModelConfig
from tilewright_model.mlp import MLP


class RouterOutput(NamedTuple):
    """What a sparse layer tells the losses of its router; N tokens, E experts."""

    logits: Tensor
    """[N, E]."""
    tokens_per_expert: Tensor
    """[E] int32."""


class Experts(nn.Module):
    """The weights of E gated MLPs, fused so that one grouped product serves all.

    Attributes:
        gate_up_proj: [E, 2I, C], the rows of the gate first.
        down_proj: [E, C, I].
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def extra_repr(self) -> str:
        """Sizes, in the module's printed form."""
        experts, hidden, width = self.down_proj.shape
        return f"{experts} × ({hidden} → {width} → {hidden})"


class MoE(nn.Module):
    """A mixture of experts in place of an MLP.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.expert_size
        self.num_experts_per_tok = config.num_experts_per_tok
        self.scoring, self.normalize = config.router_scoring, config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.gate = Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, width)
        shared = config.num_shared_experts
        self.shared_experts = MLP(hidden, shared * width) if shared else None

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, RouterOutput]:
        """[..., C] to [..., C], and what the router said."""
        x_NC = x_BTC.flatten(0, -2)
        logits_NE = self.gate(x_NC)
        routing = moe_route(
            logits_NE,
            self.num_experts_per_tok,
            scoring=self.scoring,
            normalize=self.normalize,
            scale=self.scale,
        )
        y_NC = moe_mlp(x_NC, self.experts.gate_up_proj, self.experts.down_proj, routing)
        y_BTC = y_NC.view_as(x_BTC)
        if self.shared_experts is not None:
            y_BTC = y_BTC + self.shared_experts(x_BTC)
        return y_BTC, RouterOutput(logits_NE, routing.tokens_per_expert)
