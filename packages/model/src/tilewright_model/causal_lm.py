"""The decoder language model: embedding, blocks, final norm, output projection, loss.

    h₀ = E[ids]
    h ← h + Attention(RMSNorm(h));  h ← h + MLP(RMSNorm(h))        for each block
    logits = RMSNorm(h)·Wᵀ,  W = E when tied

The model of Llama (Touvron et al. 2023, arXiv:2302.13971), with the variations that `ModelConfig`
names. It calls `tilewright_kernels` and never names a backend: `tilewright_kernels.use_backend`
chooses. Shapes: B batch, T tokens, C hidden_size, V vocab_size.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple, Self, cast, get_args

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tilewright_kernels import (
    Dropout,
    Linear,
    RMSNorm,
    linear,
)
from tilewright_model.block import Block
from tilewright_model.checkpoint import (
    MAX_SHARD_BYTES,
    read_config,
    read_weights,
    write_checkpoint,
)
from tilewright_model.config import ModelConfig
from tilewright_model.inputs import check_labels, check_tokens, sequences
from tilewright_model.kv_cache import KVCache, computed_dtype
from tilewright_model.loss import IGNORE_INDEX, linear_loss, logits_loss, next_tokens
from tilewright_model.moe import Experts, RouterOutput
from tilewright_model.positions import Positions, SinusoidalPositions
from tilewright_model.rotary import RotaryTables
from tilewright_model.router_losses import balance_loss, router_loss

Recompute = Literal["none", "selective", "full"]


class CausalLMOutput(NamedTuple):
    """What `CausalLM.forward` returns."""

    loss: Tensor | None = None
    """0-d float32, or None without labels. In training the router's losses are in it."""
    logits: Tensor | None = None
    """[B, T, V] in the dtype the output projection computes in, or None where not asked for."""
    aux_loss: Tensor | None = None
    """Balance loss of expert routing, not yet multiplied by its coefficient; None in a dense
    model."""


class CausalLM(nn.Module):
    """A decoder that predicts each next token.

    Weights start as N(0, σ²) with σ = initializer_range, except that the projections which add to
    the residual stream, `o_proj` and `down_proj`, start as N(0, σ² / 2L): the stream's variance
    then does not grow with the number L of blocks (GPT-2). Norm weights start at 1.

    A model that is too large to be drawn twice is built on the meta device and filled in place:

        with torch.device("meta"):
            model = CausalLM(config)
        model.materialize("cuda")

    To compile, compile block by block: `for block in model.layers: block.compile(fullgraph=True)`.
    One compilation serves all blocks of a kind, and gradient hooks fire between them.

    Args:
        config: the model's shape.

    Attributes:
        origin: the folder that it was read from, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: Path | None = None
        device = torch.get_default_device()
        with torch.device("meta"):  # drawn once, below, and by no constructor
            self._build(config)
        self.recompute: Recompute = "none"
        if device.type != "meta":
            self.materialize(device)

    def _build(self, config: ModelConfig) -> None:
        hidden, length = config.hidden_size, config.max_position_embeddings
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.rotary = self.embed_positions = None
        if config.position_embedding == "rope":
            self.rotary = RotaryTables(
                config.attention_head_dim, length, config.rope_theta, config.rope_scaling
            )
        elif config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(length, hidden)
        elif config.position_embedding == "sinusoidal":
            self.embed_positions = SinusoidalPositions(length, hidden, config.initializer_range)
        self.dropout = Dropout(config.residual_dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(hidden, config.vocab_size, bias=False)
        )

    def materialize(self, device: torch.device | str) -> Self:
        """Allocate all parameters and buffers on `device` and draw the weights there."""
        self.to_empty(device=device)
        self.reset_parameters()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from the default generator of their device."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(std=residual_std if residual else std)
            elif isinstance(module, Experts):
                module.gate_up_proj.normal_(std=std)
                module.down_proj.normal_(std=residual_std)

    @property
    def recompute(self) -> Recompute:
        """What backward computes anew instead of keeping it: "none", "selective" (the inside of
        every MLP), or "full" (every block, of which the input alone is kept).
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        if value not in get_args(Recompute):
            raise ValueError(
                f"recompute is {value!r}: choose one of {', '.join(get_args(Recompute))}"
            )
        self._recompute: Recompute = value
        for block in self.layers:
            cast(Block, block).recompute_mlp = value == "selective"

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        num_items: int | Tensor | None = None,
        return_logits: bool | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token at every position, and their cross-entropy with the labels.

        Args:
            input_ids: [B, T] int64 or int32, below vocab_size.
            labels: [B, T] int64, not shifted: position t predicts labels[:, t + 1], so pass
                input_ids itself with -100 where there is nothing to learn.
            position_ids: [B, T] int64 below max_position_embeddings; by default 0, 1, … in each
                sequence, or on from the cache's position.
            cu_seqlens: [S + 1] int32, bounds of S sequences that are packed in one row, B = 1:
                sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]. None sees another, and
                the last token of one does not predict the first of the next.
            max_seqlen: no packed sequence is longer: the attention's grid is made for so many;
                by default as many as there are positions.
            attention_mask: [B, T], 0 for padding on one side of each row, which no token sees.
            cache: earlier tokens; the new ones are added to it. Not with cu_seqlens or
                attention_mask, whose sequences `Engine` reads.
            num_items: what the summed loss is divided by; by default the number of labels counted
                here. Give the number over all micro-batches and ranks to weigh every token alike.
            return_logits: whether to return logits; by default only when labels are not given.

        Raises:
            TypeError: ids or labels that are not integers, a cache of another dtype.
            ValueError: shapes that do not fit, more tokens than positions or room in the cache,
                on the CPU ids or labels out of range, num_items without labels or below 1, a cache
                of another model, with cu_seqlens or attention_mask, or while gradients are
                recorded.
        """
        check_labels(self.config, input_ids, labels, num_items)
        keep_logits = labels is None if return_logits is None else return_logits
        if labels is None and not keep_logits:
            return CausalLMOutput()
        positions = self._positions(
            input_ids, position_ids, cu_seqlens, max_seqlen, attention_mask, cache
        )
        hidden_BTC, routers = self._decode(input_ids, positions, cache)
        aux_loss = balance_loss(self.config, routers, attention_mask) if routers else None
        logits_BTV = self.project_logits(hidden_BTC) if keep_logits else None
        if labels is None:
            return CausalLMOutput(logits=logits_BTV, aux_loss=aux_loss)
        targets_BT = next_tokens(labels, positions, attention_mask)
        if logits_BTV is None:
            loss = self._linear_loss(hidden_BTC, targets_BT, num_items)
        else:
            loss = logits_loss(logits_BTV, targets_BT, num_items)
        if aux_loss is not None and self.training:
            router = router_loss(self.config, routers, aux_loss, attention_mask)
            if num_items is not None:  # this batch's share of them
                router = router * ((targets_BT != IGNORE_INDEX).sum() / num_items)
            loss = loss + router
        return CausalLMOutput(loss=loss, logits=logits_BTV, aux_loss=aux_loss)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, C] after the final norm, which `project_logits` takes; arguments as forward's."""
        positions = self._positions(
            input_ids, position_ids, cu_seqlens, max_seqlen, attention_mask, cache
        )
        return self._decode(input_ids, positions, cache)[0]

    def _positions(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> Positions:
        start = cache.position if cache is not None else 0
        check_tokens(self.config, input_ids)
        if cache is not None and position_ids is None:
            position_ids = cache.position_ids(input_ids.shape[1])
        ids, cu_seqlens, longest = sequences(
            *(self.config, input_ids),
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            attention_mask=attention_mask,
            start=start,
            cached=cache is not None,
        )
        if cache is not None:
            cache.check_model(self.config, computed_dtype(self.embed_tokens.weight))
            cache.check_room(*input_ids.shape)
            if torch.is_grad_enabled():
                raise ValueError("a cache is for inference: call the model under torch.no_grad()")
        length = input_ids.shape[1]
        if self.embed_positions is not None and ids is None:
            ids = torch.arange(start, start + length, device=input_ids.device)
            ids = ids.expand_as(input_ids)
        cos = sin = None
        if self.rotary is not None:
            tables = (self.rotary.cos, self.rotary.sin)
            cos, sin = self.rotary(start, length) if ids is None else tables
        return Positions(cos, sin, ids, cu_seqlens, longest)

    def _decode(
        self, input_ids: Tensor, positions: Positions, cache: KVCache | None
    ) -> tuple[Tensor, list[RouterOutput]]:
        """Normalized hidden states, and what each router said."""
        h_BTC = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            h_BTC = h_BTC + self.embed_positions(positions.ids).to(h_BTC.dtype)
        h_BTC = self.dropout(h_BTC)
        length = input_ids.shape[1]
        caches = [None] * len(self.layers) if cache is None else cache.layers(length)
        routers = []
        for block, layer_cache in zip(self.layers, caches, strict=True):
            if self.recompute == "full" and torch.is_grad_enabled():
                recomputed = torch.utils.checkpoint.checkpoint(
                    block, h_BTC, positions, use_reentrant=False
                )
                h_BTC, router = cast(tuple[Tensor, RouterOutput | None], recomputed)
            else:
                h_BTC, router = block(h_BTC, positions, layer_cache)
            if router is not None:
                routers.append(router)
        if cache is not None:
            cache.advance(length)
        return self.norm(h_BTC), routers

    def project_logits(self, hidden: Tensor) -> Tensor:
        """[..., C] of `hidden_states` to logits [..., V]."""
        logits = linear(self._scaled(hidden), self._head())
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _head(self) -> Tensor:
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight

    def _scaled(self, hidden: Tensor) -> Tensor:
        # On C columns instead of V.
        scaling = self.config.logits_scaling
        return hidden if scaling == 1 else hidden / scaling

    def _linear_loss(
        self, hidden_BTC: Tensor, targets_BT: Tensor, num_items: int | Tensor | None
    ) -> Tensor:
        cap = self.config.final_logit_softcapping
        return linear_loss(
            self._scaled(hidden_BTC), self._head(), targets_BT, num_items, softcap=cap
        )

    def save_pretrained(
        self, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write `config.json` and weights as Hugging Face lays out the family of this model.

        Each file is written beside its place and renamed. Missing folders are created. The
        tokenizer's files of the folder that the model was read from come along.

        Args:
            directory: where to.
            max_shard_bytes: weights beyond so many bytes are split into several files.

        Raises:
            OSError: the folder cannot be written.
        """
        weights = self.state_dict()
        write_checkpoint(
            *(directory, self.config, weights), max_shard_bytes=max_shard_bytes, origin=self.origin
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model from a folder that `save_pretrained` or transformers has written.

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
        model.origin = Path(directory)
        for module in (model.rotary, model.embed_positions):
            if module is not None and not any(True for _ in module.parameters()):
                module.to_empty(device=target)  # its table follows from the configuration
        return model
