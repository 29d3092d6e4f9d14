"""What `gemmule train` shows and draws of a run: progress, samples, curves, the plan's accuracy."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from gemmule.cli.screen import Screen
from gemmule.cli.training_display import Speed
from gemmule.errors import OutputError
from gemmule.plan.prediction_log import PredictionLog
from gemmule.report.curves import draw_curves
from gemmule.run_folder import RunFolder
from gemmule.train.observer import Observer
from gemmule.train.resolve import ResolvedRecipe

log = logging.getLogger(__name__)


class ScreenObserver(Observer):
    """Shows a run on the screen; what it fails to write costs a warning, never the run."""

    def __init__(self, screen: Screen, run: RunFolder, prediction_log: PredictionLog) -> None:
        self._screen, self._run, self._prediction_log = screen, run, prediction_log
        self._warned: set[str] = set()

    def on_progress(self, task: str, done: int, total: int | None) -> None:
        """Show a progress bar."""
        self._screen.progress(task, done, total)

    def on_prepare_data(self) -> None:
        """Compare no peak memory with the plan, which is of training alone."""
        self._prediction_log.compares_memory = False

    def on_train_begin(self, recipe: ResolvedRecipe) -> None:
        """Plan the run, to be compared with what it measures."""
        self._screen.progress("planning", 0, None)
        self._prediction_log.predict(recipe)

    def on_metrics(self, metrics: dict[str, Any], steps: int) -> None:
        """Show a line of metrics, and draw the curves after a validation."""
        self._prediction_log.observe(metrics)
        of_plan, mfu = self._prediction_log.utilization(metrics["tokens_per_second"])
        self._screen.training(metrics, steps, Speed(of_plan, mfu, self._prediction_log.peak_memory()))
        if "val_loss" in metrics:
            self._attempt(lambda: draw_curves(self._run))

    def on_samples(self, step: int, texts: Sequence[str]) -> None:  # noqa: ARG002 - the screen shows the step already
        """Show the samples."""
        self._screen.samples(texts)

    def conclude(self) -> None:
        """Write plan.json, and say how far the plan was off."""
        if sentence := self._attempt(self._prediction_log.write):
            log.info(sentence)

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (OSError, OutputError) as error:
            if str(error) not in self._warned:
                log.warning(f"{error}; the run continues")
            self._warned.add(str(error))
            return None
