"""One side of a comparison, in a process of its own: python stage.py PROGRAM JOB.

PROGRAM is a file with `make(job)`; JOB is JSON. Needs nothing but Python, so that any interpreter can run it. The
answer is a line of JSON on standard output; the process stays until its input ends, so that its memory can be read.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any, Optional

# Does the work once; returns a number that tells that it was done (the loss, the tokens), as the work defines it.
Step = Callable[[], float]
# (what is repeated, or None where making was the work; facts about it)
Made = tuple[Optional[Step], dict[str, Any]]  # noqa: UP045 - the peer's Python may be older than ours


def perform(make: Callable[[dict[str, Any]], Made], job: dict[str, Any]) -> None:
    """Make, warm up, time each repetition, and tell."""
    step, facts = make(job)
    answer = dict(facts)
    if step is not None:
        answer["results"] = [step() for _ in range(job["warmup"])]
        answer["seconds"] = list(_times(step, job))
    sys.stdout.write(json.dumps({"answer": answer}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


def _times(step: Step, job: dict[str, Any]) -> list[float]:
    """Time a fixed number of repetitions, or as many as fill some seconds, three at least."""
    times: list[float] = []
    while len(times) < (job["steps"] or 3) or (not job["steps"] and sum(times) < job["seconds"]):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Run the program that the command line names."""
    sys.path.pop(0)  # the files beside this one are nobody's modules
    perform(runpy.run_path(sys.argv[1])["make"], json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
