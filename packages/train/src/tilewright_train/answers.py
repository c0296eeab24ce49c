"""What a chat model answers: greedily, to the held-out tasks of the stories, and right or not.

Exact match counts answers that are the right one letter for letter. The tasks are drawn by number,
so they are the same ones before and after training and in every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from tilewright_model import CausalLM, Engine, SamplingParams
from tilewright_train.chat_template import ChatTemplate
from tilewright_train.conversations import end_of_turn, tokenize
from tilewright_train.evaluation import evaluating
from tilewright_train.records import Message
from tilewright_train.stories import Instruction, instruction
from tilewright_train.tokenizer import decode

_TOGETHER = 64  # prompts
_LONGEST = 48  # tokens; with nano's vocabulary no right answer of 4,000 has more than 22


@dataclass(frozen=True)
class Answers:
    """Tasks and what was answered."""

    tasks: tuple[Instruction, ...]
    given: tuple[str, ...]

    @property
    def exact_match(self) -> float:
        """Share of right answers."""
        right = sum(task.answer == text for task, text in zip(self.tasks, self.given, strict=True))
        return right / len(self.tasks)

    def samples(self, count: int) -> list[str]:
        """The first tasks as lines."""
        shown = list(zip(self.tasks, self.given, strict=True))[:count]
        return [
            f"{task.question}  →  {' '.join(text.split())!r}"
            + ("" if text == task.answer else f" (right: {task.answer!r})")
            for task, text in shown
        ]


@dataclass(frozen=True)
class HeldOut:
    """Answers to held-out tasks."""

    instances: Answers
    """Of templates that were trained on."""
    templates: Answers
    """Asked in ways that were not trained on."""


def held_out_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    count: int,
    autocast: torch.autocast,
) -> HeldOut:
    """Have the model answer `count` held-out tasks of either kind.

    Args:
        model: Without wrappers.
        tokenizer: Of the model.
        template: That it was, or is to be, trained with.
        count: Tasks of each kind.
        autocast: Precision of the forward pass.
    """

    def answered(tasks: tuple[Instruction, ...]) -> Answers:
        prompts = [task.conversation.messages[:1] for task in tasks]
        return Answers(tasks, tuple(answer(model, tokenizer, template, prompts, autocast)))

    return HeldOut(
        instances=answered(tuple(instruction("instances", n) for n in range(count))),
        templates=answered(tuple(instruction("templates", n) for n in range(count))),
    )


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Sequence[Message]],
    autocast: torch.autocast,
) -> list[str]:
    """The likeliest token after token, until the end of the turn or 48 tokens.

    Args:
        model: Without wrappers.
        tokenizer: Of the model.
        template: Of the model.
        prompts: Turns before each answer.
        autocast: Precision of the forward pass.

    Raises:
        InputError: The template raises.
        ValueError: A prompt leaves no room among the model's positions.
    """
    end = end_of_turn(tokenizer, template)
    encoded = tokenize(tokenizer, template, prompts, add_generation_prompt=True)
    positions = model.config.max_position_embeddings
    longest = max(len(tokens) for tokens, _ in encoded)
    in_order = sorted(range(len(prompts)), key=lambda number: len(encoded[number].tokens))
    texts = [""] * len(prompts)
    with torch.no_grad(), evaluating(model), autocast:
        engine = Engine(
            model,
            max_batch_size=min(_TOGETHER, len(prompts)),
            max_length=min(longest + _LONGEST, positions),
        )
        for first in range(0, len(in_order), _TOGETHER):
            numbers = in_order[first : first + _TOGETHER]
            together = [encoded[number].tokens for number in numbers]
            params = [
                SamplingParams(
                    max_new_tokens=min(_LONGEST, positions - len(tokens)),
                    temperature=0,
                    stop_token_ids=(end,),
                )
                for tokens in together
            ]
            completions = engine.generate(together, params)
            for number, completion in zip(numbers, completions, strict=True):
                written = [token for token in completion.token_ids if token != end]
                texts[number] = decode(tokenizer, written)
    return texts
