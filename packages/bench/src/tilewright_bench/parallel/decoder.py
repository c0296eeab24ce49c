"""The decoder that is trained on several GPUs: torch's own operators, so that only what lies
between GPUs differs from one case to the next.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

#   B = batch, T = tokens, D = hidden size, N = heads, H = head dimension


@dataclass(frozen=True, kw_only=True)
class Size:
    """A decoder and the rows that a rank trains on."""

    vocabulary: int
    """Tokens; the embedding is also the head."""
    hidden: int
    """Width of the residual stream."""
    layers: int
    """Blocks."""
    heads: int
    """Of attention."""
    intermediate: int
    """Width inside the gated MLP."""
    batch: int
    """Rows a rank."""
    tokens: int
    """Of a row."""

    @property
    def block_parameters(self) -> int:
        """Of one block."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def outside_parameters(self) -> int:
        """Of the embedding, which is the head as well, and the last norm."""
        return self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole."""
        return self.layers * self.block_parameters + self.outside_parameters


SIZES = {
    "0.5b": Size(
        vocabulary=32768,
        hidden=1536,
        layers=16,
        heads=12,
        intermediate=4096,
        batch=4,
        tokens=2048,
    ),
    "nano": Size(
        vocabulary=256, hidden=64, layers=3, heads=2, intermediate=128, batch=2, tokens=32
    ),
}


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside the residual stream."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = size.hidden
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden)
        self.gate_up = nn.Linear(hidden, 2 * size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D]."""
        x_BTD = x_BTD + self._attention(self.attention_norm(x_BTD))
        gate, up = self.gate_up(self.mlp_norm(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(F.silu(gate) * up)

    def _attention(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
        q_BNTH, k_BNTH, v_BNTH = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """A language model that returns its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy, 0-d float32."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BT.flatten())
