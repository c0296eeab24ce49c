"""What a forward is given: checked at the door, and turned into `Positions`."""

import torch
from torch import Tensor

from tilewright_kernels import packed_position_ids
from tilewright_model.config import ModelConfig
from tilewright_model.loss import IGNORE_INDEX
from tilewright_model.positions import padded_cu_seqlens


def check_tokens(config: ModelConfig, input_ids: Tensor) -> None:
    """Raise for tokens that are no [B, T] integers or, where looking is free, out of range.

    Raises:
        TypeError: not integers.
        ValueError: another shape, or on the CPU an id that is none.
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids is {input_ids.dtype}: give int64 or int32")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids is {list(input_ids.shape)}: give [batch, tokens], not empty")
    if _looking_is_free(input_ids):
        smallest, largest = (int(bound) for bound in input_ids.aminmax())
        for token in (smallest, largest):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"token {token} is outside the vocabulary of {config.vocab_size}: is this the "
                    f"model's tokenizer?"
                )


def check_labels(
    config: ModelConfig, input_ids: Tensor, labels: Tensor | None, num_items: int | Tensor | None
) -> None:
    """Raise for labels of another shape or, where looking is free, out of range.

    Raises:
        ValueError: and for num_items without labels, or not above 0.
    """
    if labels is None and num_items is not None:
        raise ValueError(f"num_items {num_items} scales the loss: give labels with it")
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels {list(labels.shape)} must have the shape of input_ids "
            f"{list(input_ids.shape)} (unshifted)"
        )
    if labels is not None and labels.numel() and _looking_is_free(labels):
        counted = labels.masked_fill(labels == IGNORE_INDEX, 0)
        for label in counted.aminmax():
            if not 0 <= label < config.vocab_size:
                raise ValueError(
                    f"label {label.item()} is outside the vocabulary of {config.vocab_size}: give "
                    f"token ids, and {IGNORE_INDEX} where there is nothing to learn"
                )
    known = not isinstance(num_items, Tensor) or _looking_is_free(num_items)
    if num_items is not None and known and not num_items > 0:
        raise ValueError(f"num_items is {num_items}: give the number of labels, 1 or more")


def sequences(
    config: ModelConfig,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    attention_mask: Tensor | None,
    start: int,
    cached: bool = False,
) -> tuple[Tensor | None, Tensor | None, int]:
    """Positions, bounds and the longest length of the sequences in a batch.

    Args:
        config: of the model.
        input_ids: [B, T].
        position_ids: [B, T] or None, as the other arguments of `CausalLM.forward`.
        cu_seqlens: bounds of sequences packed in one row.
        max_seqlen: no sequence of these is longer.
        attention_mask: [B, T], 0 for padding.
        start: tokens in the cache.
        cached: whether there is a cache, empty or not.

    Returns:
        position_ids where they are not start, start + 1, …; cu_seqlens of packed or padded
        sequences; max_seqlen.

    Raises:
        ValueError: arguments that exclude each other or do not fit, more tokens than positions.
        TypeError: cu_seqlens are not int32.
    """
    B, T = input_ids.shape
    limit = config.max_position_embeddings
    _check_shape("position_ids", position_ids, input_ids)
    _check_shape("attention_mask", attention_mask, input_ids)
    _check_range(config, position_ids)
    if cu_seqlens is None and max_seqlen is not None:
        raise ValueError(f"max_seqlen {max_seqlen} is that of packed sequences: give cu_seqlens")
    packed = cu_seqlens is not None or attention_mask is not None
    if packed and cached:
        name = "attention_mask" if attention_mask is not None else "cu_seqlens"
        raise ValueError(
            f"{name} is for a batch without a cache, which knows of sequences of one length: read "
            f"unequal prompts with Engine, or each of them into a cache of its own"
        )
    if cu_seqlens is None or attention_mask is not None:
        end = start + T
        if position_ids is None and end > limit:
            raise ValueError(
                f"{end} tokens exceed max_position_embeddings {limit}: shorten the input or "
                f"build the model with max_position_embeddings={end}"
            )
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens and attention_mask both say what belongs together")
        cu_seqlens, longest = padded_cu_seqlens(attention_mask), T
    elif cu_seqlens is not None:
        longest = _check_packed(config, input_ids, cu_seqlens, max_seqlen)
    else:
        return position_ids, None, 0
    if position_ids is None:
        position_ids = packed_position_ids(cu_seqlens, B * T).view(B, T)
    return position_ids, cu_seqlens, longest


def _check_shape(name: str, given: Tensor | None, input_ids: Tensor) -> None:
    if given is not None and given.shape != input_ids.shape:
        raise ValueError(
            f"{name} {list(given.shape)} must have the shape of input_ids {list(input_ids.shape)}"
        )


def _check_range(config: ModelConfig, position_ids: Tensor | None) -> None:
    if position_ids is None or not _looking_is_free(position_ids) or not position_ids.numel():
        return
    smallest, largest = (int(bound) for bound in position_ids.aminmax())
    limit = config.max_position_embeddings
    if smallest < 0 or largest >= limit:
        raise ValueError(
            f"position_ids run from {smallest} to {largest}, and max_position_embeddings is "
            f"{limit}: build the model with max_position_embeddings={largest + 1}"
        )


def _check_packed(
    config: ModelConfig, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None
) -> int:
    """The longest length: what was given, or the most that is allowed."""
    (B, N), limit = input_ids.shape, config.max_position_embeddings
    if B != 1:
        raise ValueError(f"input_ids is {[B, N]}: cu_seqlens goes with one row of packed sequences")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens is {cu_seqlens.dtype}: give int32")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens is {list(cu_seqlens.shape)}: give [sequences + 1], 0 first")
    longest = max_seqlen
    if _looking_is_free(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != N or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}: it must ascend from 0 to the "
                f"{N} tokens of input_ids"
            )
        found = int(cu_seqlens.diff().max())
        if max_seqlen is not None and found > max_seqlen:
            raise ValueError(f"a sequence has {found} tokens, and max_seqlen is {max_seqlen}")
        longest = found
    if longest is not None and longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds max_position_embeddings {limit}: split it or "
            f"build the model with max_position_embeddings={longest}"
        )
    return min(N, limit) if max_seqlen is None else max_seqlen


def _looking_is_free(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a traced graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor
