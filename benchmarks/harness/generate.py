"""Decoding throughput: greedy continuation of one prompt, batch 1."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gemmule
from gemmule.inference.engine import stream_tokens
from gemmule.inference.sampling import SamplingSettings
from harness.backends import Library, check_library, gemmule_backend, peer_backend
from harness.models import read_once
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, peak, ratios, run_trials, spread

PROMPT = "Once upon a time"


class Peer(NamedTuple):
    """Another implementation that runs the same weights."""

    program: str
    library: Library
    gguf: str | None  # dtype of the GGUF file that it opens; None where it opens the folder


_LLAMA = Library("llama_cpp", "llama", "comparing with llama.cpp")
PEERS: dict[str, Peer] = {
    "transformers": Peer(
        "transformers_generate", Library("transformers", "parity", "comparing with transformers"), None
    ),
    "llama.cpp": Peer("llama_cpp_generate", _LLAMA, "bf16"),
    "llama.cpp-q8_0": Peer("llama_cpp_generate", _LLAMA, "q8_0"),
}


def compare_generating(
    model: Path, tokens: int, peers: Sequence[str], budget: Budget, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Measure tokens per second of each backend on one model folder; GGUF files for peers are written to `folder`."""
    for name in peers:
        check_library(PEERS[name].library, None)
    read_once(model)
    network, tokenizer = gemmule.load(model)
    dtype = network.embedding.weight.dtype
    job = {
        "model": str(model), "ids": tokenizer.encode(PROMPT), "tokens": tokens, "device": "cpu",
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32", **budget._asdict(),
    }  # fmt: skip
    backends = [gemmule_backend("gemmule", "generate", job)]
    for name in peers:
        peer, changed = PEERS[name], dict(job)
        if peer.gguf is not None:
            from gemmule.formats.gguf import save_gguf

            changed["gguf"] = str(folder / f"{peer.gguf}.gguf")
            save_gguf(network, tokenizer, Path(changed["gguf"]), peer.gguf)
        backends.append(peer_backend(name, peer.program, changed))
    limits = peer_backend("the machine's limits", "limits", job)
    measurements = run_trials([*backends, limits], budget.trials, progress)
    limit = statistics.median(one["bytes"] for one in measurements.pop(limits.name))
    return summary(job, measurements, limit)


def setup(job: dict[str, Any]) -> Workload:
    """Return one continuation by the streaming engine."""
    model, _ = gemmule.load(job["model"], job["device"])
    greedy = SamplingSettings(temperature=0)

    def step() -> float:
        stream = stream_tokens(model, [job["ids"]], job["tokens"], frozenset(), greedy)
        return float(sum(1 for _ in stream))

    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return step, {"weight_bytes": weights, "threads": torch.get_num_threads()}


def summary(job: dict[str, Any], measurements: Measurements, limit: float) -> dict[str, Any]:
    """Summarize the measurements: tokens per second, prefill included, and the share of the memory bandwidth."""
    rates = {
        name: [one["results"][0] / statistics.median(one["seconds"]) for one in trials]
        for name, trials in measurements.items()
    }
    backends = {
        name: {
            "tokens_per_second": spread(rates[name]),
            # Each token reads all weights once; the output head of tied embeddings reads the whole table.
            "share_of_limit": statistics.median(rates[name]) * trials[0]["weight_bytes"] / limit,
            "peak_memory": peak(trials),
            **{key: trials[0][key] for key in ("weight_bytes", "threads", "versions") if key in trials[0]},
        }
        for name, trials in measurements.items()
    }
    return {
        "bench": "generate",
        "machine": machine(),
        "settings": job,
        "limit": {"what": f"reading memory in {job['precision']}, bytes/s", "measured": limit},
        "backends": backends,
        "ratios": ratios(rates, "gemmule"),
    }
