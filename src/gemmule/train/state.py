"""The state of a run: what a checkpoint holds, and what a resumed run starts from."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gemmule.settings import Settings
from gemmule.train.optim import Optimizers
from gemmule.train.parallel import Parallel
from gemmule.train.schedule import ScheduleSettings
from gemmule.train.settings import TrainSettings

if TYPE_CHECKING:  # the loop does not need adapter folders
    from gemmule.train.lora import Adapter


class LossEMA(Settings):
    """Exponential moving average of the loss and of its variance over some fifty steps: the spike detector."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def updated(self, loss: float) -> "LossEMA":
        """Return the average with one more loss."""
        weight = max(0.02, 1 / (self.steps + 1))
        deviation = loss - self.mean
        mean = self.mean + weight * deviation
        variance = (1 - weight) * (self.variance + weight * deviation * deviation)
        return LossEMA(steps=self.steps + 1, mean=mean, variance=variance)

    def detects_spike(self, loss: float) -> bool:
        """Whether a loss exceeds the mean by six standard deviations, and by 5 % of the mean at least."""
        return self.steps >= 50 and loss - self.mean > max(6 * math.sqrt(self.variance), 0.05 * self.mean)


class Position(Settings):
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    # Targets trained on so far.
    tokens: int = 0
    # Steps skipped because their loss or gradient was not finite.
    skipped: int = 0
    # The newest step whose weights gave a finite loss and gradient; those of later ones may be broken.
    last_finite_step: int | None = None
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float = 0.0
    level: LossEMA = LossEMA()
    # Bytes of metrics.jsonl and samples.jsonl that belong to the steps so far.
    metrics_bytes: int = 0
    samples_bytes: int = 0
    # Metrics of this step whose validation and samples are still to come; a resumed run makes them first.
    pending: dict[str, int | float] | None = None

    def is_over(self, settings: TrainSettings, schedule: ScheduleSettings) -> bool:
        """Whether all steps are taken, or validation has not improved for `early_stopping` validations."""
        if self.step >= settings.steps or settings.early_stopping is None or self.best_step is None:
            return self.step >= settings.steps
        since = max(self.best_step, schedule.restart_step)
        return self.step - since >= settings.early_stopping * settings.validate_every

    def after_step(self, loss: float, num_targets: int) -> "Position":
        """Return the position after one more update of the weights."""
        tokens, level = self.tokens + num_targets, self.level.updated(loss)
        return self.replace(step=self.step + 1, last_finite_step=self.step, tokens=tokens, level=level, pending=None)

    def after_skipped(self) -> "Position":
        """Return the position after a step that was skipped."""
        return self.replace(step=self.step + 1, skipped=self.skipped + 1, pending=None)


@dataclass
class TrainState:
    """What a checkpoint holds: weights, optimizer state and the position in the run."""

    parallel: Parallel
    optimizers: Optimizers
    position: Position = field(default_factory=Position)
    adapter: "Adapter | None" = None  # which is all that learns
