"""A trained model for commands that use one: which it is, and where it computes."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tilewright_train.config import PretrainConfig
from tilewright_train.errors import InputError, one_line
from tilewright_train.layers import CONFIG_FILE, read_toml

if TYPE_CHECKING:  # a mistyped flag does not wait for torch
    import torch
    from tokenizers import Tokenizer

    from tilewright_model import CausalLM
    from tilewright_train.chat_template import ChatTemplate
    from tilewright_train.start import Start


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model, and what computes it."""

    model: str = "auto"
    """The folder of a run, of a checkpoint, or of a model in Hugging Face's layout; «auto» for the
    run in --out that was written last."""
    out: Path = Path("runs")
    """Folder of all runs."""
    device: str | None = None
    """«cpu», «cuda» or «cuda:1». Default: the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic. Default: bf16 on a GPU that has it, else fp32."""
    backend: str | None = None
    """«auto», «triton» or «torch» for the operators of tilewright_kernels. Default: what
    TILEWRIGHT_BACKEND says, else auto."""
    threads: int | None = None
    """CPU threads."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that has been loaded."""

    start: "Start"
    """Its folder."""
    model: "CausalLM"
    """On its device, in evaluation mode."""
    tokenizer: "Tokenizer"
    """Fits the model."""
    template: "ChatTemplate | None"
    """How it chats, where its folder says so."""
    config: PretrainConfig | None
    """Options of the run that made it; None for a model made elsewhere."""
    is_bf16: bool
    """Whether products are to be in bf16."""

    @property
    def device(self) -> "torch.device":
        """Where the model is."""
        return self.model.embed_tokens.weight.device


@contextlib.contextmanager
def opened(choice: ModelChoice, *, cast: bool) -> Iterator[Trained]:
    """Load a model; threads and backends are the command's until the block ends.

    Args:
        choice: Which.
        cast: With bf16, hold the weights in it; else they stay float32, for autocast.

    Raises:
        InputError: There is no such model, device or backend.
    """
    with as_input_errors():  # tilewright_kernels reads TILEWRIGHT_BACKEND when it is imported
        import torch

        from tilewright_model import CausalLM
        from tilewright_train import machine
        from tilewright_train.chat_template import ChatTemplate
        from tilewright_train.start import find_start, load_start_tokenizer

    if choice.threads is not None and choice.threads < 1:
        raise InputError(f"threads {choice.threads} is out of range: it must be at least 1")
    device, _ = machine.choose_device(choice.device)
    is_bf16 = choice.precision == "bf16" or (
        choice.precision == "auto" and machine.supports_bf16(device)
    )
    place = find_model(choice)
    start = find_start(place)
    backend = choice.backend or os.environ.get("TILEWRIGHT_BACKEND", "").strip() or "auto"
    threads = choice.threads or machine.choose_threads(1)[0]
    with contextlib.ExitStack() as stack:
        with as_input_errors():
            stack.enter_context(
                machine.configured(
                    threads=threads, deterministic=False, backend=backend, device=device
                )
            )
            dtype = torch.bfloat16 if is_bf16 and cast else torch.float32
            model = CausalLM.from_pretrained(start.folder, device=device, dtype=dtype)
        yield Trained(
            start=start,
            model=model.eval(),
            tokenizer=load_start_tokenizer(start),
            template=ChatTemplate(source) if (source := start.chat_template) else None,
            config=_config_of_run(start.folder),
            is_bf16=is_bf16,
        )


def find_model(choice: ModelChoice) -> Path:
    """The folder that was asked for, or the run that was written last.

    Raises:
        InputError: No run has saved a checkpoint.
    """
    if choice.model != "auto":
        return Path(choice.model)
    saved = list(choice.out.glob("*/checkpoints/step-*/config.json"))
    if not saved:
        raise InputError(
            f"no run in {choice.out} has saved a checkpoint: run train-pretrain first, or give"
            " --model a folder"
        )
    return max(saved, key=lambda file: file.stat().st_mtime_ns).parents[2]


def exit_status(action: Callable[[], None]) -> int:
    """Run a command; what the user can mend is one line on stderr and 2."""
    try:
        action()
    except BrokenPipeError:
        return 141  # whoever read the lines has gone
    except (InputError, OSError, FloatingPointError) as error:  # the last: logits not finite
        return _complain(one_line(error))
    except UnicodeDecodeError as error:
        return _complain(f"the standard input is not UTF-8 text ({one_line(error)}): convert it")
    except (MemoryError, RuntimeError) as error:
        from tilewright_train.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _complain(
            f"out of memory ({one_line(error)}): give --precision bf16, another --device, a smaller"
            " --seq-len or --max-new-tokens, or a smaller model"
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def as_input_errors() -> Iterator[None]:
    """While options are looked at, a ValueError or TypeError is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _config_of_run(checkpoint: Path) -> PretrainConfig | None:
    """Options of the run that a checkpoint is of: run/checkpoints/step-000120."""
    file = checkpoint.absolute().parent.parent / CONFIG_FILE
    return read_toml(file, None) if file.is_file() else None
