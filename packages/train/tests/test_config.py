"""Options: every value out of range is refused, names are unique, defaults leave room to choose."""

import dataclasses

import pytest

from tilewright_train.config import (
    FREE_AT_RESUME,
    SECTIONS,
    DataOptions,
    MachineOptions,
    PretrainConfig,
    RunOptions,
    TrainingOptions,
    option_sections,
    with_options,
)
from tilewright_train.errors import InputError


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (TrainingOptions, {"steps": 0}, "steps 0 is out of range: it must be at least 1"),
        (TrainingOptions, {"seq_len": 1}, "seq_len 1 .* at least 2"),
        (TrainingOptions, {"lr": 0.0}, "lr 0.0 .* above 0"),
        (TrainingOptions, {"lr": float("nan")}, "lr nan"),
        (TrainingOptions, {"lr": float("inf")}, "lr inf"),
        (TrainingOptions, {"max_grad_norm": float("inf")}, "inf .* must be finite and above 0$"),
        (
            TrainingOptions,
            {"seed": 2**63},
            "seed 9223372036854775808 .* at most 9223372036854775807$",
        ),
        (TrainingOptions, {"beta2": 1.0}, "beta2 1.0 .* at least 0 and below 1"),
        (TrainingOptions, {"min_lr_ratio": 1.5}, "min_lr_ratio 1.5 .* at most 1"),
        (DataOptions, {"validation_fraction": 0.0}, "validation_fraction 0.0 .* above 0"),
        (DataOptions, {"vocab_size": 256}, "vocab_size 256 .* at least 257"),
        (DataOptions, {"on_bad_line": "skipp"}, "none of error, skip .did you mean 'skip'"),
        (DataOptions, {"data": "x.txt"}, r"data 'x.txt' is one text: .* \('x.txt',\)"),
        (DataOptions, {"data": ()}, "data is empty: give a path, 'stdlib' or 'stories'"),
        (DataOptions, {"data": ("a", "a")}, "data 'a' is given twice: use --weights"),
        (DataOptions, {"weights": (1.0, 2.0)}, "2 weights for 1 sources"),
        (DataOptions, {"weights": (float("nan"),)}, "weight nan is out of range"),
        (DataOptions, {"packing": "bfd"}, "packing 'bfd' is none of concat, best_fit, none"),
        (DataOptions, {"workers": -1}, "workers -1 .* at least 0"),
        (DataOptions, {"prefetch": 0}, "prefetch 0"),
        (MachineOptions, {"precision": "fp8"}, "precision 'fp8' is none of auto, fp32, bf16"),
        (RunOptions, {"name": "a/b"}, "name 'a/b' is not the name of a folder"),
        (RunOptions, {"name": ".."}, "name '..' is not the name of a folder"),
        (RunOptions, {"keep": 0}, "keep 0"),
    ],
)
def test_a_value_out_of_range_is_named(options: type, values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**values)


def test_option_names_are_unique_over_all_sections() -> None:
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) == len(option_sections())
    assert set(option_sections()) >= FREE_AT_RESUME


def test_with_options_sets_values_in_their_sections_and_checks_them() -> None:
    config = with_options(PretrainConfig(), steps=3, preset="nano")
    assert (config.training.steps, config.model.preset) == (3, "nano")
    with pytest.raises(InputError, match=r"unknown option 'step'.*did you mean 'steps'"):
        with_options(PretrainConfig(), step=3)
    with pytest.raises(InputError, match="steps -1"):
        with_options(PretrainConfig(), steps=-1)
