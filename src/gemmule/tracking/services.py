"""Tracking services: Weights & Biases, MLflow, trackio. Each has one class, which only its own process loads."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from gemmule.errors import MissingExtra
from gemmule.run_folder import RunFolder
from gemmule.tracking.reader import Record


class Service(Protocol):
    """The client of a service; any error that a method raises ends the process, and what was not sent stays due."""

    url: str | None  # where the remote run is shown, once it is open

    def open(self, run: RunFolder, identity: str) -> int | None:
        """Begin or continue the remote run of this identity; return its last step, None where it is not known."""

    def log(self, records: Sequence[Record]) -> None:
        """Send records, by ascending step."""

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Send a picture, such as the loss curves."""

    def close(self) -> None:
        """Wait until everything is sent, and mark the remote run as finished."""


def _wandb() -> Service:
    from gemmule.tracking.wandb import WeightsAndBiases

    return WeightsAndBiases()


def _mlflow() -> Service:
    from gemmule.tracking.mlflow import MLflow

    return MLflow()


def _trackio() -> Service:
    from gemmule.tracking.trackio import Trackio

    return Trackio()


class ServiceEntry(NamedTuple):
    """A service of the registry; its library and its extra have its name."""

    title: str
    create: Callable[[], Service]


# A new service is a class with the methods of Service, imported in a process of its own.
SERVICES: dict[str, ServiceEntry] = {
    "wandb": ServiceEntry("Weights & Biases", _wandb),
    "mlflow": ServiceEntry("MLflow", _mlflow),
    "trackio": ServiceEntry("trackio", _trackio),
}


def require_library(name: str) -> None:
    """Raise MissingExtra where the library of a service is not installed; does not load it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name, such as the one wandb makes, is no library
        raise MissingExtra(name, name, f"tracking a run in {SERVICES[name].title}")
