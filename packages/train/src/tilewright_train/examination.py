"""What a person is told of an update that was left out: what broke it, and where its batch is.

All processes look at their own part of the step; the first of them that finds something counts, or
where the second computation is finite, the first whose loss was not in the step itself.
"""

from contextlib import AbstractContextManager
from math import isfinite

from torch import Tensor

from tilewright_dist import DistributedEnvironment
from tilewright_train.automatic import Chosen
from tilewright_train.batches import Batch
from tilewright_train.guilty import LeftOut, find_guilty, find_guilty_together, keep_batch
from tilewright_train.preparation import Prepared
from tilewright_train.processes import gather
from tilewright_train.replicas import is_fully_sharded, wait_for_parameters


def examine(
    left_out: LeftOut,
    chosen: Chosen,
    prepared: Prepared,
    environment: DistributedEnvironment,
    autocast: AbstractContextManager,
) -> str:
    """Compute the step once more, keep its batch, and say what was found.

    Args:
        left_out: The step.
        chosen: The options.
        prepared: The run.
        environment: Of this process; all call this together.
        autocast: Precision of the forward pass.
    """
    wait_for_parameters(prepared.trainee.optimizer)
    sampler = prepared.sampler
    parts = sampler.parts(chosen.settled.micro_batch_size)
    part, batch, guilty = 0, sampler.batch(left_out.step - 1, 0, parts), None
    if left_out.why == "not finite":
        for number in range(parts):
            tried = sampler.batch(left_out.step - 1, number, parts)
            guilty = _guilty(tried, left_out.step - 1, prepared, environment, autocast)
            if guilty is not None:
                part, batch = number, tried
            if _is_found(guilty, prepared, environment):
                break
    rank = environment.rank
    found = gather(environment, {str(rank): guilty})
    broke = gather(environment, {str(rank): not isfinite(left_out.own_loss)})
    ranks = sorted(found, key=int)
    first = next((int(r) for there in (found, broke) for r in ranks if there[r]), 0)
    place = None
    if rank == first:
        place = keep_batch(prepared.run.left_out, left_out, guilty, part, batch)
    kept = gather(environment, {str(rank): place})[str(first)]
    name = found[str(first)]
    what = f"first not finite: {name}" if name else ""
    if left_out.why == "not finite" and not name:
        what = "with the weights as they are now all of it is finite"
    where = f"process {first}, " if environment.world_size > 1 else ""
    batch_is = f"{where}batch kept in {kept}" if kept else f"{where}part {part} of the step"
    return (
        f"left out     the update of step {left_out.step} ({left_out.why}: loss"
        f" {left_out.loss:.4g}, gradient norm {left_out.norm:.4g}); "
        + "; ".join(text for text in (what, batch_is) if text)
    )


def _guilty(
    batch: Batch,
    step: int,
    prepared: Prepared,
    environment: DistributedEnvironment,
    autocast: AbstractContextManager,
) -> str | None:
    trainee = prepared.trainee
    on_device, items = batch.to(environment.device), prepared.sampler.targets(step)

    def loss() -> Tensor:
        with autocast:
            value, _ = prepared.objective.loss(trainee.called, on_device, items)
        # As in the step, where gradients are averaged later: what overflows only so is seen.
        return trainee.guard.scaled(value * environment.world_size)

    if not is_fully_sharded(trainee.module):
        return find_guilty(trainee.model, loss)
    wait_for_parameters(trainee.optimizer)  # divides what an earlier part's pass left whole
    found = find_guilty_together(
        trainee.model, loss, lambda found: _is_found(found, prepared, environment)
    )
    wait_for_parameters(trainee.optimizer)
    return found


def _is_found(guilty: str | None, prepared: Prepared, environment: DistributedEnvironment) -> bool:
    """Whether to look no further; where processes compute together they stop together."""
    if not is_fully_sharded(prepared.trainee.module):
        return guilty is not None
    found = gather(environment, {str(environment.rank): guilty})
    return any(name is not None for name in found.values())
