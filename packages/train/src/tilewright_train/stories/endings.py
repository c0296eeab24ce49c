"""Stories with an ending that agrees with them, and one that contradicts them in the same words.

Two people get two things, each of a colour. The ending says which coloured things there were in the
end; the contradicting one exchanges the things. The two endings hold the same words in another
order, so with a tokenizer that splits at spaces they have the same tokens, and neither is likelier
for its words or its length.
"""

from typing import NamedTuple

from tilewright_train.records import Conversation, Message, Preference
from tilewright_train.stories.drawing import Draw, is_held_out
from tilewright_train.stories.words import COLOURS, NAMES, PLACES, THINGS

_REQUESTS = ("Finish the story: {}", "How does this end? {}", "{} What happened then?")
_MEETINGS = ("{0} and {1} met in the {2}.", "{0} met {1} in the {2}.", "One day {0} saw {1}.")
_GETTING = ("{} found a {} {}.", "{} got a {} {}.", "{} took a {} {}.")
_ENDINGS = (
    "They went home with the {} {} and the {} {}.",
    "In the end they had the {} {} and the {} {}.",
    "They kept the {} {} and the {} {}.",
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


def _plot(draw: Draw, *, held_out: bool) -> _Plot:
    names, colours, things = _cast(draw)
    while is_held_out("plot", *names, *colours, *things) != held_out:
        names, colours, things = _cast(draw)
    meeting = draw.choice(_MEETINGS).format(*names, draw.choice(PLACES))
    getting = [
        draw.choice(_GETTING).format(*said) for said in zip(names, colours, things, strict=True)
    ]
    # The ending begins with either of the two, so that its order tells nothing.
    (one, its), (other, others) = draw.sample(list(zip(colours, things, strict=True)), 2)
    ending = draw.choice(_ENDINGS)
    return _Plot(
        " ".join([meeting, *getting]),
        ending.format(one, its, other, others),
        ending.format(one, others, other, its),
    )


def _cast(draw: Draw) -> tuple[list[str], list[str], list[str]]:
    return draw.sample(NAMES, 2), draw.sample(COLOURS, 2), draw.sample(THINGS, 2)
