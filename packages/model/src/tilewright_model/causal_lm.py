"""The decoder language model: embedding, blocks, final norm, output projection, loss.

    h₀ = E[ids]
    h ← h + Attention(RMSNorm(h));  h ← h + MLP(RMSNorm(h))        for each block
    logits = RMSNorm(h)·Wᵀ,  W = E when tied

The model of Llama (Touvron et al. 2023, arXiv:2302.13971). It calls `tilewright_kernels` and never
names a backend: `tilewright_kernels.use_backend` chooses. Shapes: B batch, T tokens, C hidden_size,
V vocab_size.
"""

import math
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright_kernels import RMSNorm, cross_entropy
from tilewright_model.attention import Attention
from tilewright_model.checkpoint import read_config, read_weights, write_checkpoint
from tilewright_model.config import ModelConfig
from tilewright_model.kv_cache import KVCache, LayerCache
from tilewright_model.mlp import MLP
from tilewright_model.rotary import RotaryTables

IGNORE_INDEX = -100
"""Label of a position that has no part in the loss."""

INITIALIZER_STD = 0.02
"""Standard deviation of weights at the start, before the residual projections' 1/√(2L)."""


class CausalLMOutput(NamedTuple):
    """What `CausalLM.forward` returns."""

    loss: Tensor | None = None
    """0-d float32, or None without labels."""
    logits: Tensor | None = None
    """[B, T, V] in the dtype the output projection computes in, or None where not asked for."""
    aux_loss: Tensor | None = None
    """Balance loss of expert routing; None in a dense model."""


class Block(nn.Module):
    """One decoder block, pre-norm: attention and MLP each add to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        h_BTC: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; the other arguments are those of `Attention`."""
        h_BTC = h_BTC + self.self_attn(self.input_layernorm(h_BTC), cos, sin, position_ids, cache)
        return h_BTC + self.mlp(self.post_attention_layernorm(h_BTC))


class CausalLM(nn.Module):
    """A decoder that predicts each next token.

    Weights start as N(0, 0.02²), except that the two projections which add to the residual stream,
    `o_proj` and `down_proj`, start as N(0, 0.02² / 2L): the stream's variance then does not grow
    with the number L of blocks (GPT-2). Norm weights start at 1.

    To compile, compile block by block: `for block in model.layers: block.compile(fullgraph=True)`.
    One compilation serves all blocks, and gradient hooks fire between them.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTables(
            config.attention_head_dim, config.max_position_embeddings, config.rope_theta
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's default generator."""
        residual_std = INITIALIZER_STD / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(std=residual_std if residual else INITIALIZER_STD)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        num_items: int | Tensor | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token at every position, and their cross-entropy with the labels.

        Args:
            input_ids: [B, T] int64 or int32, below vocab_size.
            labels: [B, T] int64, not shifted: position t predicts labels[:, t + 1], so pass
                input_ids itself with -100 where there is nothing to learn.
            position_ids: [B, T] int64 below max_position_embeddings; by default 0, 1, …, or on
                from the cache's position.
            cache: earlier tokens; the new ones are added to it.
            num_items: what the summed loss is divided by; by default the number of labels counted
                here. Give the number over all micro-batches and ranks to weigh every token alike.
            return_logits: whether to return logits; by default only when labels are not given.

        Raises:
            TypeError: ids or labels that are not integers.
            ValueError: shapes that do not fit, more tokens than positions or room in the cache,
                num_items without labels, a cache while gradients are recorded.
        """
        if labels is None and num_items is not None:
            raise ValueError(f"num_items {num_items} scales the loss: give labels with it")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {list(labels.shape)} must have the shape of input_ids "
                f"{list(input_ids.shape)} (unshifted)"
            )
        hidden_BTC = self.hidden_states(input_ids, position_ids=position_ids, cache=cache)
        keep_logits = labels is None if return_logits is None else return_logits
        if labels is None and not keep_logits:
            return CausalLMOutput()
        logits_BTV = self.project_logits(hidden_BTC)
        loss = None if labels is None else next_token_loss(logits_BTV, labels, num_items)
        return CausalLMOutput(loss=loss, logits=logits_BTV if keep_logits else None)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, C] after the final norm, which `project_logits` takes; arguments as forward's."""
        start = cache.position if cache is not None else 0
        self._check_inputs(input_ids, position_ids, start)
        length = input_ids.shape[1]
        if cache is not None:
            cache.check_room(*input_ids.shape)
            if torch.is_grad_enabled():
                raise ValueError("a cache is for inference: call the model under torch.no_grad()")
        if position_ids is None:
            cos, sin = self.rotary(start, length)
        else:
            cos, sin = self.rotary.cos, self.rotary.sin

        h_BTC = self.embed_tokens(input_ids)
        caches = [None] * len(self.layers) if cache is None else cache.layers(length)
        for block, layer_cache in zip(self.layers, caches, strict=True):
            h_BTC = block(h_BTC, cos, sin, position_ids, layer_cache)
        if cache is not None:
            cache.advance(length)
        return self.norm(h_BTC)

    def project_logits(self, hidden: Tensor) -> Tensor:
        """[..., C] of `hidden_states` to logits [..., V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` in Hugging Face's layout for Llama.

        Each file is written beside its place and renamed. Missing folders are created.

        Raises:
            OSError: the folder cannot be written.
        """
        write_checkpoint(directory, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model from a folder that `save_pretrained`, or transformers for a Llama, has written.

        Args:
            directory: holds `config.json` and `model.safetensors`, or its shards and their index.
            device: where the weights go; by default torch's default device.
            dtype: what they are cast to; by default they stay as they are in the file.

        Raises:
            FileNotFoundError: the folder or one of its files is not there.
            ValueError: a configuration that this model does not compute, a tensor that is missing,
                unexpected or of another shape.
        """
        config = read_config(directory)
        target = torch.device(device) if device is not None else torch.get_default_device()
        weights = read_weights(directory, config, device=target, dtype=dtype)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.rotary.to_empty(device=target)
        return model

    def _check_inputs(self, input_ids: Tensor, position_ids: Tensor | None, start: int) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids is {input_ids.dtype}: give int64 or int32")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)}: give [batch, tokens], not empty"
            )
        if position_ids is not None and position_ids.shape != input_ids.shape:
            raise ValueError(
                f"position_ids {list(position_ids.shape)} must have the shape of input_ids "
                f"{list(input_ids.shape)}"
            )
        end, limit = start + input_ids.shape[1], self.config.max_position_embeddings
        if position_ids is None and end > limit:
            raise ValueError(
                f"{end} tokens exceed max_position_embeddings {limit}: shorten the input or "
                f"build the model with max_position_embeddings={end}"
            )


def next_token_loss(
    logits_BTV: Tensor, labels_BT: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """Cross-entropy of position t with labels[:, t + 1], computed in float32; 0-d.

    The labels are shifted and the logits stay where they are: a shifted view of the logits is not
    contiguous, and making it so would copy the largest tensor of the step.

    Args:
        logits_BTV: any float dtype.
        labels_BT: int64, -100 where nothing is to be predicted.
        num_items: divides the sum; by default the number of labels counted.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    logits, targets = logits_BTV.flatten(0, 1), targets_BT.flatten()
    if num_items is None:
        return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
    return cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items
