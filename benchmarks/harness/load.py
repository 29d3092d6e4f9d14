"""Loading time: from the start of a process to the weights, and to the first token."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gemmule
from harness.backends import Library, check_library, gemmule_backend, peer_backend
from harness.models import read_once
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, peak, ratios, run_trials, spread

PEERS: dict[str, tuple[str, Library]] = {
    "transformers": ("transformers_load", Library("transformers", "parity", "comparing with transformers")),
}


def compare_loading(model: Path, peers: Sequence[str], budget: Budget, progress: Progress) -> dict[str, Any]:
    """Measure the seconds from the start of a process to the weights, and to the first token of a short prompt.

    The files are read once before, so that they are in the page cache for every backend.
    """
    for name in peers:
        check_library(PEERS[name][1], None)
    job = {"model": str(model), "prompt": "Once upon a time", "file_bytes": read_once(model), **budget._asdict()}
    backends = [gemmule_backend("gemmule", "load", job), *(peer_backend(name, PEERS[name][0], job) for name in peers)]
    return summary(job, run_trials(backends, budget.trials, progress))


def setup(job: dict[str, Any]) -> Workload:
    """Open the model and generate one token; the setup is what is measured."""
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


def summary(job: dict[str, Any], measurements: Measurements) -> dict[str, Any]:
    """Summarize the measurements: seconds per backend, and the speedup."""
    first = {name: [one["first_token"] - one["began"] for one in trials] for name, trials in measurements.items()}
    backends: dict[str, Any] = {}
    for name, trials in measurements.items():
        backends[name] = {
            "seconds_to_weights": spread(one["ready"] - one["began"] for one in trials),
            "seconds_to_first_token": spread(first[name]),
            "peak_memory": peak(trials),
            **{key: trials[0][key] for key in ("parameters", "dtype", "versions") if key in trials[0]},
        }
    speeds = {name: [1 / seconds for seconds in values] for name, values in first.items()}
    return {
        "bench": "load",
        "machine": machine(),
        "settings": job,
        "backends": backends,
        "ratios": ratios(speeds, "gemmule"),
    }
