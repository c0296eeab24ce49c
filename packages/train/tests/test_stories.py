"""The grammar: the same everywhere, held-out apart, answers right, pairs told by meaning alone."""

import hashlib
import re
from collections import Counter

import pytest

from tilewright_train.record_files import SkippedLines
from tilewright_train.records import Conversation, Kind, Preference, text_of
from tilewright_train.sources import Reading, open_source
from tilewright_train.stories import (
    TASKS,
    Instruction,
    instruction,
    is_consistent,
    preference,
    story,
    story_to_finish,
)
from tilewright_train.stories.drawing import Draw
from tilewright_train.stories.words import COLOURS, NAMES, NUMBERS, PLACES, THINGS

READING = Reading(validation_fraction=0.05, on_bad_line="error", skipped=SkippedLines())
TRAIN = [instruction("train", number) for number in range(3000)]


def test_the_generator_is_splitmix64() -> None:
    # The first outputs from state 0 as published with the algorithm: below(2**64) is the output.
    draw = Draw()
    draw._state = 0
    assert [draw.below(1 << 64) for _ in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


def test_the_samples_are_the_same_on_every_python() -> None:
    parts = (
        text for number in range(50)
        for text in (
            story("train", number),
            text_of(story_to_finish("train", number)),
            text_of(preference("train", number)),
            *instruction("templates", number),
        )
    )  # fmt: skip
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    assert digest[:16] == "2882f1e9f22eeaa7"


def test_no_word_stands_in_two_lists() -> None:
    words = [*NAMES, *THINGS, *COLOURS, *PLACES, *NUMBERS]
    assert len(set(words)) == len(words)


def solve(task: str, question: str) -> str:
    """The answer, worked out from the words of the question alone."""
    words = re.findall(r"[a-z]+", re.split(r"[:?] ", question)[-1])
    listed = [word for word in words if word in THINGS]
    described = re.findall(r"a (\w+) (\w+)", question)
    asked = re.sub(r"(There|Here) is a .*?\.|I see a .*?\.", "", question)
    known = {*THINGS, *COLOURS}
    key = next((word for word in re.findall(r"\w+", asked) if word in known), "")
    match task:
        case "colour":
            return {thing: colour for colour, thing in described}[key]
        case "thing":
            return f"the {key} {dict(described)[key]}"
        case "repeat":
            return re.split(r"[:?] ", question)[-1]
        case "first":
            return listed[0]
        case "last":
            return listed[-1]
        case "swap":
            named = [f"a {colour} {thing}" for colour, thing in described]
            return " and ".join(reversed(named)) or " ".join(reversed(listed))
    return NUMBERS[len(listed) - 1]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    drawn = [*TRAIN[:1500], *(instruction("templates", number) for number in range(300))]
    asked = [item for item in drawn if item.task == task]
    assert len(asked) > 100
    assert [solve(task, item.question) for item in asked] == [item.answer for item in asked]


def content(item: Instruction) -> tuple[str, ...]:
    """What is asked about, whatever words ask."""
    facts = re.findall(r"a \w+ \w+", item.question)
    order = re.findall(r"[a-z]+", re.split(r"[:?] ", item.question)[-1])
    return (item.task, item.answer, *(facts or order))


def test_few_held_out_instances_are_trained_on_in_another_order() -> None:
    """As docs/data.md has it, of all that train-sft reads: three of four samples are tasks."""
    sets = {
        split: Counter(
            (item.task, *sorted(content(item)))
            for item in (instruction(split, n) for n in range(count) if n % 4 < 3)
        )
        for split, count in (("train", 24_000), ("instances", 1000))
    }  # fmt: skip
    held_out = sets["instances"]
    known = Counter({key: number for key, number in held_out.items() if key in sets["train"]})
    counted = sum(number for key, number in known.items() if key[0] == "count")
    assert held_out.total() == 750
    assert (known.total(), counted) == (38, 28)


def test_held_out_instances_and_templates_are_not_trained_on() -> None:
    instances = [instruction("instances", number) for number in range(600)]
    assert not {content(item) for item in instances} & {content(item) for item in TRAIN}
    unseen = {TASKS[name].templates[-1].split("{")[0] for name in TASKS}
    starts = tuple(start for start in unseen if start)
    assert not any(item.question.startswith(starts) for item in (*TRAIN, *instances))
    templates = [instruction("templates", number) for number in range(600)]
    for item in templates:
        pattern = re.escape(TASKS[item.task].templates[-1])
        assert re.fullmatch(re.sub(r"\\{\w+\\}", ".+", pattern), item.question)


def said(request: str, ending: str) -> tuple[bool, bool]:
    """Whether the thing they had, and the thing they had not, is in the story."""
    had, had_not = re.findall(r"(?:the|no) (\w+)(?=[ ,.])", ending.removeprefix("In the end "))
    there = re.findall(r"(?:found|got|took) a \w+ (\w+)\.", request)
    return had in there, had_not in there


def test_pairs_differ_in_meaning_alone() -> None:
    words: Counter[str] = Counter()
    which: Counter[bool] = Counter()
    for number in range(300):
        pair = preference("instances", number)
        assert not isinstance(pair.prompt, str)
        assert not isinstance(pair.chosen, str)
        assert not isinstance(pair.rejected, str)
        ((_, request),), ((_, chosen),), ((_, rejected),) = pair.prompt, pair.chosen, pair.rejected
        assert Counter(re.findall(r"\w+|\W", chosen)) == Counter(re.findall(r"\w+|\W", rejected))
        assert said(request, chosen) == (True, False)
        assert said(request, rejected) == (False, True)
        words.update(re.findall(r"\w+", chosen))
        words.subtract(re.findall(r"\w+", rejected))
        had = re.findall(r"the (\w+)", chosen.removeprefix("In the end "))[0]
        which[re.findall(r"a \w+ (\w+)\.", request)[0] == had] += 1
    assert not any(words.values())
    assert min(which.values()) > 100  # the first thing of the story as often as the second


def test_stories_to_finish_are_consistent_in_half_of_the_cases() -> None:
    endings: Counter[tuple[bool, bool]] = Counter()
    for number in range(400):
        (_, request), (_, ending) = story_to_finish("train", number).messages
        endings[said(request, ending)] += 1
    assert endings.keys() == {(True, False), (False, True)}
    assert min(endings.values()) > 160


@pytest.mark.parametrize(
    ("kind", "cls"), [("text", str), ("conversation", Conversation), ("preference", Preference)]
)
def test_the_source_gives_all_three_kinds(
    kind: Kind, cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright_train.stories.source._TRAINING", {kind: 40})
    monkeypatch.setattr("tilewright_train.stories.source._VALIDATION", 10)
    records = list(open_source("stories").records(kind, READING))
    assert [side for side, _ in records] == [False] * 40 + [True] * 10
    assert all(type(record) is cls for _, record in records)
    assert len({text_of(record) for _, record in records}) == 50
    assert records == list(open_source("stories").records(kind, READING))


def test_an_ending_is_judged_by_what_its_story_says() -> None:
    """Whoever wrote it: the grammar's own endings, and what a model may write instead."""
    for number in range(200):
        pair = preference("instances", number)
        (asked,), (chosen,), (rejected,) = pair.prompt, pair.chosen, pair.rejected
        assert is_consistent(asked.content, chosen.content)  # pyrefly: ignore
        assert not is_consistent(asked.content, rejected.content)  # pyrefly: ignore
    told = "Ann met Ben. Ann found a red cup. Ben got a blue hat."
    assert is_consistent(told, " They kept the cup and had no key.\n")
    for ending in (
        "They kept the cup and had no hat.",  # both are in the story
        "They kept the cup and had no cup.",
        "They kept the key and had no key.",
        "They kept the cup and had no idea.",  # no thing of the grammar
        "They kept the red and had no key.",  # words of the story, but no things
        "They kept the Ann and had no key.",
        "They went home with the blue, not with the key.",
        "They kept the cup and had no key. The end.",
        "",
    ):
        assert not is_consistent(told, ending), ending
