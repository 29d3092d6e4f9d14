"""The engine: rates of one row and of many beside the peers', time to a token under load, same replies in a crowd."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gemmule
from gemmule.formats.folder import save_folder
from gemmule.formats.opening import open_model
from gemmule.inference.engine import Engine
from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.quantize import quantize
from gemmule.inference.requests import Request, SequenceState
from gemmule.inference.sampling import STORYTELLING, SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.storybook import stories
from gemmule.tokenizer import Tokenizer
from harness.backends import Library, PeerError, check_library, gemmule_backend, peer_backend
from harness.runner import Workload
from harness.trials import Budget, Measurements, Progress, machine, peak, ratios, run_trials, spread

GREEDY = SamplingSettings(temperature=0)
PROMPT_TOKENS = 20
SEED = 5  # of the stories whose beginnings are the prompts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


class Peer(NamedTuple):
    """Another engine that runs the same weights."""

    program: str
    library: Library
    gguf: Mapping[str, str] | None  # dtype of the GGUF file by precision; None where it opens the folder


PEERS: dict[str, Peer] = {
    "llama.cpp": Peer(
        "llama_cpp_engine",
        Library("llama_cpp", "llama", "comparing with llama.cpp"),
        {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"},
    ),
    "transformers": Peer("transformers_engine", Library("transformers", "parity", "comparing with transformers"), None),
}


def compare_engines(
    model: Path | str,
    peers: Sequence[str],
    budget: Budget,
    folder: Path,
    progress: Progress,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure greedy decoding of one row and of `rows` in each engine, and the latencies of ours.

    `options` are those of the command line: precision, decoding, device, rows, tokens, long, replies. Exports for the
    peers are written to `folder`. Raises PeerError or MissingExtra where a peer is not installed, before the first
    trial.
    """
    precision = options["precision"]
    for name in peers:
        check_library(PEERS[name].library, None)
        if precision == "int8" and PEERS[name].gguf is None:
            raise PeerError(f"--peer {name} has no int8 on a CPU; leave it out, or use --precision bf16")
    network, tokenizer, _ = gemmule.load_with_path(model, dtype=DTYPES[precision])
    job = {
        "model": str(folder / "hf"),
        "prompts": prompts_of(tokenizer, options["rows"]),
        **{name: options[name] for name in ("precision", "decoding", "device", "tokens")},
        **budget._asdict(),
    }
    (folder / "hf").mkdir()
    save_folder(network, tokenizer, folder / "hf", DTYPES[precision])
    backends = []
    for name in ("gemmule", *peers):
        changed = dict(job)
        if name in PEERS and (gguf := PEERS[name].gguf) is not None:
            from gemmule.formats.gguf import save_gguf

            changed["gguf"] = str(folder / f"{gguf[precision]}.gguf")
            save_gguf(network, tokenizer, Path(changed["gguf"]), gguf[precision])
        for rows in (1, options["rows"]):
            one = changed | {"prompts": job["prompts"][:rows]}
            title = f"{name} x{rows}"
            backends.append(
                peer_backend(title, PEERS[name].program, one)
                if name in PEERS
                else gemmule_backend(title, "engine", one)
            )
    latencies = measure_latencies(network, options, budget.trials)
    found = summary(job, run_trials(backends, budget.trials, progress))
    return found | {"model": str(model)} | latencies


def prompts_of(tokenizer: Tokenizer, rows: int) -> list[list[int]]:
    """Return the first tokens of so many stories."""
    return [tokenizer.encode(story.text)[:PROMPT_TOKENS] for story in stories(rows, SEED)]


def prepare(model: Gemma3, precision: str, device: str) -> Gemma3:
    """Return a model as it is decoded: quantized, in huge pages."""
    return move_to_huge_pages(quantize(model) if precision == "int8" else model.to(device))


def setup(job: dict[str, Any]) -> Workload:
    """Return the greedy continuation of all prompts by an engine that has a row for each; its result are the tokens."""
    model = prepare(open_model(job["model"], dtype=DTYPES[job["precision"]])[0], job["precision"], job["device"])
    prompts, tokens = job["prompts"], job["tokens"]
    longest = max(map(len, prompts)) + tokens
    decoding = Engine(model, 1, longest, job["decoding"]).decoding

    def step() -> list[list[int]]:
        engine = Engine(model, len(prompts), longest, decoding)  # of its own, so that no prompt is known
        sequences = [engine.submit(Request(tuple(prompt), tokens, GREEDY))[0] for prompt in prompts]
        while not engine.idle:
            engine.step()
        return [sequence.generated for sequence in sequences]

    return step, {"decoding": decoding, "threads": torch.get_num_threads()}


def summary(job: dict[str, Any], measurements: Measurements) -> dict[str, Any]:
    """Summarize the measurements: tokens per second, prompts included, and whose replies are the same."""
    replies = {name: trials[0]["results"][0] for name, trials in measurements.items()}
    rates = {
        name: [len(replies[name]) * job["tokens"] / statistics.median(one["seconds"]) for one in trials]
        for name, trials in measurements.items()
    }
    ours = f"gemmule x{len(job['prompts'])}"
    backends = {
        name: {
            "tokens_per_second": spread(rates[name]),
            "same_replies": same_of(replies[name], replies[ours]),
            "peak_memory": peak(trials),
            **{key: trials[0][key] for key in ("decoding", "threads", "versions") if key in trials[0]},
            **(ways_of(trials, len(replies[name]) * job["tokens"]) if "chosen" in trials[0] else {}),
        }
        for name, trials in measurements.items()
    }
    return {
        "bench": "engine",
        "machine": machine(),
        "settings": job,
        "backends": backends,
        "ratios": ratios(rates, ours),
    }


def ways_of(trials: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    """Return the way of decoding that each trial chose, and the median tokens per second of all that were tried."""
    return {
        "chosen": [one["chosen"] for one in trials],
        "tried": {
            way: round(statistics.median(tokens / one["tried"][way] for one in trials)) for way in trials[0]["tried"]
        },
    }


def same_of(replies: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    """Return how many replies to the first prompts are the expected ones."""
    same = sum(list(reply) == list(other) for reply, other in zip(replies, expected, strict=False))
    return f"{same} of {len(replies)}"


def measure_latencies(model: Gemma3, options: Mapping[str, Any], trials: int) -> dict[str, Any]:
    """Return the time to the first token, gaps under a long prompt, and replies that are the same in a crowd."""
    bench = Bench(prepare(model, options["precision"], options["device"]), options["decoding"])
    found: dict[str, Any] = {"first_token_ms": round(bench.first_token(3 * trials), 3)}
    if options["long"]:
        found["gap_ms"] = bench.gaps(options["long"])
    if options["replies"]:
        found["same_replies"] = bench.same_replies(options["replies"], options["tokens"])
    return found


class Bench:
    """A model, the decoding that is measured, and prompts of random tokens."""

    def __init__(self, model: Gemma3, decoding: Any) -> None:
        self.model, self.decoding = model, decoding
        self._draw = random.Random(0)

    def request(self, length: int, new: int, sampling: SamplingSettings = STORYTELLING) -> Request:
        """Return a request whose prompt nobody has read."""
        prompt = (self._draw.randrange(self.model.config.vocab_size) for _ in range(length))
        return Request(tuple(prompt), new, sampling, self._draw.getrandbits(32))

    def engine(self, rows: int, longest: int) -> Engine:
        """Return an engine of its own."""
        return Engine(self.model, rows, longest, self.decoding)

    def first_token(self, trials: int) -> float:
        """Return the median of milliseconds until the first token."""
        engine, found = self.engine(1, 300), []
        for _ in range(trials):
            before = time.perf_counter()
            engine.submit(self.request(200, 1))
            while not engine.idle:
                engine.step()
            found.append(time.perf_counter() - before)
        return 1e3 * statistics.median(found)

    def gaps(self, long: int) -> dict[str, float]:
        """Return milliseconds between two tokens of a reply, while a long prompt is read."""
        engine = self.engine(9, long + 40)
        running = [engine.submit(self.request(20, long))[0] for _ in range(8)]
        for _ in range(20):
            engine.step()
        (late,) = engine.submit(self.request(long, 1))
        last: dict[SequenceState, float] = {}
        gaps: dict[SequenceState, list[float]] = defaultdict(list)
        before = time.perf_counter()
        while not late.generated:
            for sequence, _ in engine.step():
                now = time.perf_counter()
                if sequence in last:
                    gaps[sequence].append(now - last[sequence])
                last[sequence] = now
        prompt = time.perf_counter() - before
        engine.cancel(running)
        every = [gap for found in gaps.values() for gap in found]
        return {
            "prompt_tokens": long,
            "prompt_seconds": round(prompt, 3),
            "median": round(1e3 * statistics.median(every), 3),
            "longest": round(1e3 * max(every), 3),
        }

    def same_replies(self, count: int, tokens: int) -> str:
        """Return how many greedy replies are the same alone and among 15 others that come and go."""
        requests = [
            self.request(self._draw.randint(1, 60), self._draw.randint(4, tokens), GREEDY) for _ in range(count)
        ]
        crowd = self.engine(16, tokens + 60)
        together = [crowd.submit(request)[0] for request in requests]
        while not crowd.idle:
            crowd.step()
        same = 0
        for request, state in zip(requests, together, strict=True):
            alone = self.engine(1, tokens + 60)
            (expected,) = alone.submit(request)
            while not alone.idle:
                alone.step()
            same += expected.generated == state.generated
        return f"{same} of {count}"
