"""What DPO compares the policy with: a model that stays, one that follows, or numbers kept before.

- the run that the policy began as, or another one: frozen, in evaluation mode, without gradients;
- an exponential moving average of the policy's weights (TR-DPO's soft update, Gorbatovski et al.
  2024, arXiv:2404.09656), which checkpoints hold;
- log-probabilities of every pair under either frozen model, computed once and kept in the cache by
  the hashes of the model, the tokenizer and the pairs: the model is not in memory then.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from tilewright_model import CausalLM
from tilewright_model.checkpoint import CONFIG_NAME
from tilewright_train import cache as caching
from tilewright_train.dpo import SequenceLogProbs
from tilewright_train.errors import InputError, writing
from tilewright_train.pairs import PairBatch, PairPlan, PairRows
from tilewright_train.precision import cast_weights
from tilewright_train.samples import SPLITS, Samples
from tilewright_train.start import Start, grown_vocabulary, load_start
from tilewright_train.tokenizer import load_tokenizer

_TOGETHER = 32  # pairs
_FACTS = "facts.json"


class Reference(Protocol):
    """Log-probabilities that do not depend on what is being learned."""

    def log_probs(self, batch: PairBatch) -> torch.Tensor:
        """[S] float32, without gradient."""
        ...

    def updated(self) -> None:
        """The policy has changed."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold; empty for one that never changes."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with the tensors of a checkpoint."""
        ...


class FrozenReference:
    """A model that stays as it is.

    Args:
        model: On its device.
    """

    def __init__(self, model: CausalLM) -> None:
        self.scorer = SequenceLogProbs(model).eval().requires_grad_(False)

    @torch.no_grad()
    def log_probs(self, batch: PairBatch) -> torch.Tensor:
        """Of its own forward pass."""
        return self.scorer(**batch.inputs)[0]

    def updated(self) -> None:
        """It does not follow."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """None: it is read again from where it came."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to load."""


class MovingReference(FrozenReference):
    """An average of the policy's weights: decay · average + (1 - decay) · policy at every step.

    Args:
        model: Where the average begins, on its device.
        policy: What is trained, without wrappers.
        decay: 1 would never move.
        wait: Returns when the policy's weights are there after a step.
    """

    def __init__(
        self, model: CausalLM, policy: CausalLM, decay: float, wait: Callable[[], None]
    ) -> None:
        super().__init__(model)
        self._named = dict(model.named_parameters())
        # In float32, whatever the weights are: steps of a hundredth are lost in 16 bits.
        self._averages = [p.detach().float() for p in self._named.values()]
        self._policy = policy
        self._decay = decay
        self._wait = wait

    @torch.no_grad()
    def updated(self) -> None:
        """Follow the policy."""
        self._wait()
        for average, parameter in zip(self._averages, self._policy.parameters(), strict=True):
            average.lerp_(parameter.float(), 1 - self._decay)
        self._follow()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average, by the parameters' names."""
        return dict(zip(self._named, self._averages, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy it back."""
        for name, average in zip(self._named, self._averages, strict=True):
            average.copy_(tensors[name])
        self._follow()

    def _follow(self) -> None:
        """Give the model the averages, where they are not its weights themselves."""
        for parameter, average in zip(self._named.values(), self._averages, strict=True):
            if parameter.dtype != average.dtype:
                parameter.copy_(average)


class KnownReference:
    """Log-probabilities that come with the batch."""

    def log_probs(self, batch: PairBatch) -> torch.Tensor:
        """Those of the batch."""
        assert batch.reference is not None
        return batch.reference

    def updated(self) -> None:
        """They do not change."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """None: the cache holds them."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to load."""


def model_sha256(start: Start) -> str:
    """Of the names and bytes of a checkpoint's configuration and weights.

    The same weights with another rope_theta or rms_norm_eps are another model.
    """
    weights = sorted(start.folder.glob("model*.safetensors"))
    return _sha256([start.folder / CONFIG_NAME, *weights])


def check_same_tokens(start: Start, tokenizer_file: Path) -> None:
    """Refuse a reference with other tokens than the policy's, which may have more of them.

    Raises:
        InputError: A token has another number, or is not among the policy's.
    """
    theirs = load_tokenizer(start.tokenizer_file).get_vocab()
    ours = load_tokenizer(tokenizer_file).get_vocab()
    different = next((token for token, n in theirs.items() if ours.get(token) != n), None)
    if different is not None:
        raise InputError(
            f"the tokenizer of --reference {start.folder} is not the policy's (token"
            f" {different!r} differs): log-probabilities compare over the same tokens only; give a"
            " run with the same tokenizer"
        )


def load_reference(
    start: Start, vocab_size: int, positions: int, precision: str, device: torch.device
) -> CausalLM:
    """The model of a checkpoint, with rows and positions for so many tokens.

    Args:
        start: The checkpoint.
        vocab_size: Entries of the policy's tokenizer.
        positions: That the policy has.
        precision: Of the run; weights are stored as the policy's are.
        device: Where it computes.
    """
    saved = CausalLM.from_pretrained(start.folder).config
    shape = replace(
        saved,
        vocab_size=grown_vocabulary(saved.vocab_size, vocab_size),
        max_position_embeddings=max(saved.max_position_embeddings, positions),
    )
    model = CausalLM(shape)
    load_start(start, model)
    cast_weights(model, precision)
    return model.to(device)


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Pairs of one source of which log-probabilities are wanted."""

    splits: Sequence[tuple[Samples, PairPlan]]
    """Of training and validation."""
    sha256: str
    """Of their tokens."""


def precompute(
    wanted: Precomputed,
    make_model: Callable[[], CausalLM],
    depends_on: Mapping[str, object],
    *,
    padding: int,
    autocast: torch.autocast,
    cache: Path,
) -> tuple[Path, bool]:
    """Make sure that the cache holds a source's log-probabilities.

    Args:
        wanted: The pairs.
        make_model: Gives the reference, where it is needed.
        depends_on: What they depend on besides the tokens, as JSON.
        padding: Fills shorter sequences up.
        autocast: Precision of the forward pass.
        cache: The cache's folder.

    Returns:
        The entry's folder, and whether it was there already.

    Raises:
        OSError: The cache cannot be written.
    """
    sizes = {s: 8 * plan.pairs for s, (_, plan) in zip(SPLITS, wanted.splits, strict=True)}

    def build(folder: Path) -> None:
        reference = FrozenReference(make_model())
        device = next(reference.scorer.parameters()).device
        for split, (samples, plan) in zip(SPLITS, wanted.splits, strict=True):
            rows = PairRows(samples, plan, seed=None, padding=padding)
            # Longest first: the longest batch allocates the most, and little is padded.
            order = plan.lengths.amax(dim=1).argsort(descending=True, stable=True)
            values = torch.empty(plan.pairs, 2)
            for numbers in order.split(_TOGETHER):
                batch = rows.read(numbers.tolist()).to(device)
                assert isinstance(batch, PairBatch)
                with autocast:
                    log_probs = reference.log_probs(batch)
                values[numbers] = log_probs.float().cpu().view(2, -1).T
            with writing(folder.parent, caching.REMEDY), _file(folder, split).open("wb") as stream:
                array("f", values.flatten().tolist()).tofile(stream)
        with writing(folder.parent, caching.REMEDY):
            facts = {"sha256": _sha256([_file(folder, split) for split in SPLITS])}
            (folder / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def is_whole(folder: Path) -> bool:
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            files = {_file(folder, split): size for split, size in sizes.items()}
            fit = all(file.stat().st_size == size for file, size in files.items())
            return fit and facts["sha256"] == _sha256(files)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    key = {**depends_on, "pairs": wanted.sha256}
    return caching.entry(cache, "reference", key, build, is_whole)


def load_precomputed(folder: Path, split: str) -> torch.Tensor:
    """[P, 2] float32 that `precompute` kept."""
    values = array("f", _file(folder, split).read_bytes())
    return torch.tensor(values).view(-1, 2)


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.log_probs.float32"


def _sha256(files: Iterable[Path]) -> str:
    """Of the names and bytes of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0".encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
