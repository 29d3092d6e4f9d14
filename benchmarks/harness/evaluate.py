"""Evaluation throughput: the loss of stories, each on its own, on a CPU in fp32."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gemmule
from gemmule.data.settings import DataSettings
from gemmule.evaluate.text import score_text
from gemmule.storybook import stories
from harness.backends import Library, check_library, gemmule_backend, peer_backend
from harness.models import read_once
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, peak, ratios, run_trials, spread

PEERS: dict[str, tuple[str, Library]] = {
    "transformers": ("transformers_evaluate", Library("transformers", "parity", "comparing with transformers")),
}
SEPARATOR = "<|endoftext|>"
SEED = 4  # of the stories: neither those of training nor of validation


def compare_evaluating(
    model: Path, documents: int, peers: Sequence[str], budget: Budget, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Measure tokens per second of each backend on the same stories, tokenization included."""
    for name in peers:
        check_library(PEERS[name][1], None)
    read_once(model)
    text = folder / "stories.txt"
    text.write_text(SEPARATOR.join(story.text for story in stories(documents, SEED)), encoding="utf-8")
    job = {"model": str(model), "text": str(text), "separator": SEPARATOR, **budget._asdict()}
    backends = [gemmule_backend("gemmule", "evaluate", job)]
    backends += [peer_backend(name, PEERS[name][0], job) for name in peers]
    return summary({**job, "documents": documents}, run_trials(backends, budget.trials, progress))


def setup(job: dict[str, Any]) -> Workload:
    """Return one evaluation of all stories, as `gemmule evaluate` computes it; its figure is nats per token."""
    model, tokenizer = gemmule.load(job["model"])
    model, settings = model.float(), DataSettings(train=(job["text"],), separator=job["separator"])

    def step() -> float:
        return float(score_text(model, tokenizer, settings).figures()["loss"])

    tokens = score_text(model, tokenizer, settings).figures()["tokens"]
    return step, {"tokens": tokens, "threads": torch.get_num_threads()}


def summary(job: dict[str, Any], measurements: Measurements) -> dict[str, Any]:
    """Summarize the measurements: tokens per second, and the loss, which is to be the same."""
    rates = {
        name: [one["tokens"] / statistics.median(one["seconds"]) for one in trials]
        for name, trials in measurements.items()
    }
    backends = {
        name: {
            "tokens_per_second": spread(rates[name]),
            "loss": trials[0]["results"][0],
            "peak_memory": peak(trials),
            **{key: trials[0][key] for key in ("tokens", "threads", "versions") if key in trials[0]},
        }
        for name, trials in measurements.items()
    }
    return {
        "bench": "evaluate",
        "machine": machine(),
        "settings": job,
        "backends": backends,
        "ratios": ratios(rates, "gemmule"),
    }
