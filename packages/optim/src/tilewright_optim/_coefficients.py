"""Coefficients of Newton–Schulz steps σ ← a σ + b σ³ + c σ⁵, by name or given.

`quintic`, one triple for all steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/),
trades convergence for slope: five steps bring singular values from 0.0015 to 1 to between 0.68 and
1.20. `polar_express` (Amsel et al. 2025, arXiv:2505.16932) takes at each step the polynomial that
is best for what the steps before left over: from 0.001 on to between 0.85 and 1.14. Its triples are
made for intervals 2 % wider than they are, so that rounding throws nothing out of them.
"""

from collections.abc import Sequence
from typing import Literal

Triple = tuple[float, float, float]
CoefficientName = Literal["quintic", "polar_express"]
Coefficients = CoefficientName | Triple | Sequence[Triple]

QUINTIC: Triple = (3.4445, -4.7750, 2.0315)

NAMED: dict[str, tuple[Triple, ...]] = {
    "quintic": (QUINTIC,),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

MOST_STEPS = 99
"""As torch.optim.Muon's."""


def triples(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """One triple a step; the last one given is repeated, and what is more than steps is left out.

    Args:
        coefficients: a name of `NAMED`, a triple for all steps, or a sequence of triples.
        steps: 0 to `MOST_STEPS`.

    Raises:
        ValueError: an unknown name, something else than triples of numbers, steps out of range.
    """
    if not 0 <= steps <= MOST_STEPS:
        raise ValueError(f"ns_steps is {steps}; it must be from 0 to {MOST_STEPS}, 5 is usual")
    if isinstance(coefficients, str):
        if coefficients not in NAMED:
            raise ValueError(
                f"ns_coefficients is {coefficients!r}; choose from {', '.join(NAMED)}, or give "
                f"(a, b, c)"
            )
        given: Sequence[Triple] = NAMED[coefficients]
    else:
        try:
            rows = [coefficients] if isinstance(coefficients[0], int | float) else coefficients
            given = [(float(a), float(b), float(c)) for a, b, c in rows]  # type: ignore[misc]
        except (TypeError, ValueError, IndexError):
            raise ValueError(
                f"ns_coefficients is {coefficients!r}; give (a, b, c), or a list of such triples, "
                f"one a step, or a name: {', '.join(NAMED)}"
            ) from None
    return tuple(given[min(step, len(given) - 1)] for step in range(steps))
