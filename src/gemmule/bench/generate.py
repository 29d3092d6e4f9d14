"""Decoding, side by side: one prompt, the likeliest token each time, so many tokens, batch 1."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gemmule
from gemmule.bench.models import read_once
from gemmule.bench.rounds import Answers, Effort, Progress, machine, peak, ratios, run_rounds, spread
from gemmule.bench.sides import Library, check_library, our_side, peer_side
from gemmule.bench.stage import Made
from gemmule.generate.engine import stream_tokens
from gemmule.generate.sampling import SamplingSettings

PROMPT = "Once upon a time"


class Peer(NamedTuple):
    """Another way to run the same weights."""

    program: str
    library: Library
    gguf: str | None  # the number format of the GGUF file that it runs; None where it opens the folder


_LLAMA = Library("llama_cpp", "llama", "comparing with llama.cpp")
PEERS: dict[str, Peer] = {
    "transformers": Peer(
        "transformers_generate", Library("transformers", "parity", "comparing with transformers"), None
    ),
    "llama.cpp": Peer("llama_cpp_generate", _LLAMA, "bf16"),
    "llama.cpp-q8_0": Peer("llama_cpp_generate", _LLAMA, "q8_0"),
}


def compare_generating(
    model: Path, tokens: int, peers: Sequence[str], effort: Effort, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Measure tokens a second of each side on one model folder; GGUF files that peers need are written to `folder`."""
    for name in peers:
        check_library(PEERS[name].library, None)
    read_once(model)
    network, tokenizer = gemmule.load(model)
    dtype = network.embedding.weight.dtype
    job = {
        "model": str(model), "ids": tokenizer.encode(PROMPT), "tokens": tokens, "device": "cpu",
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32", **effort._asdict(),
    }  # fmt: skip
    sides = [our_side("gemmule", "generate", job)]
    for name in peers:
        peer, changed = PEERS[name], dict(job)
        if peer.gguf is not None:
            from gemmule.formats.gguf import save_gguf

            changed["gguf"] = str(folder / f"{peer.gguf}.gguf")
            save_gguf(network, tokenizer, Path(changed["gguf"]), peer.gguf, lambda _: None)
        sides.append(peer_side(name, peer.program, changed))
    limits = peer_side("the machine's limits", "limits", job)
    answers = run_rounds([*sides, limits], effort.rounds, progress)
    limit = statistics.median(answer["bytes"] for answer in answers.pop(limits.name))
    return summary(job, answers, limit)


def make(job: dict[str, Any]) -> Made:
    """Return one continuation through the engine that streams."""
    model, _ = gemmule.load(job["model"], job["device"])
    greedy = SamplingSettings(temperature=0)

    def step() -> float:
        stream = stream_tokens(model, [job["ids"]], job["tokens"], frozenset(), greedy)
        return float(sum(1 for _ in stream))

    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return step, {"weight_bytes": weights, "threads": torch.get_num_threads()}


def summary(job: dict[str, Any], answers: Answers, limit: float) -> dict[str, Any]:
    """Put the answers together: tokens a second, the prompt's pass included, and the share of the reading rate."""
    rates = {
        name: [answer["results"][0] / statistics.median(answer["seconds"]) for answer in rounds]
        for name, rounds in answers.items()
    }
    sides = {
        name: {
            "tokens_per_second": spread(rates[name]),
            # Every token needs all weights once; the tied head reads the whole embedding.
            "share_of_limit": statistics.median(rates[name]) * rounds[0]["weight_bytes"] / limit,
            "peak_memory": peak(rounds),
            **{key: rounds[0][key] for key in ("weight_bytes", "threads", "versions") if key in rounds[0]},
        }
        for name, rounds in answers.items()
    }
    return {
        "bench": "generate",
        "machine": machine(),
        "settings": job,
        "limit": {"what": f"reading memory in {job['precision']}, bytes/s", "measured": limit},
        "sides": sides,
        "ratios": ratios(rates, "gemmule"),
    }
