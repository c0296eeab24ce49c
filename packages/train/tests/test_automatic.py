"""What is chosen for the user, with its reason, and never over what the user gave."""

from types import SimpleNamespace

import pytest
import torch

from tilewright_model import PRESETS, count_parameters
from tilewright_train.automatic import RECIPES, choose, model_config
from tilewright_train.config import PretrainConfig, with_options
from tilewright_train.errors import InputError
from tilewright_train.hardware import ACCELERATORS

CPU = with_options(PretrainConfig(), device="cpu")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TILEWRIGHT_BACKEND", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_every_preset_has_a_recipe_that_its_positions_hold() -> None:
    assert set(RECIPES) == set(PRESETS)
    for name, recipe in RECIPES.items():
        assert recipe.seq_len <= PRESETS[name].max_position_embeddings


def test_nothing_stays_open_and_everything_chosen_has_a_reason() -> None:
    chosen = choose(CPU)
    names = {choice.name for choice in chosen.choices}
    assert {"precision", "threads", "backend", "preset", "vocab_size", "steps", "lr"} <= names
    assert "device" not in names  # it was given
    assert all(choice.reason for choice in chosen.choices)
    config = chosen.config
    assert (config.machine.precision, config.machine.backend) == ("fp32", "auto")
    assert config.model.preset == "nano"
    assert config.training.steps == RECIPES["nano"].steps
    assert None not in vars(config.training).values()
    assert choose(config).choices == ()


def test_what_the_user_gave_stays() -> None:
    given = with_options(CPU, steps=33, preset="100m", precision="bf16", threads=1, seq_len=64)
    chosen = choose(given)
    config = chosen.config
    assert (config.training.steps, config.training.seq_len) == (33, 64)
    assert (config.model.preset, config.machine.precision) == ("100m", "bf16")
    assert config.machine.threads == 1
    assert config.training.warmup_steps == 16
    assert chosen.reasons["lr"] == "the recipe of 100m"


def test_the_size_of_a_checkpoint_is_that_of_the_model_that_is_trained() -> None:
    chosen = choose(with_options(CPU, vocab_size=50_000))
    size = 12 * count_parameters(model_config(chosen)).total
    assert chosen.reasons["save_every"] == f"10 checkpoints a run, {size / 1e6:.0f} MB each"
    assert chosen.reasons["save_every"] != choose(CPU).reasons["save_every"]


def test_on_a_gpu_the_model_is_larger_and_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    memory = SimpleNamespace(total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: memory)
    chosen = choose(PretrainConfig())
    assert chosen.config.machine.device == "cuda"
    assert chosen.config.machine.precision == "bf16"
    assert chosen.config.model.preset == "26m"
    assert chosen.reasons["backend"] == "Triton kernels"
    assert chosen.settled.document_mask == "on"
    assert choose(with_options(PretrainConfig(), backend="torch")).settled.document_mask == "off"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert choose(PretrainConfig()).config.machine.precision == "fp32"


def test_a_gpu_computes_as_many_rows_at_once_as_the_plan_finds_room_for() -> None:
    def rows(gpu: str, **options: object) -> tuple[int, str]:
        config = with_options(PretrainConfig(), **{"preset": "0.5b", "batch_size": 64, **options})
        chosen = choose(config, accelerator=ACCELERATORS[gpu])
        return chosen.settled.micro_batch_size, chosen.reasons["micro_batch_size"]

    together, why = rows("H200")
    assert together == 64
    assert "all rows of a process: " in why
    together, why = rows("A100 40GB")
    assert 64 % together == 0
    assert 4 <= together <= 16
    assert f"{together} of 64 rows: " in why
    assert rows("A100 40GB", recompute="full")[0] > together
    assert rows("L4", preset="2.7b")[1] == "by the plan not even one row fits in 22 GiB"


def test_packed_documents_are_always_apart() -> None:
    assert choose(CPU).settled.document_mask == "off"
    for packing in ("best_fit", "none"):
        chosen = choose(with_options(CPU, packing=packing))
        assert chosen.settled.document_mask == "on"
    assert choose(with_options(CPU, document_mask="on")).settled.document_mask == "on"


def test_rows_that_plain_torch_masks_are_computed_few_at_a_time() -> None:
    def rows(**options: object) -> int:
        return choose(
            with_options(CPU, batch_size=16, seq_len=128, **options)
        ).settled.micro_batch_size

    assert rows() == 16
    assert rows(packing="none") == 16
    assert rows(packing="best_fit") == 4
    assert rows(document_mask="on") == 4
    assert rows(packing="best_fit", micro_batch_size=8) == 8
    config = with_options(CPU, batch_size=6, seq_len=1000, document_mask="on")
    assert choose(config, local_processes=2).settled.micro_batch_size == 1


def test_the_environments_backend_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_BACKEND", "auto,rms_norm=torch")
    chosen = choose(CPU)
    assert chosen.config.machine.backend == "auto,rms_norm=torch"
    assert chosen.reasons["backend"] == "TILEWRIGHT_BACKEND says so"
    assert choose(with_options(CPU, backend="torch")).config.machine.backend == "torch"
    monkeypatch.setenv("TILEWRIGHT_BACKEND", " ")
    assert choose(CPU).config.machine.backend == "auto"


def test_the_model_has_the_tokenizers_vocabulary_and_room_for_the_sequence() -> None:
    chosen = choose(with_options(CPU, seq_len=5000, hidden_size=64))
    shape = model_config(chosen, vocab_size=777)
    assert (shape.vocab_size, shape.max_position_embeddings) == (777, 5000)
    assert shape.hidden_size == 64
    assert model_config(chosen).vocab_size == PRESETS["nano"].vocab_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "nanoo"}, r"no preset 'nanoo' \(did you mean 'nano'\?\)"),
        ({"hidden_size": 130}, "hidden_size 130 is not a multiple of num_attention_heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_key_value_heads": 3}, "num_attention_heads .* num_key_value_heads 3"),
    ],
)
def test_a_model_that_cannot_be_is_an_error(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(with_options(CPU, **values))


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match="'cuda:64' is not there"):
        choose(with_options(PretrainConfig(), device="cuda:64"))
