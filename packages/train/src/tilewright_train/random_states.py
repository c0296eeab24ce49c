"""States of a process's random generators as tensors: torch's, Python's and numpy's.

Nothing here draws from numpy; a script around the run may, and then it is imported already. States
stand under names that hold the rank, so that each process finds its own.
"""

import random
import sys
from collections.abc import Mapping

import torch


def seed_all(seed: int) -> None:
    """Begin all of them at a seed, so that what two runs save of them is equal, too."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def random_states(rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """States of this process's random generators, by names that hold its rank."""
    _, words, _ = random.getstate()
    states = {"cpu": torch.get_rng_state(), "python": torch.tensor(words, dtype=torch.int64)}
    if (numpy := sys.modules.get("numpy")) is not None:
        _, words, place, has_gauss, _ = numpy.random.get_state()  # type: ignore[misc]
        if not has_gauss:  # half a pair of normals is no integer; the next pair is the same
            states["numpy"] = torch.tensor([*words.tolist(), place], dtype=torch.int64)
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rank{rank}.{name}": state for name, state in states.items()}


def set_random_states(states: Mapping[str, torch.Tensor], rank: int, device: torch.device) -> None:
    """Go on with the generators of `random_states`; a rank that was not there keeps its own."""
    prefix = f"rank{rank}."
    mine = {n.removeprefix(prefix): state for n, state in states.items() if n.startswith(prefix)}
    if (state := mine.get("cpu")) is not None:
        torch.set_rng_state(state)
    if (state := mine.get("python")) is not None:
        version, _, _ = random.getstate()
        random.setstate((version, tuple(state.tolist()), None))
    if (state := mine.get("numpy")) is not None and "numpy" in sys.modules:
        *words, place = state.tolist()
        sys.modules["numpy"].random.set_state(("MT19937", words, place))
    if device.type == "cuda" and (state := mine.get("cuda")) is not None:
        torch.cuda.set_rng_state(state, device)
