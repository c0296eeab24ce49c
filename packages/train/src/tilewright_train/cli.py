"""The commands `train-pretrain`, `train-sft` and `train-dpo`: options in, an exit status out.

0: trained, or finished before. 2: something that the user can mend, said in one line on stderr.
1: another process was lost. 128 + n: stopped by signal n. A traceback is a mistake of ours.
"""

import os
import sys
from collections.abc import Sequence

from tilewright_train.config import Objective, PretrainConfig
from tilewright_train.errors import InputError, RankLost, TrainingStopped, one_line
from tilewright_train.layers import CONFIG_FILE, parse
from tilewright_train.signals import Terminated, sigterm_interrupts


def pretrain() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def sft() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:], "sft"))


def dpo() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:], "dpo"))


def main(arguments: Sequence[str], objective: Objective = "pretrain") -> int:
    """Run the command of `objective` with these arguments and give its exit status."""
    try:
        with sigterm_interrupts():
            _run(arguments, objective)
    except BrokenPipeError:
        return 141  # `train-pretrain | head`: whoever read the lines has gone
    except (InputError, OSError) as error:
        return _complain(f"error: {one_line(error)}", 2)
    except RankLost as lost:
        print(f"error: {lost}", file=sys.stderr)  # every process: the first may be the lost one
        return 1
    except TrainingStopped as stopped:
        return _complain(str(stopped), stopped.exit_status)
    except Terminated as terminated:
        return _complain(f"stopped by SIGTERM{terminated}", 143)
    except KeyboardInterrupt as interrupt:
        return _complain(f"interrupted{interrupt}", 130)
    return 0


def _run(arguments: Sequence[str], objective: Objective) -> None:
    config = parse(arguments, objective)
    _wait_politely()
    # torch takes seconds to import: --help and a mistyped flag do not wait for it.
    try:
        from tilewright_train.pretraining import run
    except ValueError as error:  # tilewright_kernels reads TILEWRIGHT_BACKEND when it is imported
        raise InputError(str(error)) from error
    earlier = _runs(config)
    try:
        run(config)
    except KeyboardInterrupt as interrupt:
        begun = _runs(config) - earlier if config.run.resume == "never" else {config.run.resume}
        if len(begun) != 1:  # none, or somebody else has begun one there as well
            raise
        going_on = f"; go on from what is saved with: {config.command} --resume {begun.pop()}"
        raise type(interrupt)(going_on) from None


def _runs(config: PretrainConfig) -> set[str]:
    """The folders of the runs in --out."""
    return {str(file.parent) for file in config.run.out.glob(f"*/{CONFIG_FILE}")}


def _wait_politely() -> None:
    """Have OpenMP's threads sleep soon while they wait for each other; set before torch is loaded.

    By default they spin for a millisecond or so. With two busy programs beside it on two cores,
    nano then trains 660 to 1,590 tokens/s, with 5,000 turns of spinning 4,160 to 6,560; on quiet
    cores 12,700 to 14,200, and 7,700 to 13,500.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _complain(message: str, status: int) -> int:
    """Say it once, not once for every process that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    return status
