"""Figures for Prometheus."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from gemmule.inference.engine import Engine
from gemmule.serve.replies import Reply

if TYPE_CHECKING:
    from gemmule.serve.models import ServedModel

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class StepHistogram(Collector):
    """A histogram that one thread fills, in a tenth of the time of the library's: once a token is often."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._meaning, self._bounds = name, meaning, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def observe(self, number: float) -> None:
        """Count a number."""
        self._counts[bisect_left(self._bounds, number)] += 1
        self._sum += number

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the histogram as Prometheus has it; any thread may ask."""
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        buckets = [*zip(bounds, map(float, accumulate(self._counts)), strict=True)]
        yield HistogramMetricFamily(self._name, self._meaning, buckets, self._sum)


class Metrics:
    """All figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("gemmule_requests", "Answered requests.", ["endpoint", "outcome"], registry=registry)
        self.running = Gauge("gemmule_sequences_running", "Sequences that have a row.", ["model"], registry=registry)
        self.queued = Gauge("gemmule_sequences_queued", "Sequences in the queue.", ["model"], registry=registry)
        self.cache = Gauge("gemmule_cache_bytes", "Held pages of the KV cache.", ["model"], registry=registry)
        self.read = Counter("gemmule_prompt_tokens", "Prompt tokens that were computed.", registry=registry)
        self.cached = Counter("gemmule_cached_tokens", "Prompt tokens from the cache.", registry=registry)
        self.generated = Counter("gemmule_generated_tokens", "Generated tokens.", registry=registry)
        self.rows = StepHistogram("gemmule_step_rows", "Tokens drawn per step.", _ROWS, registry)
        self.wait = self._seconds("queue", "From submission to the first piece of the prompt.")
        self.first = self._seconds("first_token", "From submission to the first token.")
        self.gap = StepHistogram("gemmule_token_gap_seconds", "Between two tokens of a reply.", _GAPS, registry)
        self.whole = self._seconds("request", "From submission to the last token.")

    def _seconds(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"gemmule_{name}_seconds", meaning, buckets=_SECONDS, registry=self.registry)

    def observe_engines(self, engines: "Mapping[Engine, ServedModel]") -> None:
        """Note how full the engines are."""
        for engine, served in engines.items():
            self.running.labels(served.id).set(engine.running)
            self.queued.labels(served.id).set(len(engine.queued))
            self.cache.labels(served.id).set(engine.cache.used_bytes)

    def observe_step(self, tokens: int) -> None:
        """Note a step that drew so many tokens."""
        self.rows.observe(tokens)
        self.generated.inc(tokens)

    def count_prompt(self, tokens: int, cached: int) -> None:
        """Note a prompt that begins to be read."""
        self.read.inc(tokens - cached)
        self.cached.inc(cached)

    def observe_reply(self, reply: Reply) -> None:
        """Note the times of a reply that is over."""
        times = reply.times
        for histogram, moment in ((self.wait, times.admitted), (self.first, times.first), (self.whole, times.last)):
            if moment is not None:
                histogram.observe(moment - times.submitted)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
