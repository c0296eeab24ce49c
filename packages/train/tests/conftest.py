"""A corpus and a model so small that a run takes a second."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

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


@pytest.fixture
def make_elsewhere() -> Callable[[str], Tokenizer]:
    """Makes tokenizers as other models have them: with a prefix before a text or parts of it."""

    def make(prefix: str) -> Tokenizer:
        """A BPE of a few hundred entries.

        Args:
            prefix: «prepend» is Llama 2's normalizer, «first», «always» and «never» are the
                schemes of Metaspace, «byte level» puts a space before each part, and «stripping»
                has special tokens that take the spaces behind them, as those of Phi 3.
        """
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if prefix == "prepend":
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
            tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        elif prefix in ("first", "always", "never"):
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(prepend_scheme=prefix),
                    pre_tokenizers.Split("\n", "isolated"),
                ]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=prefix == "byte level"
            )
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        added = [
            AddedToken(text, special=True, normalized=False, rstrip=prefix == "stripping")
            for text in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
        ]
        texts = [
            "def f(x):\n    return x + 1\n",
            "the cat sat on the mat. The cat sat.\n",
            "[INST] user assistant system [/INST]<>|_/",
        ]
        tokenizer.train_from_iterator(
            texts * 20, BpeTrainer(vocab_size=200, special_tokens=added, show_progress=False)
        )
        tokenizer.encode_special_tokens = True
        return tokenizer

    return make
