"""Tasks with one right answer: to look up in what was said, to repeat, to pick, to count.

What a task asks about is drawn first (the instance), the words that ask (the template) after it.
Every task has templates to train on and one that is held out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tilewright_train.records import Conversation, Message
from tilewright_train.stories.drawing import Draw, Split, is_held_out
from tilewright_train.stories.words import COLOURS, NUMBERS, THINGS


class Instruction(NamedTuple):
    """A question and its answer."""

    task: str
    """A key of `TASKS`."""
    question: str
    """What the user says."""
    answer: str
    """The only right reply."""

    @property
    def conversation(self) -> Conversation:
        """As two turns."""
        return Conversation((Message("user", self.question), Message("assistant", self.answer)))


class Instance(NamedTuple):
    """What is asked about, before it is put into words."""

    fields: Mapping[str, str]
    """Fill the template."""
    answer: str
    """The right reply."""


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    draw: Callable[[Draw], Instance]
    """Draws an instance."""
    templates: tuple[str, ...]
    """Ways to ask; the last one is held out."""


def instruction(split: Split, number: int) -> Instruction:
    """Instruction `number` of a split.

    Args:
        split: «train», or one of the two that are held out.
        number: From 0.
    """
    draw = Draw("instruction", split, number)
    name = draw.choice(tuple(TASKS))
    task = TASKS[name]
    instance = task.draw(draw)
    while is_held_out(name, *instance.fields.values(), instance.answer) != (split == "instances"):
        instance = task.draw(draw)
    seen, unseen = task.templates[:-1], task.templates[-1]
    template = unseen if split == "templates" else draw.choice(seen)
    return Instruction(name, template.format(**instance.fields), instance.answer)


def _described(draw: Draw, most: int) -> list[tuple[str, str]]:
    """Two or more things, each of a colour of its own."""
    count = 2 + draw.below(most - 1)
    return list(zip(draw.sample(COLOURS, count), draw.sample(THINGS, count), strict=True))


def _listed(described: list[tuple[str, str]]) -> str:
    *most, last = (f"a {colour} {thing}" for colour, thing in described)
    return f"{', '.join(most)} and {last}"


def _colour(draw: Draw) -> Instance:
    described = _described(draw, 3)
    colour, thing = draw.choice(described)
    return Instance({"facts": _listed(described), "thing": thing}, colour)


def _thing(draw: Draw) -> Instance:
    described = _described(draw, 3)
    colour, thing = draw.choice(described)
    return Instance({"facts": _listed(described), "colour": colour}, f"the {colour} {thing}")


def _words(draw: Draw, least: int, most: int) -> list[str]:
    return draw.sample(THINGS, least + draw.below(most - least + 1))


def _repeat(draw: Draw) -> Instance:
    """Words, or things with their colours."""
    words = _listed(_described(draw, 3)) if draw.below(2) else " ".join(_words(draw, 2, 5))
    return Instance({"words": words}, words)


def _swap(draw: Draw) -> Instance:
    """Two words, or two things with their colours."""
    if draw.below(2):
        described = _described(draw, 2)
        return Instance({"words": _listed(described)}, _listed(described[::-1]))
    one, other = draw.sample(THINGS, 2)
    return Instance({"words": f"{one} {other}"}, f"{other} {one}")


def _first(draw: Draw) -> Instance:
    words = _words(draw, 2, 5)
    return Instance({"words": " ".join(words)}, words[0])


def _last(draw: Draw) -> Instance:
    words = _words(draw, 2, 5)
    return Instance({"words": " ".join(words)}, words[-1])


def _count(draw: Draw) -> Instance:
    words = _words(draw, 1, 5)
    return Instance({"words": " ".join(words)}, NUMBERS[len(words) - 1])


TASKS: Mapping[str, Task] = {
    "colour": Task(
        _colour,
        ("There is {facts}. What colour is the {thing}?",
         "I see {facts}. Which colour has the {thing}?",
         "What colour is the {thing}? There is {facts}.",
         "Here is {facts}. Name the colour of the {thing}."),
    ),
    "thing": Task(
        _thing,
        ("There is {facts}. What is {colour}?", "I see {facts}. Which thing is {colour}?",
         "What is {colour}? There is {facts}.", "Here is {facts}. Name the {colour} thing."),
    ),
    "repeat": Task(
        _repeat,
        ("Repeat: {words}", "Say this again: {words}", "Repeat these words: {words}",
         "Copy: {words}"),
    ),
    "first": Task(
        _first,
        ("First word: {words}", "Say the first word: {words}",
         "Which word comes first? {words}", "What is the first word of this? {words}"),
    ),
    "last": Task(
        _last,
        ("Last word: {words}", "Say the last word: {words}", "Which word comes last? {words}",
         "What is the last word of this? {words}"),
    ),
    "swap": Task(
        _swap,
        ("Swap: {words}", "Say these the other way round: {words}", "Turn around: {words}",
         "Swap these two words: {words}"),
    ),
    "count": Task(
        _count,
        ("Count: {words}", "How many words? {words}", "Say how many words: {words}",
         "How many words are these? {words}"),
    ),
}  # fmt: skip
"""Every task by its name."""
