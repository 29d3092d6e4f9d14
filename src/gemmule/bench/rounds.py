"""Rounds: every side in turn, again and again, so that what changes on the machine meets all of them."""

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.bench.sides import Side, run_side, terminated_as_interrupted

Answers = dict[str, list[dict[str, Any]]]
# (what is being done, how much is done, of how much)
Progress = Callable[[str, int, int | None], None]


class Effort(NamedTuple):
    """How long is measured: in each round, after so many steps of warming up, so many steps, or so many seconds."""

    rounds: int
    seconds: float
    steps: int | None
    warmup: int


def run_rounds(sides: Sequence[Side], rounds: int, progress: Progress) -> Answers:
    """Run each side once a round, one process alive at a time; return the answers of each."""
    answers: Answers = {side.name: [] for side in sides}
    done, total = 0, rounds * len(sides)
    with terminated_as_interrupted():
        for number in range(rounds):
            for side in sides:
                progress(f"round {number + 1} of {rounds}: {side.name}", done, total)
                answers[side.name].append(run_side(side))
                done += 1
    return answers


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, quartiles and the values of the rounds themselves."""
    found = [float(f"{value:.6g}") for value in values]
    quarters = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": statistics.median(found), "quartiles": [quarters[0], quarters[2]], "rounds": found}


def ratios(rates: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Compare our rate with each other side's, round by round: above 1 we are faster."""
    return {
        name: spread(mine / theirs for mine, theirs in zip(rates[ours], others, strict=True))
        for name, others in rates.items()
        if name != ours
    }


def peak(answers: list[dict[str, Any]]) -> int | None:
    """Return the most memory that any of some processes had, in bytes."""
    return max((answer["peak_memory"] for answer in answers if answer["peak_memory"] is not None), default=None)


def machine(*libraries: str) -> dict[str, Any]:
    """Describe the machine, and the versions of Gemmule, torch and other libraries that are installed."""
    import torch  # by a parent that only waits, not before

    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
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
