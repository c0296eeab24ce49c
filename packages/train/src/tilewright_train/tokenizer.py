"""A byte-level BPE trained on a bounded sample of the corpus, by the `tokenizers` library.

Splitting and byte alphabet are GPT-2's, so every text can be encoded and comes back unchanged.
Training is deterministic: the same sample and size give the same bytes of `tokenizer.json`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tilewright_train.checkpoint import all_checkpoints
from tilewright_train.errors import InputError
from tilewright_train.run_directory import RunDirectory

END_OF_TEXT = "<|endoftext|>"
"""The only special token, number 0; it stands behind every document."""

FEWEST_ENTRIES = 257
"""Of a vocabulary: the end token and every byte."""

DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""What ends a document in tokenizers made elsewhere; the first that one has counts. Not what it
calls its eos_token: where a model chats, that may be the end of a turn."""

TOKENIZER_FILE = "tokenizer.json"

_PIECE = 1 << 16  # characters; a longer document is sampled and encoded piece by piece
_LINE = "a\n"  # the end of a piece
_BATCH = 1 << 22  # characters that are encoded together, so that all cores have work


def sample_budget(vocab_size: int) -> int:
    """Characters to train a vocabulary on: 1,000 for each entry, at most 16 million.

    The standard library (12 MB) with 4,096 entries trains in 1 s on two cores, with 32,768 in 3 s;
    more text changes few of the merges and costs in proportion.
    """
    return min(1000 * vocab_size, 16_000_000)


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most 65,536 characters, cut behind a line where there is one."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def sample(documents: Iterable[str], size: int, budget: int) -> Iterator[str]:
    """Pieces spread evenly over the documents, `budget` characters in all.

    Args:
        documents: The training documents.
        size: About how many characters they have; a wrong figure costs evenness, not the bound.
        budget: Characters to take.
    """
    seen = taken = 0
    for document in documents:
        for piece in pieces(document):
            seen += len(piece)
            if taken >= budget:
                return
            if taken <= budget * seen / max(size, 1):
                taken += len(piece)
                yield piece


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a vocabulary of at most `vocab_size` entries: the end token, 256 bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # text that spells the end token stays text
    return tokenizer


def tokenizer_file(place: Path) -> Path:
    """The tokenizer.json that `place` is, that lies in it, or that a run there has saved last."""
    if not place.is_dir():
        return place
    saved = all_checkpoints(RunDirectory(place).checkpoints)
    own = place / TOKENIZER_FILE
    return saved[-1] / TOKENIZER_FILE if saved and not own.exists() else own


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        InputError: It is not there or cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise InputError(f"{path} cannot be read as a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()  # a file may ask for both, for somebody else's batches
    tokenizer.no_padding()
    return tokenizer


def end_token(tokenizer: Tokenizer) -> int:
    """Number of the token that stands behind every document.

    Raises:
        InputError: The tokenizer has none; it was made elsewhere.
    """
    numbers = (tokenizer.token_to_id(text) for text in DOCUMENT_ENDS)
    found = next((number for number in numbers if number is not None), None)
    if found is None:
        raise InputError(
            f"the tokenizer has no token that ends a document ({', '.join(DOCUMENT_ENDS)}): add one"
            " of them to it, or give another --tokenizer"
        )
    return found


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """Rows of an embedding that the tokenizer's numbers need: the highest and one more."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def encode(
    tokenizer: Tokenizer, documents: Iterable[tuple[bool, str]]
) -> Iterator[tuple[bool, list[int], bool]]:
    """Tokens of every document with the end token behind it, many documents at a time.

    Args:
        tokenizer: From `train_tokenizer` or `load_tokenizer`.
        documents: (mark, text); the mark is handed through.

    Yields:
        (mark, tokens of a document or of a piece of a long one, whether the document ends).
    """
    end = [end_token(tokenizer)]
    before = _before_rest(tokenizer)
    waiting: list[_Part] = []
    characters = 0
    for mark, document in documents:
        parts = list(pieces(document))
        waiting += [_Part(mark, p, i > 0, i == len(parts) - 1) for i, p in enumerate(parts)]
        characters += len(document)
        if characters >= _BATCH:
            yield from _encode_parts(tokenizer, waiting, end, before)
            waiting, characters = [], 0
    yield from _encode_parts(tokenizer, waiting, end, before)


class _Part(NamedTuple):
    """A document, or a piece of a long one."""

    mark: bool
    text: str
    goes_on: bool
    """Whether the document has begun before it."""
    is_last: bool


def _before_rest(tokenizer: Tokenizer) -> str:
    """What a piece that goes on is encoded behind; empty where that makes no difference.

    Many tokenizers made elsewhere put a space before every text, which does not belong there.
    """
    whole, first, rest = (_plain(tokenizer, text) for text in (f"{_LINE}b", _LINE, "b"))
    return "" if whole == first + rest else _LINE


def _encode_parts(
    tokenizer: Tokenizer, parts: list[_Part], end: list[int], before: str
) -> Iterator[tuple[bool, list[int], bool]]:
    """Encode on all cores."""
    texts = [before + part.text if part.goes_on else part.text for part in parts]
    known = _plain(tokenizer, before)
    for part, made in zip(
        parts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
    ):
        ids = made.ids
        if part.goes_on and before:
            # Where a token reaches into the piece, its prefix is the lesser evil.
            is_apart = ids[: len(known)] == known
            ids = ids[len(known) :] if is_apart else _plain(tokenizer, part.text)
        yield part.mark, ids + end if part.is_last else ids, part.is_last


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of `tokens`; an end token shows as itself."""
    return tokenizer.decode(tokens, skip_special_tokens=False)
