"""A batch's next tokens, drawn where their logits are: on a GPU one CUDA graph.

The graph reads and writes fixed addresses: the newest tokens, the cache with its lengths, the
sampler's options. It holds about 5 kernels a block, and replaying it costs the host microseconds.
Tokens come to the host by an asynchronous copy, which is read one step later.
"""

import torch
from torch import Tensor

from tilewright_model.causal_lm import CausalLM
from tilewright_model.decode_step import counters_for, decode_step, decodes_in_one_dtype
from tilewright_model.kv_cache import KVCache
from tilewright_model.prefill import uncompiled
from tilewright_model.sampling import Sampler


class TokenStep:
    """From the newest token of each sequence to the next.

    Args:
        model: of the cache.
        cache: B sequences, each with a token to come.
        sampler: of B rows.
        graph: whether to capture the step in a CUDA graph, where the model is on a GPU.
    """

    def __init__(
        self, model: CausalLM, cache: KVCache, sampler: Sampler, *, graph: bool = True
    ) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        device, batch_size = cache.lengths.device, cache.batch_size
        self.result = torch.zeros(2, batch_size, dtype=torch.int64, device=device)
        """[2, B]: what the host reads, tokens and the bits of their log-probabilities."""
        self.tokens = self.result[0]
        """[B] int64, the newest."""
        self.log_probs = self.result[1].view(torch.float32)[:batch_size]
        """[B] float32, theirs."""
        self.limits = torch.zeros_like(cache.lengths)
        """[B] int32: lengths at which sequences stop to grow; they have ended by then."""
        self._fused = decodes_in_one_dtype(model)
        self._counters = counters_for(model, batch_size)
        self._wants_graph = graph and device.type == "cuda" and self._fused
        self._graph: torch.cuda.CUDAGraph | None = None

    def draw(self, logits_BV: Tensor, steps_B: Tensor) -> None:
        """Draw the newest tokens, whose positions are steps_B."""
        if logits_BV.dtype == torch.float64:
            logits_BV = logits_BV.float()
        self.sampler.draw(logits_BV, steps_B, tokens_B=self.tokens, log_probs_B=self.log_probs)

    def run(self) -> None:
        """Put the next tokens in place of the newest; the host does not wait for them."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad(), uncompiled():
                if self._wants_graph:
                    self._graph = self._capture()
                    self._graph.replay()
                else:
                    self._step()
        self.cache.position = min(self.cache.position + 1, self.cache.max_length)

    def _step(self) -> None:
        lengths = self.cache.lengths
        steps_B = lengths + 1
        if self._fused:
            logits_BV = decode_step(self.model, self.tokens, self.cache, self._counters)
        else:
            logits_BV = self._forward()
        self.draw(logits_BV, steps_B)
        torch.minimum(steps_B, self.limits, out=lengths)

    def _forward(self) -> Tensor:
        """As `decode_step`, by the model's own forward."""
        cache = self.cache
        position = cache.position
        # Sequences that have ended stay where they are, so that lengths become unequal.
        cache.ragged, cache.position = True, min(position, cache.max_length - 1)
        hidden_B1C = self.model.hidden_states(self.tokens[:, None], cache=cache)
        cache.position = position
        return self.model.project_logits(hidden_B1C[:, -1])

    def _capture(self) -> torch.cuda.CUDAGraph:
        state = (self.result, self.cache.lengths, self.sampler.seen_BV)
        before = [x.clone() for x in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()  # compiles what has to be, which no capture can
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        for x, former in zip(state, before, strict=True):
            x.copy_(former)
        return graph


class Readback:
    """Tensors on their way to the host, two at most.

    Args:
        like: shape, dtype and device of what is sent.
    """

    def __init__(self, like: Tensor) -> None:
        self._on_gpu = like.is_cuda
        self._slots = [
            torch.empty(like.shape, dtype=like.dtype, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if self._on_gpu else []
        self._sent = self._received = 0

    def send(self, x: Tensor) -> None:
        """Copy x behind the work that is queued; the copy before the last must be received."""
        assert self._sent - self._received < 2
        slot = self._sent % 2
        self._slots[slot].copy_(x, non_blocking=self._on_gpu)
        if self._on_gpu:
            self._arrived[slot].record()
        self._sent += 1

    def receive(self) -> Tensor:
        """The oldest that was sent, once it is there. It is overwritten two sends later."""
        assert self._received < self._sent
        slot = self._received % 2
        if self._on_gpu:
            self._arrived[slot].synchronize()
        self._received += 1
        return self._slots[slot]
