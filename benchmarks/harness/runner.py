"""Measurement of one backend, in its own process: python runner.py PROGRAM JOB.

PROGRAM is a file with `setup(job)`; JOB is JSON. Imports the standard library alone, so that any interpreter can run
it. The measurement is a line of JSON on standard output; the process waits until its standard input ends, so that its
memory can be read.
"""

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

# One repetition; returns what the work can be checked by (the loss, the number of tokens, the tokens), for JSON.
Step = Callable[[], Any]
# (the repetition, or None where the setup is what is measured; facts about it)
Workload = tuple[Optional[Step], dict[str, Any]]  # noqa: UP045 - the peer's Python may be older than ours
# (several ways to do the same work, by name; facts)
Choice = tuple[dict[str, Step], dict[str, Any]]


def measure(setup: Callable[[dict[str, Any]], Union[Workload, Choice]], job: dict[str, Any]) -> None:  # noqa: UP007
    """Set up, warm up, time each repetition, and print the measurement; of several ways the fastest is measured."""
    step, facts = setup(job)
    measurement = dict(facts)
    if isinstance(step, dict):
        measurement["tried"] = _try(step)
        measurement["chosen"] = min(measurement["tried"], key=measurement["tried"].__getitem__)
        step = step[measurement["chosen"]]
    if step is not None:
        measurement["results"] = [step() for _ in range(job["warmup"])]
        measurement["seconds"] = list(_times(step, job))
    sys.stdout.write(json.dumps({"measurement": measurement}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def _try(ways: dict[str, Step]) -> dict[str, float]:
    """Return the seconds of each way: of its second repetition, unless the first one leaves it no hope."""
    tried: dict[str, float] = {}
    for name, way in ways.items():
        for _ in range(2):
            began = time.perf_counter()
            way()
            seconds = time.perf_counter() - began
            if tried and seconds > 4 * min(tried.values()):
                break
        tried[name] = seconds
    return tried


def _times(step: Step, job: dict[str, Any]) -> list[float]:
    """Time a fixed number of repetitions, or repeat for some seconds, at least three times."""
    times: list[float] = []
    while len(times) < (job["steps"] or 3) or (not job["steps"] and sum(times) < job["seconds"]):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Run the program of the command line."""
    if Path(sys.path[0]) == Path(__file__).parent:  # it is not with PYTHONSAFEPATH
        sys.path.pop(0)  # a program of a peer must not import this package's modules
    measure(runpy.run_path(sys.argv[1])["setup"], json.loads(sys.argv[2]))
    os._exit(0)  # whatever threads of the peer still run


if __name__ == "__main__":
    main()
