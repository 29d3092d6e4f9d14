"""Interleaved trials: A B C A B C, so that a change of the machine's speed affects every backend."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from gemmule.processes import terminated_as_interrupted
from harness.backends import Backend, run_backend

Measurements = dict[str, list[dict[str, Any]]]
# (label, done, total)
Progress = Callable[[str, int, int | None], None]


class Budget(NamedTuple):
    """Number of trials; per trial, repetitions of warmup, then seconds of measurement or a number of steps."""

    trials: int
    seconds: float
    steps: int | None
    warmup: int


def run_trials(backends: Sequence[Backend], trials: int, progress: Progress) -> Measurements:
    """Run each backend once per trial, one process at a time; return the measurements of each."""
    measurements: Measurements = {backend.name: [] for backend in backends}
    done, total = 0, trials * len(backends)
    with terminated_as_interrupted():
        for number in range(trials):
            for backend in backends:
                progress(f"trial {number + 1} of {trials}: {backend.name}", done, total)
                measurements[backend.name].append(run_backend(backend))
                done += 1
    return measurements


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, quartiles and the values per trial."""
    found = [float(f"{value:.6g}") for value in values]
    quarters = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": statistics.median(found), "quartiles": [quarters[0], quarters[2]], "trials": found}


def ratios(rates: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Return the speedup of our rate over each other backend's, trial by trial: above 1 we are faster."""
    return {
        name: spread(our_rate / rate for our_rate, rate in zip(rates[ours], others, strict=True))
        for name, others in rates.items()
        if name != ours
    }


def peak(measurements: list[dict[str, Any]]) -> int | None:
    """Return the largest peak memory of several processes, in bytes."""
    return max((one["peak_memory"] for one in measurements if one["peak_memory"] is not None), default=None)


def machine(*libraries: str) -> dict[str, Any]:
    """Describe the machine, and the versions of Gemmule, torch and other libraries that are installed."""
    import torch  # not when this module is imported

    from gemmule.train.environment import processor

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in ("gemmule", "torch", *libraries) if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
