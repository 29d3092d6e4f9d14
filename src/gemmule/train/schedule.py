"""Learning rate over time: pure functions of progress, so that a step's rate needs no state."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from gemmule.recipe import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleSettings(Settings):
    """How the learning rate rises, stays and falls, as shares of the peak and of the run."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    # The share of the run in which the rate rises linearly from nothing to the peak.
    warmup_share: Share = 0.02
    # The rate of the last step, as a share of the peak (cosine and wsd).
    final: Share = 0.1
    # The share of the steps after the warm-up that wsd (warm-up, stable, decay) spends falling linearly to `final`.
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2


def cosine(done: float, settings: ScheduleSettings) -> float:
    """Fall from 1 to `final` along half a cosine as `done` goes from 0 to 1."""
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))


def wsd(done: float, settings: ScheduleSettings) -> float:
    """Stay at 1, then fall linearly to `final` over the last `decay_share` of the run."""
    left = min(1.0, (1 - done) / settings.decay_share)
    return settings.final + (1 - settings.final) * left


def constant(done: float, settings: ScheduleSettings) -> float:  # noqa: ARG001 - one signature for all
    """Stay at 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, ScheduleSettings], float]] = {"cosine": cosine, "wsd": wsd, "constant": constant}


def learning_rate_factor(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Return the share of the peak rate at step 0 <= step < steps; step 0 learns already, the last is at `final`."""
    warmup = round(settings.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return SCHEDULES[settings.name](done, settings)
