"""Run tracking: a run's metrics, samples and pictures go to the trackers that the recipe names."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from gemmule.errors import GemmuleError, MissingExtra, RecipeError
from gemmule.files import reason_of
from gemmule.run_folder import RunFolder
from gemmule.settings import Problem, Settings

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run is shown while it trains; an error that a method raises ends the tracking, never the run."""

    def start(self, run: RunFolder, step: int) -> None:
        """Begin after `step` steps; what an earlier process logged of later steps is replaced."""

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, such as a sample."""

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Log a picture, such as the loss curves."""

    def stop(self) -> None:
        """Begin to end, without waiting: nothing more will be logged."""

    def finish(self) -> None:
        """Write what is buffered, and close what is open."""


def _tensorboard() -> Tracker:
    from gemmule.tracking.tensorboard import TensorBoard

    return TensorBoard()


def _service(name: str) -> Tracker:
    from gemmule.tracking.process import ServiceProcess

    return ServiceProcess(name)


# A new tracker is a class with the methods of Tracker, imported when a recipe names it; one that needs a service on the
# network is an entry of SERVICES in services.py, too.
TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": partial(_service, "wandb"),
    "mlflow": partial(_service, "mlflow"),
    "trackio": partial(_service, "trackio"),
}


class TrackingSettings(Settings):
    """Where a run is shown besides metrics.jsonl and samples.jsonl, which every run writes."""

    to: tuple[str, ...] = Field(
        ("tensorboard",),
        strict=False,
        description="trackers that get metrics, samples, loss curves: tensorboard, wandb, mlflow, trackio; [] for none",
    )

    def problems(self) -> Iterator[Problem]:
        """Yield trackers that do not exist."""
        for name in self.to:
            if name not in TRACKERS:
                yield Problem("to", name, f"no such tracker; there are {', '.join(TRACKERS)}")


def with_trackers(settings: TrackingSettings, names: Sequence[str]) -> TrackingSettings:
    """Add the trackers of `--track`; RecipeError for one that does not exist, MissingExtra where its library lacks."""
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"--track {name}: no such tracker; there are {', '.join(TRACKERS)}")
        TRACKERS[name]()
    return settings.replace(to=tuple(dict.fromkeys([*settings.to, *names]))) if names else settings


class Tracking:
    """The trackers of a run as one; what fails is logged once and left out from there on."""

    def __init__(self, settings: TrackingSettings, run: RunFolder, step: int) -> None:
        """Start each tracker of the settings after `step` steps."""
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(settings.to):
            try:
                tracker = TRACKERS[name]()
            except MissingExtra as error:
                log.info(str(error))
            else:
                self._trackers[name] = tracker
        self._each(lambda tracker: tracker.start(run, step))

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        self._each(lambda tracker: tracker.log_metrics(metrics))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, such as a sample."""
        self._each(lambda tracker: tracker.log_text(name, text, step))

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Log a picture, such as the loss curves."""
        self._each(lambda tracker: tracker.log_image(name, png, step))

    def stop(self) -> None:
        """Begin to end, all trackers at once: nothing more will be logged."""
        self._each(lambda tracker: tracker.stop())

    def finish(self) -> None:
        """Write what is buffered, and close what is open, after `stop`."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # of libraries and services that are not ours
                del self._trackers[name]
                with suppress(Exception):
                    tracker.finish()
                log.warning(
                    f"tracking.to = {name}: {_reason(error)}; the run continues without it, and metrics.jsonl has all"
                )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return reason_of(error)
    return str(error) if isinstance(error, GemmuleError) else f"{type(error).__name__}: {error}"
