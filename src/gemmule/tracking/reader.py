"""What a run folder has for a tracking service: its logs as records, read while the run writes them."""

import json
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gemmule.growing_file import GrowingFile
from gemmule.run_folder import RunFolder
from gemmule.tracking.tags import TAGS

# Characters of a sample that a service gets.
_MAX_TEXT = 65_536


class Record(NamedTuple):
    """What was logged of a step."""

    step: int
    seconds: float  # of training, since the start of the run
    metrics: dict[str, float]  # by tag
    texts: dict[str, str]  # samples, by tag


class RunReader:
    """Reads the records of a run after a step, each once and complete."""

    def __init__(self, run: RunFolder, after: int) -> None:
        self._after = after
        self._metrics, self._samples = GrowingFile(run.metrics), GrowingFile(run.samples)
        self._pending: list[dict[str, Any]] = []
        self._texts: defaultdict[int, dict[str, str]] = defaultdict(dict)

    def read(self, ended: bool = False) -> list[Record]:
        """Return the records that were completed since the last call.

        The samples of a step follow its metrics, so a validated step is complete when the next one is logged, or when
        the run has `ended`.
        """
        self._pending += [line for line in _lines(self._metrics) if line["step"] > self._after]
        for line in _lines(self._samples):  # after the metrics: what they complete is there
            texts = self._texts[line["step"]]
            texts[f"sample/{len(texts)}"] = str(line.get("text", ""))[:_MAX_TEXT]
        open_steps = 1 if self._pending and "val_loss" in self._pending[-1] and not ended else 0
        complete = self._pending[: len(self._pending) - open_steps]
        self._pending = self._pending[len(complete) :]
        records = [self._record(line) for line in complete]
        if records:
            self._after = records[-1].step
            for step in [step for step in self._texts if step <= self._after]:
                del self._texts[step]
        return records

    def _record(self, line: Mapping[str, Any]) -> Record:
        given = {tag: float(line[key]) for key, tag in TAGS.items() if isinstance(line.get(key), int | float)}
        return Record(line["step"], float(line.get("seconds", 0.0)), given, self._texts.get(line["step"], {}))


def _lines(file: GrowingFile) -> Iterator[dict[str, Any]]:
    return (line for line in file.read() if isinstance(line.get("step"), int))


def settings_of(run: RunFolder) -> dict[str, str | int | float | bool]:
    """Return the resolved recipe with dotted keys, as services list settings."""
    flat: dict[str, str | int | float | bool] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                add(f"{prefix}.{key}" if prefix else key, each)
        else:
            flat[prefix] = value if isinstance(value, str | int | float) else json.dumps(value, default=str)

    add("", tomllib.loads(run.recipe.read_text(encoding="utf-8")))
    return flat
