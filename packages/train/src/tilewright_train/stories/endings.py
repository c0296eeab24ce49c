"""Stories with an ending that agrees with them, and one that contradicts them in the same words.

Two people get a thing each. The ending says what they had in the end and what not: one thing of the
story, and one that is not in it. The contradicting one exchanges the two. So the two endings hold
the same words in another order: with a tokenizer that splits at spaces they have the same tokens,
and neither is likelier for its words or its length.
"""

import re
from typing import NamedTuple

from tilewright_train.records import Conversation, Message, Preference
from tilewright_train.stories.drawing import Draw, is_held_out
from tilewright_train.stories.words import COLOURS, NAMES, PLACES, THINGS

_REQUESTS = ("Finish the story: {}", "How does this end? {}", "{} What happened then?")
_MEETINGS = ("{0} and {1} met in the {2}.", "{0} met {1} in the {2}.", "One day {0} saw {1}.")
_GETTING = ("{} found a {} {}.", "{} got a {} {}.", "{} took a {} {}.")
_ENDINGS = (
    "In the end they had the {} and no {}.",
    "They went home with the {}, not with the {}.",
    "They kept the {} and had no {}.",
)


class _Plot(NamedTuple):
    beginning: str
    consistent: str
    contradicting: str


def story(split: str, number: int) -> str:
    """Story `number`, with its consistent ending.

    Args:
        split: «train» or «instances».
        number: From 0.
    """
    plot = _plot(Draw("story", split, number), held_out=split == "instances")
    return f"{plot.beginning} {plot.consistent}"


def story_to_finish(split: str, number: int) -> Conversation:
    """A request to finish a story, and an ending that is consistent in half of the cases."""
    draw = Draw("finish", split, number)
    plot = _plot(draw, held_out=split == "instances")
    ending = plot.consistent if draw.below(2) else plot.contradicting
    request = draw.choice(_REQUESTS).format(plot.beginning)
    return Conversation((Message("user", request), Message("assistant", ending)))


def preference(split: str, number: int) -> Preference:
    """Pair `number`: a request to finish a story, its consistent and its contradicting ending."""
    draw = Draw("preference", split, number)
    plot = _plot(draw, held_out=split == "instances")
    return Preference(
        (Message("user", draw.choice(_REQUESTS).format(plot.beginning)),),
        (Message("assistant", plot.consistent),),
        (Message("assistant", plot.contradicting),),
    )


def is_consistent(beginning: str, ending: str) -> bool:
    """Whether `ending`, whoever wrote it, is one of the grammar's and agrees with the story.

    Args:
        beginning: The story, or a request that holds it.
        ending: What is to follow.
    """
    told = set(re.findall(r"\w+", beginning))
    for template in _ENDINGS:
        pattern = re.escape(template).replace(re.escape("{}"), r"(\w+)")
        if match := re.fullmatch(pattern, ending.strip()):
            there, absent = match.groups()
            are_things = there in THINGS and absent in THINGS
            return are_things and there in told and absent not in told
    return False


def _plot(draw: Draw, *, held_out: bool) -> _Plot:
    names, things = draw.sample(NAMES, 2), draw.sample(THINGS, 3)
    while is_held_out("plot", *names, *things) != held_out:
        names, things = draw.sample(NAMES, 2), draw.sample(THINGS, 3)
    meeting = draw.choice(_MEETINGS).format(*names, draw.choice(PLACES))
    colours = draw.sample(COLOURS, 2)
    getting = [
        draw.choice(_GETTING).format(*said) for said in zip(names, colours, things[:2], strict=True)
    ]
    there, absent = things[draw.below(2)], things[2]
    ending = draw.choice(_ENDINGS)
    return _Plot(
        " ".join([meeting, *getting]),
        ending.format(there, absent),
        ending.format(absent, there),
    )
