"""Greedy continuations against transformers' generate, from the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tilewright_model import CausalLM, Engine, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [1, 8, 2, 8, 1]]
NEW = 14


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations(family: str, penalty: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    params = SamplingParams(max_new_tokens=NEW, temperature=0, repetition_penalty=penalty)
    engine = Engine(CausalLM.from_pretrained(tmp_path), max_batch_size=3)
    completions = engine.generate(PROMPTS, params)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=penalty,
            pad_token_id=0,
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
    assert len({t for c in completions for t in c.token_ids}) > 3
