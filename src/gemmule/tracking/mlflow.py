"""MLflow; the library reads its server from MLFLOW_TRACKING_URI, a URL or such as sqlite:///runs/mlflow.db."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from gemmule.run_folder import RunFolder
from gemmule.tracking.reader import Record, settings_of

T = TypeVar("T")
_IDENTITY, _SENT = "gemmule.run", "gemmule.step"
# What the API takes at once.
_METRICS, _PARAMS, _PARAM_LENGTH = 1000, 100, 6000


class MLflow:
    """A run of an MLflow experiment."""

    def __init__(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._client, self._metric, self._param, self._tag = MlflowClient(), Metric, Param, RunTag
        self.url: str | None = None

    def open(self, run: RunFolder, identity: str) -> int | None:
        """Find the run by a tag, or create it with the recipe as its parameters."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "gemmule")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`{_IDENTITY}` = '{identity}'", max_results=1)
        if found:
            remote = found[0]
            self._client.update_run(remote.info.run_id, "RUNNING")
        else:
            remote = self._client.create_run(number, tags={_IDENTITY: identity}, run_name=run.path.name)
            params = [self._param(key, str(value)[:_PARAM_LENGTH]) for key, value in settings_of(run).items()]
            for some in _slices(params, _PARAMS):
                self._client.log_batch(remote.info.run_id, params=some)
        self._id, self._started = remote.info.run_id, remote.info.start_time
        return int(remote.data.tags.get(_SENT, 0))

    def log(self, records: Sequence[Record]) -> None:
        """Log metrics, and samples as artifacts.

        The time of a record is that of training, so that a record sent twice is the same and kept once.
        """
        for record in records:
            for name, text in record.texts.items():
                self._client.log_text(self._id, text, f"{name}/step-{record.step:08d}.txt")
        metrics = [
            self._metric(tag, value, self._started + round(1000 * record.seconds), record.step)
            for record in records
            for tag, value in record.metrics.items()
        ]
        for some in _slices(metrics, _METRICS):
            self._client.log_batch(self._id, metrics=some)
        self._client.log_batch(self._id, tags=[self._tag(_SENT, str(records[-1].step))])

    def log_image(self, name: str, png: Path, step: int) -> None:  # noqa: ARG002 - an artifact has the file's name
        """Log the picture as an artifact, in place of an earlier one."""
        self._client.log_artifact(self._id, str(png))

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


def _slices(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
