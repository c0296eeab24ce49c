"""Which implementation of an operator runs: the choice, its reason, and a record of both.

Three backends: `triton` runs the kernel or raises, `torch` runs the plain-torch reference, `auto`
runs the kernel where the tensors are on a CUDA device and the reference elsewhere. The choice is
made anew at each call of the forward; a backward follows its forward. It is process-wide, because
autograd runs backward in threads of its own.

Environment: TILEWRIGHT_BACKEND=triton, or TILEWRIGHT_BACKEND=auto,cross_entropy=torch.
"""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, NamedTuple

import torch

from tilewright_kernels._triton import HAS_TRITON, INTERPRETED

Backend = Literal["auto", "triton", "torch"]

BACKENDS: tuple[str, ...] = ("auto", "triton", "torch")

_DEFAULT = "*"
_choices: dict[str, str] = {_DEFAULT: "auto"}
_unchecked: dict[str, str] = {}
_operators: dict[str, "OperatorCalls"] = {}


class Decision(NamedTuple):
    """What runs for one call, why, and whether it is less than what was hoped for."""

    backend: str
    reason: str
    fell_back: bool


@dataclass
class OperatorCalls:
    """What one operator did since the last reset.

    Calls made inside torch.compile count once, when they are traced; launches always count.
    """

    calls: Counter[Decision] = field(default_factory=Counter)
    launches: int = 0


def register(operator: str) -> OperatorCalls:
    """Make an operator known to `use_backend`, the environment and the report."""
    return _operators.setdefault(operator, OperatorCalls())


def operators() -> tuple[str, ...]:
    """Names of all operators imported so far, sorted."""
    return tuple(sorted(_operators))


class use_backend:
    """Choose the backend of all operators, or of some by name.

    Takes effect at once. As a context manager it restores the former choice on exit:

        use_backend("triton")                       # from here on
        with use_backend("auto", rms_norm="torch"):  # in this block
            ...

    Args:
        backend: "auto", "triton" or "torch" for every operator; None leaves the default alone.
        operators: the same for single operators, by name, over the default.

    Raises:
        ValueError: unknown backend or operator; the message lists the valid ones.
    """

    def __init__(self, backend: Backend | None = None, /, **operators: Backend) -> None:
        for name, value in operators.items():
            _check_operator(name)
            _check_backend(value, f"{name}=")
        self._former = dict(_choices)
        if backend is not None:
            _check_backend(backend)
            _choices.clear()
            _choices[_DEFAULT] = backend
        _choices.update(operators)

    def __enter__(self) -> None:
        """The choice took effect in the constructor."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _choices.clear()
        _choices.update(self._former)


def setting(operator: str) -> str:
    """The backend that is chosen for an operator now."""
    return _choices.get(operator, _choices[_DEFAULT])


def decide(
    operator: str, device: str, unsupported: str | None = None, torch_is_better: str | None = None
) -> Decision:
    """The backend for one call.

    Args:
        operator: its name.
        device: type of the device that the tensors are on, as in `tensor.device.type`.
        unsupported: why the kernel cannot take these inputs, or None if it can.
        torch_is_better: why auto does without a kernel that could take them, or None.

    Raises:
        ValueError: backend triton was asked for and cannot run here.
    """
    if _unchecked:
        check_environment()
    choice = setting(operator)
    if choice == "torch":
        return Decision("torch", "asked for", False)
    obstacle = unsupported
    if not HAS_TRITON:
        obstacle = "triton is not installed"
    elif device != "cuda" and not INTERPRETED:
        obstacle = f"the tensors are on {device}"
    if choice == "triton":
        if obstacle is not None:
            raise ValueError(
                f"{operator}: backend triton was asked for, but {obstacle}; move the tensors to a "
                f"CUDA device, set TRITON_INTERPRET=1 before Python starts, or use_backend('auto')"
            )
        return Decision("triton", "asked for", False)
    if obstacle is None and device == "cuda":
        if torch_is_better is not None:
            return Decision("torch", f"auto: {torch_is_better}", False)
        return Decision("triton", "auto: the tensors are on cuda", False)
    return Decision(
        "torch", f"auto: {obstacle or f'the tensors are on {device}'}", device == "cuda"
    )


@dataclass(frozen=True)
class OperatorReport:
    """One operator's line of the report.

    Attributes:
        operator: its name.
        setting: the backend that is chosen for it now.
        triton: calls that ran the kernel.
        torch: calls that ran the reference.
        launches: kernel launches, forward and backward together.
        fell_back: calls on a CUDA device that ran the reference though nobody asked for it.
        reasons: why each backend was taken, in the order of first use.
    """

    operator: str
    setting: str
    triton: int
    torch: int
    launches: int
    fell_back: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class BackendReport(Mapping[str, OperatorReport]):
    """What ran and why, by operator name; `print(backend_report())` shows it as a table."""

    rows: tuple[OperatorReport, ...]

    def __getitem__(self, operator: str) -> OperatorReport:
        for row in self.rows:
            if row.operator == operator:
                return row
        raise KeyError(operator)

    def __iter__(self) -> Iterator[str]:
        return (row.operator for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fell_back(self) -> tuple[str, ...]:
        """Operators that ran their reference on a CUDA device though nobody asked for it."""
        return tuple(row.operator for row in self.rows if row.fell_back)

    def __str__(self) -> str:
        header = ("operator", "setting", "triton", "torch", "launches", "why")
        lines = [header]
        for r in self.rows:
            why = "; ".join(r.reasons) or "not called"
            lines.append((r.operator, r.setting, str(r.triton), str(r.torch), str(r.launches), why))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def backend_report(*, reset: bool = False) -> BackendReport:
    """What each operator ran since the start or the last reset, and why.

    Calls inside torch.compile count once, when they are traced; launches count every time.

    Args:
        reset: start counting anew after this report.
    """
    rows = []
    for name in operators():
        done = _operators[name]
        by_backend: Counter[str] = Counter()
        for decision, count in done.calls.items():
            by_backend[decision.backend] += count
        rows.append(
            OperatorReport(
                operator=name,
                setting=setting(name),
                triton=by_backend["triton"],
                torch=by_backend["torch"],
                launches=done.launches,
                fell_back=sum(n for decision, n in done.calls.items() if decision.fell_back),
                reasons=tuple(f"{d.backend} ({d.reason})" for d in done.calls),
            )
        )
        if reset:
            done.calls.clear()
            done.launches = 0
    return BackendReport(tuple(rows))


def parse_backends(text: str) -> tuple[str | None, dict[str, str]]:
    """Take apart what TILEWRIGHT_BACKEND may hold: «triton», or «auto, cross_entropy=torch».

    Spaces and empty items, as after a last comma, are skipped; of two defaults the later one holds.

    Returns:
        The default, None where there is none, and the backend of single operators by name. The
        names are not checked here: `use_backend` does it.

    Raises:
        ValueError: unknown backend; the message lists the valid ones.
    """
    default: str | None = None
    single: dict[str, str] = {}
    for item in filter(str.strip, text.split(",")):
        name, equals, value = (part.strip() for part in item.rpartition("="))
        _check_backend(value, name + equals)
        if equals:
            single[name] = value
        else:
            default = value
    return default, single


def configure_from_environment(text: str | None) -> None:
    """Take TILEWRIGHT_BACKEND's value: a default backend, operator=backend pairs, or both.

    Names of operators are checked at the first call of any operator, when the packages that
    bring operators of their own have been imported.

    Raises:
        ValueError: unknown backend.
    """
    try:
        default, single = parse_backends(text or "")
    except ValueError as error:
        raise ValueError(f"TILEWRIGHT_BACKEND={error}") from None
    if default is not None:
        _choices[_DEFAULT] = default
    _choices.update(single)
    _unchecked.update(single)


def check_environment() -> None:
    """See that TILEWRIGHT_BACKEND names operators that are there; the first call does it otherwise.

    Raises:
        ValueError: it names an operator that no package imported so far has brought.
    """
    for name in list(_unchecked):
        _check_operator(name, "TILEWRIGHT_BACKEND: ")
        del _unchecked[name]


def _check_backend(backend: str, where: str = "") -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{where}{backend!r} is not a backend; choose from {', '.join(BACKENDS)}")


def _check_operator(operator: str, where: str = "") -> None:
    if operator not in _operators:
        close = difflib.get_close_matches(operator, _operators, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{where}{operator!r} is not an operator{hint}; the operators are "
            f"{', '.join(operators())}"
        )


def _record_traced(operator: str, backend: str, reason: str, fell_back: bool) -> bool:
    _operators[operator].calls[Decision(backend, reason, fell_back)] += 1
    return True


# What torch.compiler.assume_constant_result does: run the function once, while tracing, and leave
# it out of the graph. The decorator itself would import the whole compiler, 4 s for every user.
setattr(_record_traced, "_dynamo_marked_constant", True)  # noqa: B010


def record(operator: str, decision: Decision) -> None:
    """Count one call, also while torch.compile traces it."""
    if torch.compiler.is_compiling():
        _record_traced(operator, decision.backend, decision.reason, decision.fell_back)
    else:
        _operators[operator].calls[decision] += 1


configure_from_environment(os.environ.get("TILEWRIGHT_BACKEND"))
