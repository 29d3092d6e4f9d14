"""What the engine's thread hands over to the event loop: the parts of a reply, joined while nobody takes them."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemmule.inference.engine import Engine
from gemmule.inference.requests import Event, Request, SequenceState
from gemmule.inference.sampling import LogProbabilities
from gemmule.serve.failures import ApiError


class Got(NamedTuple):
    """What a sequence got in a step, as in `TokenEvent`, and time.monotonic() at the end of that step."""

    event: Event | None
    moment: float


# Tokens of each choice that wait as parts of their own; more are joined, since then the client is slow.
_SEPARATE = 512


@dataclass(slots=True)
class Part:
    """What a choice got: a token, or several where the client was slow."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[LogProbabilities] = field(default_factory=list)
    finish: str | None = None

    @classmethod
    def of(cls, event: Event) -> "Part":
        """Return the part of one token."""
        scores = event.log_probabilities
        return cls(event.text, [event.token], [] if scores is None else [scores], event.finish)

    def join(self, later: "Part") -> None:
        """Add what came after it."""
        self.text += later.text
        self.tokens += later.tokens
        self.scores += later.scores
        self.finish = later.finish


@dataclass
class Times:
    """When a request was submitted, began to be read, and got its first and last token; time.monotonic()."""

    submitted: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None


class Reply:
    """All choices of one request, filled by the engine's thread and read in the event loop.

    `requests` has an engine request for each prompt; choice c is sample c % samples of prompt c // samples. Where it is
    not `streamed`, its reader is woken when a choice is finished, else also when tokens have come.
    """

    def __init__(self, requests: Sequence[Request], *, streamed: bool) -> None:
        self.requests, self.streamed = requests, streamed
        self.samples = requests[0].samples
        self.choices = self.samples * len(requests)
        self.cached = [0] * len(requests)
        self.prompt_scores: list[Sequence[LogProbabilities]] = [()] * len(requests)
        self.generated = 0
        self.times = Times(time.monotonic())
        self.error: ApiError | None = None
        self.left = self.choices
        self.observe_gap: Callable[[float], None] = lambda _: None  # called with the seconds between two tokens
        self._last: dict[int, float] = {}  # when each choice got its last token
        self._parts: list[tuple[int, Part]] = []  # with their choices
        self._ready = asyncio.Event()
        # The engine thread's own, which the event loop does not touch.
        self.sequences: list[SequenceState] = []
        self.engine: Engine | None = None

    def deliver(self, choice: int, sequence: SequenceState, given: Sequence[Got]) -> None:
        """Add what a choice got, in order; in the event loop."""
        last = self._last.get(choice)
        for event, moment in given:
            if last is None:
                self._begin(choice, sequence, moment)
            else:
                self.observe_gap(moment - last)
            last = moment
            part = Part(finish=sequence.finish) if event is None else Part.of(event)
            self._parts.append((choice, part))
            self.generated += len(part.tokens)
            if part.finish:
                self.left -= 1
                self._ready.set()
        if last is not None:
            self._last[choice] = self.times.last = last
        if len(self._parts) > _SEPARATE * self.choices:
            self._parts = [*join_parts(self._parts).items()]
        if self.streamed:
            self._ready.set()

    def _begin(self, choice: int, sequence: SequenceState, moment: float) -> None:
        """Note what the first token of a choice brings."""
        prompt, sample = divmod(choice, self.samples)
        self.cached[prompt] = sequence.cached
        if sample == 0:
            self.prompt_scores[prompt] = sequence.prompt_log_probabilities
        self.times.first = self.times.first or moment

    def fail(self, error: ApiError) -> None:
        """End with an error; in the event loop."""
        if self.left and self.error is None:
            self.error = error
            self._ready.set()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or not self.left

    async def parts(self) -> list[tuple[int, Part]]:
        """Wait for what comes next, and return it with its choices; nothing at the end. Raises the reply's error."""
        if not self._parts and not self.over:
            await self._ready.wait()
        self._ready.clear()
        parts, self._parts = self._parts, []
        if not parts and self.error is not None:
            raise self.error
        return parts


def join_parts(parts: Iterable[tuple[int, Part]]) -> dict[int, Part]:
    """Join the parts of each choice."""
    joined: dict[int, Part] = {}
    for choice, part in parts:
        if choice in joined:
            joined[choice].join(part)
        else:
            joined[choice] = part
    return joined
