"""Which options of a command have its data encoded again, and which do not."""

import io
import os
from pathlib import Path

import pytest

from tilewright_train.layers import parse
from tilewright_train.pretraining import run


def encoded_anew(flags: list[str], *more: str) -> bool:
    """Whether a run of one step writes shards, by what it says and by the files."""
    cache = Path(flags[flags.index("--cache-dir") + 1])

    def shards() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in cache.glob("text-*/*")}

    before, printed = shards(), io.StringIO()
    run(parse([*flags, "--steps", "1", *more]), printed)
    after = shards()
    assert all(after[name] == time for name, time in before.items())  # none is written over
    said = "since an earlier run" not in printed.getvalue()
    assert said == (len(after) > len(before))
    return said


def test_shards_are_written_again_when_what_they_hold_changes_and_only_then(
    tiny_flags: list[str], corpus_file: Path
) -> None:
    assert encoded_anew(tiny_flags)
    for same in (
        [],
        ["--packing", "best_fit"],
        ["--document-mask", "on", "--batch-size", "2", "--seq-len", "12", "--seed", "4"],
    ):
        assert not encoded_anew(tiny_flags, *same), same
    os.utime(corpus_file)
    assert not encoded_anew(tiny_flags)
    for other in (
        ["--vocab-size", "260"],
        ["--validation-fraction", "0.2"],
        ["--on-bad-line", "skip"],
    ):
        assert encoded_anew(tiny_flags, *other), other
    with corpus_file.open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert encoded_anew(tiny_flags)
    assert not encoded_anew(tiny_flags)


def test_a_shard_that_was_damaged_is_named_or_written_again(tiny_flags: list[str]) -> None:
    assert encoded_anew(tiny_flags)
    cache = Path(tiny_flags[tiny_flags.index("--cache-dir") + 1])
    (tokens,) = cache.glob("text-*/train.tokens.int32")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-4])  # a size that the facts do not say: an entry that is not whole
    run(parse([*tiny_flags, "--steps", "1"]), io.StringIO())
    assert tokens.read_bytes() == whole
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="is damaged: remove it and start again"):
        run(parse([*tiny_flags, "--steps", "1"]), io.StringIO())
