"""The stories as a source of records."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilewright_train.config import STORIES
from tilewright_train.records import Kind, Record
from tilewright_train.stories.endings import preference, story, story_to_finish
from tilewright_train.stories.tasks import instruction

if TYPE_CHECKING:
    from tilewright_train.sources import Reading

_VERSION = 1  # of the grammar: another one is other data

_TRAINING: dict[Kind, int] = {"text": 40_000, "conversation": 24_000, "preference": 8_000}
_VALIDATION = 1_000
_TASKS_PER_STORY = 3  # of four conversations three are tasks, and one is a story to finish


class StoriesSource:
    """Records of the grammar; the split is its own, by instance, whatever fraction is asked for."""

    name = STORIES
    size = 40 * sum(_TRAINING.values())
    sha256 = hashlib.sha256(f"{STORIES} {_VERSION}".encode()).hexdigest()

    def records(self, kind: Kind, reading: "Reading") -> Iterator[tuple[bool, Record]]:
        """All samples of training, then those that are held out."""
        for is_validation, count in ((False, _TRAINING[kind]), (True, _VALIDATION)):
            split = "instances" if is_validation else "train"
            for number in range(count):
                yield is_validation, self._record(kind, split, number)

    def describe(self) -> str:
        """One line for people."""
        return f"{STORIES}, a grammar of small stories and tasks, version {_VERSION}"

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"name": self.name, "version": _VERSION, "sha256": self.sha256}

    def _record(self, kind: Kind, split: Any, number: int) -> Record:
        if kind == "text":
            return story(split, number)
        if kind == "preference":
            return preference(split, number)
        if number % (_TASKS_PER_STORY + 1) == _TASKS_PER_STORY:
            return story_to_finish(split, number)
        return instruction(split, number).conversation
