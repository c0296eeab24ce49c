"""A corpus and a model so small that a run takes a second."""

import json
import random
from pathlib import Path

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_train.chat_template import CHATML
from tilewright_train.tokenizer import train_tokenizer


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    """300 short documents of eight words: enough for a split by hash to fill both sides."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "red", "mat", "today"]
    documents = [
        " ".join(draw.choice(words) for _ in range(draw.randint(10, 40))) for _ in range(300)
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def tiny_flags(tmp_path: Path, corpus_file: Path) -> list[str]:
    """Flags of a run of 12 steps on that corpus, with checkpoints at 4, 8 and 12."""
    sizes = {
        "--vocab-size": 300, "--hidden-size": 32, "--num-hidden-layers": 1,
        "--num-attention-heads": 2, "--num-key-value-heads": 1, "--intermediate-size": 64,
        "--seq-len": 16, "--batch-size": 4, "--steps": 12, "--lr": 0.01,
        "--save-every": 4, "--eval-every": 6, "--eval-tokens": 200, "--sample-tokens": 8,
        "--threads": 1, "--device": "cpu", "--keep": 3,
        "--data": corpus_file, "--out": tmp_path / "runs", "--cache-dir": tmp_path / "cache",
    }  # fmt: skip
    return [str(word) for pair in sizes.items() for word in pair]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model made elsewhere: random bfloat16 weights, a tokenizer, a template in its settings."""
    folder = tmp_path / "elsewhere"
    tokenizer = train_tokenizer(["the cat sat on a red mat today"] * 9, 298)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    shape = preset(
        "nano", vocab_size=304, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=160,
        tie_word_embeddings=False, rope_theta=500.0,
    )  # fmt: skip
    torch.manual_seed(0)
    CausalLM(shape).bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    named = [{"name": "tools", "template": ""}, {"name": "default", "template": template}]
    described = {"eos_token": {"content": "<|im_end|>"}, "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
