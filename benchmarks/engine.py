"""The engine under load: how long a token takes, how long one waits for it, and whether company changes a reply.

    python benchmarks/engine.py --model runs/story/model

Prints a JSON object:

first_token_ms      until the first token of a reply to 200 tokens, when nothing else is done
gap_ms              between two tokens of eight replies while a prompt of --long tokens arrives: median and longest
tokens_per_second   of one and of 16 replies that all have begun, and the ratio of the two
same_replies        of --replies greedy replies, those whose tokens are the same alone and among 15 others
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from gemmule.formats.opening import open_model
from gemmule.inference.engine import Engine
from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.quantize import quantize
from gemmule.inference.requests import Request, SequenceState
from gemmule.inference.runners import DECODINGS
from gemmule.inference.sampling import STORYTELLING, SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.processes import prepare_process
from harness.trials import machine

GREEDY = SamplingSettings(temperature=0)


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

    def rates(self, tokens: int, trials: int) -> dict[str, Any]:
        """Return tokens per second of one reply and of 16, measured in turn."""
        found: dict[int, list[float]] = {1: [], 16: []}
        for _ in range(trials):
            for rows, rates in found.items():
                engine = self.engine(rows, tokens + 40)
                for _ in range(rows):
                    engine.submit(self.request(20, tokens))
                for _ in range(8):  # prompts of 16 are read in three steps
                    engine.step()
                before, count = time.perf_counter(), 0
                for _ in range(tokens - 16):
                    count += len(engine.step())
                rates.append(count / (time.perf_counter() - before))
        rates_of = {str(rows): round(statistics.median(rates)) for rows, rates in found.items()}
        ratios = [together / alone for alone, together in zip(found[1], found[16], strict=True)]
        return {**rates_of, "ratio": round(statistics.median(ratios), 2)}

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


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--decoding", choices=DECODINGS, default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=200, help="of a reply")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--long", type=int, default=20_000, help="tokens of the long prompt; 0 leaves it out")
    parser.add_argument("--replies", type=int, default=0, help="that are compared alone and in a crowd")
    options = parser.parse_args()
    model, _ = open_model(options.model, dtype=torch.float32 if options.precision == "fp32" else torch.bfloat16)
    model = quantize(model) if options.precision == "int8" else model.to(options.device)
    bench = Bench(move_to_huge_pages(model), options.decoding)
    found: dict[str, Any] = {
        "machine": machine(),
        "model": str(options.model),
        "precision": options.precision,
        "decoding": bench.engine(1, 10).decoding,
        "first_token_ms": round(bench.first_token(3 * options.trials), 3),
        "tokens_per_second": bench.rates(options.tokens, options.trials),
    }
    if options.long:
        found["gap_ms"] = bench.gaps(options.long)
    if options.replies:
        found["same_replies"] = bench.same_replies(options.replies, options.tokens)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    prepare_process()
    main()
