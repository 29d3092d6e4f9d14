"""What the engine's thread hands to the event loop: the parts of a reply, joined while nobody takes them."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemmule.inference.engine import Engine
from gemmule.inference.requests import Request, SequenceState
from gemmule.inference.sampling import LogProbabilities
from gemmule.serve.failures import ApiError


class Update(NamedTuple):
    """One token of a choice, as the engine's thread saw it."""

    choice: int
    token: int | None  # None where only the prompt was read
    text: str
    finish: str | None
    scores: LogProbabilities | None
    cached: int  # tokens of the prompt that were known already
    prompt_scores: Sequence[LogProbabilities]
    moment: float  # time.monotonic() at the end of its step


# Tokens of each choice that wait as parts of their own; more are joined, since then the client is slow.
_SEPARATE = 128
# Gaps between tokens that are observed at once.
_OBSERVED = 64


@dataclass(slots=True)
class Part:
    """What a choice got: a token, or several where the client was slow."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[LogProbabilities] = field(default_factory=list)
    finish: str | None = None

    @classmethod
    def of(cls, update: Update) -> "Part":
        """Return the part of one token."""
        tokens = [] if update.token is None else [update.token]
        return cls(update.text, tokens, [] if update.scores is None else [update.scores], update.finish)

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

    `requests` has an engine request for each prompt; choice c is sample c % samples of prompt c // samples.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.samples = requests[0].samples
        self.choices = self.samples * len(requests)
        self.cached = [0] * len(requests)
        self.prompt_scores: list[Sequence[LogProbabilities]] = [()] * len(requests)
        self.generated = 0
        self.times = Times(time.monotonic())
        self.error: ApiError | None = None
        self.left = self.choices
        self.gaps: list[float] = []  # seconds between tokens of a choice, until they are observed
        self.observe_gaps: Callable[[Iterable[float]], None] | None = None
        self._last: dict[int, float] = {}  # by choice
        self._parts: list[tuple[int, Part]] = []  # with their choices
        self._ready = asyncio.Event()
        # The engine thread's own, which the event loop does not touch.
        self.sequences: list[SequenceState] = []
        self.engine: Engine | None = None

    def deliver(self, update: Update) -> None:
        """Add a token; in the event loop."""
        choice, moment = update.choice, update.moment
        last = self._last.get(choice)
        if last is None:
            self._begin(update)
        elif update.token is not None:
            self.gaps.append(moment - last)
            if len(self.gaps) >= _OBSERVED and self.observe_gaps is not None:
                self.observe_gaps(self.gaps)
                self.gaps.clear()
        self.generated += update.token is not None
        self._last[choice] = self.times.last = moment
        if update.finish:
            self.left -= 1
        self._parts.append((choice, Part.of(update)))
        if len(self._parts) > _SEPARATE * self.choices:
            self._parts = [*join_parts(self._parts).items()]
        self._ready.set()

    def _begin(self, update: Update) -> None:
        """Note what the first token of a choice brings."""
        prompt, sample = divmod(update.choice, self.samples)
        self.cached[prompt] = update.cached
        if sample == 0:
            self.prompt_scores[prompt] = update.prompt_scores
        self.times.first = self.times.first or update.moment

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
