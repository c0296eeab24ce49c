"""Reading prompts: all but the newest token of each sequence go to the cache, in one pass or more.

Prompts of unequal lengths are padded at the end. Since a token sees none that follows, padding
changes nothing before it; its own keys and values lie behind their sequence's length, where nobody
looks, until tokens take their rows. Shapes: B batch, T longest prompt, C hidden_size.
"""

import contextlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright_model.causal_lm import CausalLM
from tilewright_model.kv_cache import KVCache

# All of torch's attention backends but cuDNN, which builds a plan for every new length: decoding a
# 0.5 B model takes 31 ms a token with it on an H200 (torch 2.11) and 6.5 ms without.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextlib.contextmanager
def uncompiled():
    """Blocks run as they are, even where they were compiled for training.

    Lengths change with every prompt and every token, and each new one would be compiled again.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(_ATTENTION))
        # Where the compiler was never imported nothing is compiled; importing it takes 3 seconds.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[B, T] int64, each prompt repeating its last token to the longest's length."""
    longest = max(map(len, prompts))
    rows = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64).to(device)


@torch.no_grad()
def prefill(
    model: CausalLM,
    prompts_BT: Tensor,
    lengths: Sequence[int],
    cache: KVCache,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Fill the cache with prompts.

    Args:
        model: of the cache.
        prompts_BT: int64, padded at the end.
        lengths: of the prompts, 1 to T.
        cache: what it holds comes before the prompts, equally long for all.
        chunk: tokens that are read at a time; None for all. The memory for hidden states is a
            chunk's.

    Returns:
        [B, C], normalized hidden states of each prompt's last token, for `project_logits`.
    """
    T, start = prompts_BT.shape[1], cache.position
    step = T if chunk is None else chunk
    last_B = torch.tensor(lengths).to(prompts_BT.device) - 1
    sequence = torch.arange(len(lengths), device=prompts_BT.device)
    last_BC: Tensor | None = None
    for begin in range(0, T, step):
        hidden_BTC = model.hidden_states(prompts_BT[:, begin : begin + step], cache=cache)
        width = hidden_BTC.shape[1]
        here_BC = hidden_BTC[sequence, (last_B - begin).clamp(0, width - 1)]
        # A prompt that ends later takes its state from a later chunk.
        reached = (last_B >= begin)[:, None]
        last_BC = here_BC if last_BC is None else torch.where(reached, here_BC, last_BC)
    assert last_BC is not None
    cache.truncate([start + length for length in lengths])
    return last_BC
