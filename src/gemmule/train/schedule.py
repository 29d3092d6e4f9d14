"""Learning rate over time: pure functions of progress, so that a step's rate needs no state."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated

from pydantic import Field

from gemmule.fields import CountFrom0, Share, Text
from gemmule.settings import Problem, Settings


class ScheduleSettings(Settings):
    """How the learning rate rises, stays and falls, as shares of the peak and of the run."""

    name: Text = Field("cosine", description="shape of the decay: cosine, wsd (warmup, stable, decay) or constant")
    warmup_share: Share = Field(
        0.02, description="share of the steps in which the learning rate rises linearly from 0 to its peak"
    )
    final: Share = Field(0.1, description="learning rate of the last step as a share of the peak, under cosine and wsd")
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of the steps after the warmup in which wsd falls linearly to `final`"
    )

    restart_step: CountFrom0 = Field(
        0, description="step at which warmup and decay begin anew (warm restart); set by --extend"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield schedules that do not exist."""
        if self.name not in SCHEDULES:
            yield Problem("name", self.name, f"no such schedule; there are {', '.join(SCHEDULES)}")


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


def lr_scale(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Return the share of the peak rate at step 0 <= step < steps; step 0 learns already, the last is at `final`.

    A warm restart ends one schedule at `restart_step` and begins another, of the steps that are left.
    """
    if step < settings.restart_step:
        steps = settings.restart_step
    else:
        step, steps = step - settings.restart_step, steps - settings.restart_step
    warmup = round(settings.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return SCHEDULES[settings.name](done, settings)
