"""One decoder block."""

import torch.utils.checkpoint
from torch import Tensor, nn

from tilewright_kernels import AddRMSNorm, Dropout, RMSNorm
from tilewright_model.attention import Attention
from tilewright_model.config import ModelConfig
from tilewright_model.kv_cache import LayerCache
from tilewright_model.mlp import MLP
from tilewright_model.moe import MoE, RouterOutput
from tilewright_model.positions import Positions


class Block(nn.Module):
    """Attention and then an MLP, each of normalized input, each added to the residual stream.

        h ← h + Attention(RMSNorm(h));  h ← h + MLP(RMSNorm(h))

    The first sum and the second norm are one kernel, which returns both.

    Args:
        config: of the model.
        layer: index of the block, which decides on experts and on a sliding window.

    Attributes:
        recompute_mlp: whether backward computes the MLP anew, instead of keeping what is within.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | MoE = (
            MoE(config)
            if config.is_sparse(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.dropout = Dropout(config.residual_dropout)
        self.recompute_mlp = False

    def forward(
        self, h_BTC: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        """[B, T, C] to [B, T, C], and what the router said where there is one."""
        y_BTC = self.self_attn(self.input_layernorm(h_BTC), positions, cache)
        x_BTC, h_BTC = self.post_attention_layernorm(self.dropout(y_BTC), h_BTC)
        y_BTC, router = self._mlp(x_BTC)
        return h_BTC + self.dropout(y_BTC), router

    def _mlp(self, x_BTC: Tensor) -> tuple[Tensor, RouterOutput | None]:
        if self.recompute_mlp:
            y = torch.utils.checkpoint.checkpoint(self.mlp, x_BTC, use_reentrant=False)
            assert y is not None
        else:
            y = self.mlp(x_BTC)
        return (y, None) if isinstance(y, Tensor) else y
