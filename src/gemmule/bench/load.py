"""From nothing to the first token: start a process, open a model folder, say a word."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gemmule
from gemmule.bench.models import read_once
from gemmule.bench.rounds import Answers, Effort, Progress, machine, peak, ratios, run_rounds, spread
from gemmule.bench.sides import Library, check_library, our_side, peer_side
from gemmule.bench.stage import Made

PEERS: dict[str, tuple[str, Library]] = {
    "transformers": ("transformers_load", Library("transformers", "parity", "comparing with transformers")),
}


def compare_loading(model: Path, peers: Sequence[str], effort: Effort, progress: Progress) -> dict[str, Any]:
    """Measure the seconds from the start of a process to the weights, and to the first token of a short prompt.

    The files are read once before, so that every side finds them in the system's cache.
    """
    for name in peers:
        check_library(PEERS[name][1], None)
    job = {"model": str(model), "prompt": "Once upon a time", "file_bytes": read_once(model), **effort._asdict()}
    sides = [our_side("gemmule", "load", job), *(peer_side(name, PEERS[name][0], job) for name in peers)]
    return summary(job, run_rounds(sides, effort.rounds, progress))


def make(job: dict[str, Any]) -> Made:
    """Open the model and generate one token; making is the work."""
    model, tokenizer = gemmule.load(job["model"])
    ready = time.time()
    next(iter(gemmule.generate(model, tokenizer, job["prompt"], max_new_tokens=1, temperature=0)))
    first = time.time()
    parameters = list(model.parameters())
    return None, {
        "ready": ready,
        "first_token": first,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
    }


def summary(job: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """Put the answers together: seconds of each side, and theirs over ours."""
    first = {name: [one["first_token"] - one["began"] for one in rounds] for name, rounds in answers.items()}
    sides: dict[str, Any] = {}
    for name, rounds in answers.items():
        sides[name] = {
            "seconds_to_weights": spread(one["ready"] - one["began"] for one in rounds),
            "seconds_to_first_token": spread(first[name]),
            "peak_memory": peak(rounds),
            **{key: rounds[0][key] for key in ("parameters", "dtype", "versions") if key in rounds[0]},
        }
    speeds = {name: [1 / seconds for seconds in values] for name, values in first.items()}
    return {"bench": "load", "machine": machine(), "settings": job, "sides": sides, "ratios": ratios(speeds, "gemmule")}
