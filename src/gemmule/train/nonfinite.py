"""Losses, gradients and weights that are not finite: which steps are skipped, and what is never saved."""

import logging
import math
from collections.abc import Callable

from gemmule.errors import TrainingError
from gemmule.model.finite import is_finite
from gemmule.train.parallel import Parallel
from gemmule.train.settings import TrainSettings
from gemmule.train.state import Position, TrainState

log = logging.getLogger(__name__)

_ADVICE = (
    "Try a lower learning rate: --resume --allow-changes with --set optimizer.learning_rate=... or a larger "
    "schedule.warmup_share resumes from the newest checkpoint"
)


def skip_or_abort_nonfinite_step(
    state: TrainState,
    loss: float,
    grad_norm: float,
    measure_other_rows: Callable[[], tuple[float, float]],
    settings: TrainSettings,
    save: Callable[[Position], None],
) -> None:
    """Skip a step whose loss or gradient norm is not finite, as `train.max_skipped_steps` allows; else TrainingError.

    The state before the step is saved, unless the weights are the cause: then the loss and gradient norm of other rows
    are not finite either. Weights may be so large that no gradient is finite, and yet be finite themselves.
    """
    step = state.position.step
    sentence = (
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the weights were not updated "
        f"({rows_of_step(step, settings)})"
    )
    if state.position.skipped < settings.max_skipped_steps:
        log.warning(f"{sentence}; skipped, as train.max_skipped_steps = {settings.max_skipped_steps} allows")
        return
    name = nonfinite_weight(state.parallel)
    if name is not None or not all(map(math.isfinite, measure_other_rows())):
        cause = f"{name} has values that are not finite" if name else "The next rows give the same"
        raise TrainingError(
            f"{sentence}. {cause}: the weights are broken, and are not saved. {_ADVICE}; if that is of step {step}, "
            "delete its folder first"
        )
    save(state.position)
    raise TrainingError(
        f"{sentence}. The state before the step is saved: the same command with --resume repeats it. {_ADVICE}; "
        "--set train.max_skipped_steps=N skips such batches"
    )


def check_finite_weights(parallel: Parallel, step: int) -> None:
    """Raise TrainingError rather than save weights of which some are not finite."""
    if (name := nonfinite_weight(parallel)) is not None:
        raise TrainingError(f"after step {step}: {name} has values that are not finite, so nothing is saved. {_ADVICE}")


def nonfinite_weight(parallel: Parallel) -> str | None:
    """Return the name of a parameter with a value that is not finite, on any rank; None where all are finite."""
    shards = ((name, getattr(p, "_local_tensor", p)) for name, p in parallel.model.named_parameters())
    found = next((name for name, values in shards if not is_finite(values)), None)
    (ranks,) = parallel.world.all_reduce_sum(found is not None)
    return found or ("a parameter of another rank" if ranks else None)


def rows_of_step(step: int, settings: TrainSettings) -> str:
    """Name the rows of a step, for messages."""
    first = step * settings.batch_size
    return f"rows {first} to {first + settings.batch_size - 1} of the training stream"
