"""Small stories, tasks about them and preferences between their endings, drawn from a grammar.

A built-in source: nothing is downloaded, and it is the same on every version of Python, for it
draws from a generator of its own. Sample i of a split is a function of the split and i alone.

- texts: stories with consistent endings, for pretraining.
- instructions: a question and its only right answer, for SFT; with them, some stories to finish,
  whose endings are wrong as often as right.
- preferences: a story, its consistent ending (chosen) and its contradicting one (rejected), which
  hold the same words: no word and no length tells them apart, so DPO has to learn what is meant.

Held out are instances (facts that no training sample asks about in this way) and, apart from them,
whole templates (ways to ask).
"""

from tilewright_train.stories.endings import (
    is_consistent,
    preference,
    story,
    story_to_finish,
)
from tilewright_train.stories.source import StoriesSource
from tilewright_train.stories.tasks import TASKS, Instruction, instruction

__all__ = [
    "TASKS",
    "Instruction",
    "StoriesSource",
    "instruction",
    "is_consistent",
    "preference",
    "story",
    "story_to_finish",
]
