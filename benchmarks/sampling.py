"""How long does it take to draw tokens from logits, in C and in torch?

    python benchmarks/sampling.py [--rows 16] [--vocabulary 262144 4096] [--trials 5] [--threads 2]

Logits are of two kinds: those of a model that is sure (Zipf's law, a few tokens have most of the probability) and those
of one that is not (normal, standard deviation 3). Both draw the same rows in interleaved trials and must draw the same
tokens. Prints one JSON object: medians in milliseconds for all rows, and how many times as long torch takes.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from gemmule.inference.native.sampler import NativeSampler
from gemmule.inference.sampling import REFERENCE, Query, Row, SamplingSettings, uniform
from harness.trials import machine

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "temperature 0.7, min_p 0.1": {"temperature": 0.7, "min_p": 0.1},
    "top_k 40": {"top_k": 40},
    "top_p 0.9": {"top_p": 0.9},
    "penalties, temperature 0.7, min_p 0.1": {
        "temperature": 0.7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
    },
}


def make_logits(kind: str, rows: int, vocabulary: int) -> Tensor:
    """Return logits (rows, vocabulary) of one of the two kinds."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, vocabulary, generator=generator)
    if kind == "normal":
        return 3 * noise
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)]) + 1
    return noise - 2 * ranks.log()


def compare(logits: Tensor, settings: dict[str, Any] | None, trials: int) -> dict[str, float]:
    """Time both, by settings, or without them the log-probabilities of one token and the five likeliest."""
    native, chosen = NativeSampler(), SamplingSettings(**(settings or {}))
    rows = [Row(chosen, range(200), range(150, 300), uniform=uniform(1, at, 0)) for at in range(len(logits))]
    queries = [Query(at, at, 5) for at in range(len(logits))]
    seconds: dict[str, list[float]] = {"torch": [], "c": []}
    for _ in range(trials):
        results = []
        for name, backend in (("torch", REFERENCE), ("c", native)):
            for _ in range(2):  # the first time warms the caches
                began = time.perf_counter()
                if settings is None:
                    found: list[Any] = [answer.likeliest[0][0] for answer in backend.log_probabilities(logits, queries)]
                else:
                    found = backend.draw_rows(logits, rows).tolist()
                elapsed = time.perf_counter() - began
            seconds[name].append(elapsed)
            results.append(found)
        assert results[0] == results[1]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {f"{name}_ms": 1000 * value for name, value in medians.items()} | {
        "ratio": medians["torch"] / medians["c"]
    }
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def main() -> None:
    """Measure every kind of logits, vocabulary and settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[262_144, 4096])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    for vocabulary in options.vocabulary:
        for kind in ("zipf", "normal"):
            logits = make_logits(kind, options.rows, vocabulary)
            result[f"{vocabulary} {kind}"] = {
                name: compare(logits, settings, options.trials)
                for name, settings in ({**SETTINGS, "log-probabilities": None}).items()
            }
    print(json.dumps({"rows": options.rows, "threads": options.threads, **result, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
