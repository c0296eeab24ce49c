"""What a run of DPO says at its end, and what its model writes before and after.

Three figures say how it went: the share of held-out pairs whose chosen side is the likelier one,
the share whose chosen side has the larger reward, and, on `stories`, the share of endings written
by the model itself that agree with their story.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tilewright_train.answers import answer
from tilewright_train.automatic import Chosen
from tilewright_train.config import STORIES
from tilewright_train.metrics import Record
from tilewright_train.preparation import Prepared
from tilewright_train.progress import Reporter
from tilewright_train.stories import is_consistent, preference

ENDINGS = "consistent_endings"
"""Key in answers.json, by steps done as exact match is."""

_SHOWN = 3  # endings


def finish_stories(
    chosen: Chosen, prepared: Prepared, step: int, autocast: torch.autocast, reporter: Reporter
) -> None:
    """Of DPO on stories: have held-out stories finished, say and keep how many agree with it.

    Args:
        chosen: The options.
        prepared: The run.
        step: Steps that are done.
        autocast: Precision of the endings.
        reporter: Takes the figure and some endings.
    """
    config = chosen.config
    if config.run.objective != "dpo" or STORIES not in config.data.data:
        return
    assert prepared.template is not None
    prompts = []
    for number in range(config.run.tasks):
        prompt = preference("instances", number).prompt
        assert not isinstance(prompt, str)
        prompts.append(prompt)
    model, tokenizer = prepared.trainee.model, prepared.corpus.tokenizer
    endings = answer(model, tokenizer, prepared.template, prompts, autocast)
    agree = [is_consistent(p[0].content, e) for p, e in zip(prompts, endings, strict=True)]
    share = sum(agree) / len(agree)
    file = prepared.run.answers
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept.setdefault(str(step), {})[ENDINGS] = share
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    shown = [
        f"{p[0].content}  →  {' '.join(e.split())!r}{'' if right else ' (contradicts it)'}"
        for p, e, right in list(zip(prompts, endings, agree, strict=True))[:_SHOWN]
    ]
    sample = prepared.run.sample(step)
    sample.parent.mkdir(exist_ok=True)
    before = sample.read_text(encoding="utf-8") if sample.exists() else ""
    sample.write_text(before + "\n".join(shown) + "\n", encoding="utf-8")
    when = "before training" if step == 0 else "after training"
    reporter.say(
        f"endings      {share:.1%} of {len(agree)} held-out stories are finished in agreement with"
        f" them; {when}"
    )
    for line in shown:
        reporter.say(f"    {line}")


def preference_summary(records: Sequence[Record]) -> dict[str, Any]:
    """Metrics of the validation pairs before and after training, for summary.json."""
    measured = [record for record in records if record.val_loss is not None]
    first, last = (_validation(record) for record in (measured[0], measured[-1]))
    return {"validation_before": first, "validation_after": last}


def preference_lines(records: Sequence[Record], pairs: int) -> list[str]:
    """The same for a person.

    Args:
        records: Of the run.
        pairs: Validation pairs.
    """
    measured = [record for record in records if record.val_loss is not None]
    summary = preference_summary(records)
    first, last = summary["validation_before"], summary["validation_after"]
    return [
        f"validation   loss {measured[-1].val_loss:.4f}; before training"
        f" {measured[0].val_loss:.4f}, on {pairs:,} held-out pairs",
        f"preferences  the chosen side is the likelier one in {last['logps/accuracies']:.1%} of"
        f" them; before training in {first['logps/accuracies']:.1%}",
        f"rewards      chosen {last['rewards/chosen']:+.3f}, rejected"
        f" {last['rewards/rejected']:+.3f}; the chosen side's is the larger one in"
        f" {last['rewards/accuracies']:.1%}",
    ]


def _validation(record: Record) -> Mapping[str, float]:
    names = (name for name in record.metrics if name.startswith("val_"))
    return {name.removeprefix("val_"): record.metrics[name] for name in names}
