"""What a run begins with when it does not begin with random weights: a model that is there.

That is the newest checkpoint of a finished run, a checkpoint, or any folder in Hugging Face's
layout (config.json, safetensors, tokenizer.json). It gives configuration, weights, tokenizer and
chat template. The vocabulary may have grown by special tokens; their rows begin as the mean of all
others, so that none of them stands out.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tilewright_model import CausalLM, ModelConfig
from tilewright_model.checkpoint import CONFIG_NAME, read_config
from tilewright_train import checkpoint
from tilewright_train.chat_template import TEMPLATE_FILE, read_template
from tilewright_train.errors import InputError, one_line
from tilewright_train.layers import CONFIG_FILE
from tilewright_train.run_directory import RunDirectory
from tilewright_train.tokenizer import TOKENIZER_FILE, load_tokenizer, vocabulary_rows

_ROWS = 8  # a vocabulary grows to a multiple: rows of the logits then begin at 16 bytes

# Rows of an embedding that no token has: released models pad it, phi-1.5 by 905 of 51,200 rows.
_SPARE, _SPARE_SHARE = 1024, 1 / 8

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Start:
    """A folder with a model."""

    folder: Path

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json."""
        return self.folder / TOKENIZER_FILE

    @property
    def chat_template(self) -> str | None:
        """Its template, where it has one, with the tokens that the template calls by a name.

        Raises:
            InputError: A file that should hold it cannot be read.
        """
        file, described = self.folder / TEMPLATE_FILE, self._tokenizer_config()
        source = read_template(file) if file.exists() else described.get("chat_template")
        if isinstance(source, list):  # several by name
            named = {t["name"]: t["template"] for t in source if {"name", "template"} <= set(t)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        return (
            "".join(
                f"{{% set {name} = {json.dumps(text)} %}}"
                for name, text in _named_tokens(described).items()
                if re.search(rf"\b{name}\b", source)
            )
            + source
        )

    def _tokenizer_config(self) -> dict[str, Any]:
        file = self.folder / _TOKENIZER_CONFIG
        if not file.exists():
            return {}
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read ({one_line(error)}): restore it") from None
        return described if isinstance(described, dict) else {}


def find_start(place: Path, *, from_older: bool = False) -> Start:
    """The model of a run, a checkpoint or a folder in Hugging Face's layout.

    Args:
        place: A folder.
        from_older: Where the newest checkpoint of a run is damaged, take the newest that is whole.

    Raises:
        InputError: There is no model, it is damaged, or its tokenizer is missing or does not fit.
    """
    if (place / CONFIG_FILE).is_file():
        found = checkpoint.find(RunDirectory(place).checkpoints, from_older=from_older)
        if found.folder is None:
            raise InputError(f"{place} holds no checkpoint: give a run that has saved one")
        start = Start(found.folder)
    elif (place / CONFIG_NAME).is_file():
        start = Start(place)
        if (place / checkpoint.MANIFEST).exists() and (problem := checkpoint.damage(place)):
            raise InputError(f"{problem}: give another one of the run")
    else:
        raise InputError(
            f"{place} holds no model: give the folder of a run, a checkpoint, or a model in Hugging"
            f" Face's layout ({CONFIG_NAME}, safetensors, {TOKENIZER_FILE})"
        )
    check_tokenizer(load_start_tokenizer(start), _config_of(start), start.folder)
    return start


def load_start_tokenizer(start: Start) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        InputError: There is no tokenizer.json, or it cannot be read.
    """
    if not start.tokenizer_file.is_file():
        raise InputError(
            f"{start.folder} holds no {TOKENIZER_FILE}, the only form of a tokenizer that is read:"
            " save the model's tokenizer there with transformers' save_pretrained"
        )
    return load_tokenizer(start.tokenizer_file)


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Refuse a tokenizer that is not the model's, by its size.

    Raises:
        InputError: Tokens that the model has no row for; or an eighth and more than 1,024 rows of
            the model that no token has, which no padding of a vocabulary makes.
    """
    tokens, rows = vocabulary_rows(tokenizer), config.vocab_size
    spare = rows - tokens
    if spare < 0 or spare > max(_SPARE, _SPARE_SHARE * rows):
        raise InputError(
            f"the tokenizer in {folder} has {tokens:,} entries and the model a vocabulary of"
            f" {rows:,}: they do not fit; put the {TOKENIZER_FILE} there that the model was trained"
            " with"
        )


def saved_config(init: str) -> ModelConfig | None:
    """The configuration of the model that a run begins with; None where it begins from scratch.

    What is wrong with the checkpoint of a run, `find_start` says.

    Raises:
        InputError: A folder of a model whose config.json cannot be used.
    """
    if init in ("scratch", "auto"):
        return None
    place = Path(init)
    is_run = (place / CONFIG_FILE).is_file()
    if is_run:
        place = next(reversed(checkpoint.all_checkpoints(RunDirectory(place).checkpoints)), place)
    try:
        return _config_of(Start(place))
    except InputError:
        if is_run:
            return None
        raise


def _config_of(start: Start) -> ModelConfig:
    try:
        return read_config(start.folder)
    except (OSError, ValueError) as error:
        raise InputError(one_line(error)) from None


def _named_tokens(described: dict[str, Any]) -> dict[str, str]:
    """Special tokens by the name that templates call them by."""
    named = {name: described.get(name) for name in _NAMED_TOKENS}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def grown_vocabulary(rows: int, vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size` entries, `rows` of which are there."""
    return rows if vocab_size <= rows else -(-vocab_size // _ROWS) * _ROWS


def load_start(start: Start, model: CausalLM) -> None:
    """Copy the weights of a checkpoint into a model, which may have more rows of vocabulary.

    Raises:
        InputError: It holds another model.
    """
    try:
        saved = CausalLM.from_pretrained(start.folder)
    except (OSError, ValueError) as error:
        raise InputError(one_line(error)) from None
    wanted = _but_for_vocabulary(model.config)
    if _but_for_vocabulary(saved.config) != wanted or (
        saved.config.vocab_size > model.config.vocab_size
    ):
        raise InputError(f"{start.folder} holds another model than its run's {CONFIG_FILE} says")
    state = saved.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in _VOCABULARY:
            continue
        missing = tensor.shape[0] - state[name].shape[0]
        if missing:
            mean = state[name].mean(dim=0, keepdim=True, dtype=torch.float32).to(state[name])
            state[name] = torch.cat([state[name], mean.expand(missing, -1)])
    model.load_state_dict(state)


def saved_vocabulary(start: Start) -> int:
    """Rows of a model's embedding."""
    return _config_of(start).vocab_size


def _but_for_vocabulary(config: ModelConfig) -> ModelConfig:
    """A configuration without what may differ: entries, and positions where none are learned."""
    learned = config.position_embedding == "learned"
    positions = config.max_position_embeddings if learned else 1
    return replace(config, vocab_size=1, max_position_embeddings=positions)
