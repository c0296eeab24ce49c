"""What a run begins with when it does not begin with random weights: a run that is finished.

Its newest checkpoint gives weights, tokenizer and chat template. The vocabulary may have grown by
special tokens; their rows begin as the mean of all others, so that none of them stands out.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tilewright_model import CausalLM, ModelConfig
from tilewright_train import checkpoint
from tilewright_train.chat_template import TEMPLATE_FILE, read_template
from tilewright_train.errors import InputError
from tilewright_train.layers import CONFIG_FILE
from tilewright_train.run_directory import RunDirectory
from tilewright_train.tokenizer import TOKENIZER_FILE

_ROWS = 8  # a vocabulary grows to a multiple: rows of the logits then begin at 16 bytes


@dataclass(frozen=True)
class Start:
    """A checkpoint."""

    folder: Path

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json."""
        return self.folder / TOKENIZER_FILE

    @property
    def chat_template(self) -> str | None:
        """Its template, where it has one."""
        file = self.folder / TEMPLATE_FILE
        return read_template(file) if file.exists() else None


def find_start(run: Path, *, from_older: bool = False) -> Start:
    """The newest checkpoint of a run.

    Args:
        run: Its folder.
        from_older: Where the newest is damaged, take the newest that is whole.

    Raises:
        InputError: There is none, or it is damaged.
    """
    found = checkpoint.find(RunDirectory(run).checkpoints, from_older=from_older)
    if found.folder is None:
        raise InputError(f"{run} holds no checkpoint: give --init a run that has saved one")
    return Start(found.folder)


def grown_vocabulary(rows: int, vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size` entries, `rows` of which are there."""
    return rows if vocab_size <= rows else -(-vocab_size // _ROWS) * _ROWS


def load_start(start: Start, model: CausalLM) -> None:
    """Copy the weights of a checkpoint into a model, which may have more rows of vocabulary.

    Raises:
        InputError: It holds another model.
    """
    saved = CausalLM.from_pretrained(start.folder)
    wanted = _but_for_vocabulary(model.config)
    if _but_for_vocabulary(saved.config) != wanted or (
        saved.config.vocab_size > model.config.vocab_size
    ):
        raise InputError(f"{start.folder} holds another model than its run's {CONFIG_FILE} says")
    state = saved.state_dict()
    for name, tensor in model.state_dict().items():
        missing = tensor.shape[0] - state[name].shape[0]
        if missing:
            mean = state[name].mean(dim=0, keepdim=True)
            state[name] = torch.cat([state[name], mean.expand(missing, -1)])
    model.load_state_dict(state)


def saved_vocabulary(start: Start) -> int:
    """Rows of a checkpoint's embedding."""
    return CausalLM.from_pretrained(start.folder).config.vocab_size


def _but_for_vocabulary(config: ModelConfig) -> ModelConfig:
    """A configuration without what may differ: entries, and positions, which rotation computes."""
    return replace(config, vocab_size=1, max_position_embeddings=1)
