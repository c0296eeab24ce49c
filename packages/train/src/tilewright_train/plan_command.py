"""The command `train-plan`: the options of a run in, what it will need out; nothing is trained."""

import argparse
import sys
from collections.abc import Sequence

from tilewright_train.config import PretrainConfig
from tilewright_train.errors import InputError, one_line
from tilewright_train.layers import parse

_DESCRIPTION = """Say what a run will need before it runs: memory by kind, operations, predicted
tokens/s, the largest micro-batch; on one GPU or several. Takes every option of train-pretrain
(see its --help) besides these, and exits."""

_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def plan() -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a run with these options and give the exit status."""
    parser = argparse.ArgumentParser("train-plan", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--gpu", help="plan for this GPU, as in H200; by default the one at hand")
    parser.add_argument("--gpus", type=int, default=1, help="processes of torchrun, one a GPU")
    own, options = parser.parse_known_args(arguments)
    try:
        if own.gpus < 1:
            raise InputError(f"gpus {own.gpus} is out of range: it must be at least 1")
        config = parse(options)
        for line in _lines(config, own.gpu, own.gpus):
            print(line)
    except BrokenPipeError:
        return 141
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _lines(config: PretrainConfig, gpu_name: str | None, gpus: int) -> list[str]:
    import torch

    from tilewright_model import count_parameters
    from tilewright_train.automatic import choose, model_config
    from tilewright_train.hardware import accelerator, accelerator_here
    from tilewright_train.plan import gib, make_plan, on_several, plan_lines, several_lines
    from tilewright_train.replicas import check_divisible

    gpu = accelerator(gpu_name) if gpu_name else None
    check_divisible(config)
    chosen = choose(config, local_processes=gpus, accelerator=gpu)
    settled, machine = chosen.settled, chosen.config.machine
    if gpu is None:
        gpu = accelerator_here(torch.device(settled.device))
    if settled.batch_size % gpus:
        raise InputError(
            f"batch_size {settled.batch_size} is not a multiple of {gpus} gpus: give another"
            " --batch-size or --gpus"
        )
    rows = settled.batch_size // gpus
    if rows % settled.micro_batch_size:
        raise InputError(
            f"micro_batch_size {settled.micro_batch_size} does not divide the {rows} rows of a"
            " process: give another --micro-batch-size"
        )
    shape = model_config(chosen)
    plan = make_plan(shape, chosen.step_shape(gpus), gpu, tf32=machine.tf32)
    lines = list(plan_lines(plan, settled.preset, settled.steps))
    if settled.backend.startswith("torch") or gpu is None:
        lines.append("note         memory is that of the Triton operators; plain torch keeps more")
    if gpus > 1 and machine.parallel == "fsdp":
        whole = 4 * count_parameters(shape).total
        lines.append(
            f"note         host memory is not divided: while a run begins up to"
            f" {gib(2 * whole)} in each process, while it saves up to {gib(3 * whole)} in the first"
        )
    counts = sorted({gpus, *(n for n in _COUNTS if settled.batch_size % n == 0 and n <= 64)})
    several = list(on_several(plan, counts, tf32=machine.tf32))
    return [*lines, *(["", *several_lines(several)] if several else [])]
