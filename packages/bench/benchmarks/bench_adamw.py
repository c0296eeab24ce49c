"""AdamW's step on all parameters of a model, in each of its modes, beside torch's way to the same.

The bytes counted are those of a pass over all that is kept: p, g, m, v read, p, m, v written.
Shapes are those of a model (tensors × parameters): 0.5 B parameters, where memory decides, and a
thousand small tensors, where the host and the number of launches do: an optimizer that steps again
and again, and several that take turns, each of which finds the host's caches full of another's. The
learning rate is so large that a step changes a parameter by more than its own size; else the error
would say nothing.

Inputs are all values in a row, and an optimizer makes parameters of its own of them, in memory of
their own, and steps on from call to call. To put back thousands of tensors between calls would have
the host's caches full of them, and its time would not be the step's.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright_bench import Case, Variant, Work, by_device, run, variants
from tilewright_optim import AdamW, adamw_reference

LR = 0.1
MAX_NORM = 1.0

Params = list[torch.nn.Parameter]
Step = Callable[[], Any]


def decoder(layers: int, hidden: int, intermediate: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a Llama-like decoder with tied embeddings and as many key heads as query heads."""
    block = [(hidden,)] * 2 + [(hidden, hidden)] * 4
    block += [(2 * intermediate, hidden), (hidden, intermediate)]
    return [(vocabulary, hidden), *block * layers, (hidden,)]


MODELS: dict[str, list[tuple[int, ...]]] = {
    "0.5b": decoder(16, 1536, 4096, 32768),
    "1000 small": [(1024,)] * 1000,
    "tiny": decoder(1, 16, 32, 64),
}
LARGE = by_device(gpu=["0.5b"], cpu=["tiny"])
SMALL = by_device(gpu=["1000 small"], cpu=["tiny"])


def tensors(values: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes with the values in turn."""
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)]


def stepping(make_step: Callable[[Params], Step]):
    """A function of a model's shapes that gives one of (values, gradients) that makes a step."""

    def of(shapes):
        steps: Any = WeakTensorKeyDictionary()  # each set of inputs has an optimizer

        def prepare(values, gradients):
            params = [torch.nn.Parameter(p, requires_grad=False) for p in tensors(values, shapes)]
            for p, g in zip(params, tensors(gradients, shapes), strict=True):
                p.grad = g
            return make_step(params), tuple(params)

        def step(values, gradients):
            if values not in steps:
                steps[values] = prepare(values, gradients)
            make_one, params = steps[values]
            make_one()
            return params

        return step

    return of


def ours(**options: Any):
    """Our step in one of its modes."""
    return stepping(lambda params: AdamW(params, LR, **options).step)


def torchs(**options: Any):
    """torch's step."""
    return stepping(lambda params: torch.optim.AdamW(params, LR, **options).step)


def clip_and_step(params: Params) -> Step:
    """torch's way to clip: gradients are scaled in memory before the step."""
    optimizer = torch.optim.AdamW(params, LR, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def step_on_copies(params: Params) -> Step:
    """torch's way to float32 masters of bfloat16 parameters: copies, there and back."""
    masters = [torch.nn.Parameter(p.float(), requires_grad=False) for p in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, LR, fused=True)
    grads: Any = [p.grad for p in params]
    wide: Any = [master.grad for master in masters]
    lows: list[Tensor] = [*params]
    highs: list[Tensor] = [*masters]

    def step() -> None:
        torch._foreach_copy_(wide, grads)
        optimizer.step()
        torch._foreach_copy_(lows, highs)

    return step


def reference(
    values: Tensor,
    gradients: Tensor,
    shapes: Sequence[tuple[int, ...]],
    max_norm: float | None = None,
):
    """The first step, from states of zeros."""
    params, grads = tensors(values, shapes), tensors(gradients, shapes)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    adamw_reference(
        params, grads, m, v, [], [torch.zeros(()) for _ in params],
        lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, max_norm=max_norm,
        total_norm=None if max_norm is None else torch.nn.utils.get_total_norm(grads),
    )  # fmt: skip
    return tuple(params)


PROVIDERS: dict[str, dict[str, Any]] = {
    "adamw": {"tilewright": ours(), "torch": torchs(), "fused": torchs(fused=True)},
    "adamw_clipped": {
        "tilewright": ours(max_grad_norm=MAX_NORM),
        "fused": stepping(clip_and_step),
    },
    "adamw_exact": {
        "tilewright": ours(master="exact"),
        "fused": stepping(step_on_copies),
    },
    "adamw_int8": {
        "tilewright": ours(master="exact", state_dtype="int8"),
        "bf16_states": ours(master="exact", state_dtype=torch.bfloat16),
    },
    "adamw_in_turn": {"tilewright": ours(), "fused": torchs(fused=True)},
    "adamw_captured": {
        "tilewright": ours(capturable=True),
        "fused": torchs(fused=True, capturable=True),
    },
}
BYTES = {"adamw_clipped": 32, "adamw_exact": 26, "adamw_int8": 14}
"""A parameter, where they are not 7 times its own: the norm's pass; the masters' low halves."""


@cache
def case(operator: str, model: str, dtype: torch.dtype) -> Case:
    shapes = MODELS[model]
    size = sum(map(math.prod, shapes))
    max_norm = MAX_NORM if operator == "adamw_clipped" else None

    def make_inputs(device, generator):
        options = {"device": device, "dtype": dtype, "generator": generator}
        return 0.02 * torch.randn(size, **options), torch.randn(size, **options)

    work = Work(bytes=BYTES.get(operator, 7 * dtype.itemsize) * size, flops=15 * size)
    return Case(
        operator=operator,
        shape=(len(shapes), size),
        dtype=dtype,
        make_inputs=make_inputs,
        reference=partial(reference, shapes=shapes, max_norm=max_norm),
        forward=work,
        backward=work,  # there is none, and it is never timed
        sets=1 if operator == "adamw" and model in SMALL else None,
    )


CASES = [
    *(("adamw", m, d) for m in (*LARGE, *SMALL) for d in (torch.float32, torch.bfloat16)),
    *(("adamw_clipped", model, torch.float32) for model in LARGE),
    *(("adamw_exact", model, torch.bfloat16) for model in LARGE),
    *(("adamw_int8", model, torch.bfloat16) for model in LARGE),
    *(("adamw_in_turn", model, torch.float32) for model in SMALL),
    *(("adamw_captured", model, torch.float32) for model in SMALL),
]


def providers(operator: str, model: str) -> list[Variant]:
    """All of an operator, on the shapes of a model."""
    build = {name: partial(of, MODELS[model]) for name, of in PROVIDERS[operator].items()}
    return variants(build, ("fwd",))


MEASURED = [(case(*c), v) for c in dict.fromkeys(CASES) for v in providers(*c[:2])]


@pytest.mark.parametrize(("case", "variant"), MEASURED, ids=str)
def bench_adamw(benchmark, case, variant):
    run(benchmark, case, variant)
