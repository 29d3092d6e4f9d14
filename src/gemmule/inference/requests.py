"""What is asked of the engine, and what it answers: requests, their sequences, and an event per token."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gemmule.errors import RecipeError
from gemmule.inference.sampling import SamplingSettings

LARGEST_SEED = 2**64 - 1
# Sampling from the model's own distribution.
PLAIN = SamplingSettings()


class Event(NamedTuple):
    """One generated token, and the text that it completed."""

    token: int
    text: str
    # The finish reason: "stop" after a stop token or stop string, "length" at the limit, None before the last token.
    finish: str | None


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued; a reply depends on these alone.

    `prompt` has at least one token. Of `samples` replies, all read the prompt once. `seed` None is drawn when the
    request is made; sample k draws its token i with a number that is a function of (seed, k, i).
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingSettings = PLAIN
    seed: int | None = None
    samples: int = 1
    stops: frozenset[int] = frozenset()  # token ids
    min_new_tokens: int = 0  # before so many tokens no stop token is drawn

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt without tokens")
        for name, least in (("max_new_tokens", 1), ("samples", 1), ("min_new_tokens", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))
        elif not 0 <= self.seed <= LARGEST_SEED:
            raise RecipeError(f"seed = {self.seed}: must be from 0 to {LARGEST_SEED}")

    @property
    def positions(self) -> int:
        """How many tokens are read at most; the last one of a reply is not."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(eq=False)
class SequenceState:
    """One reply that is being generated."""

    request: Request
    sample: int = 0
    generated: list[int] = field(default_factory=list)  # token ids, the stop token included
    finish: str | None = None  # as in `Event`; "cancelled" where the engine was told so
    cached: int = 0  # tokens of the prompt that were known already

    def append(self, token: int) -> None:
        """Add a generated token, and finish where it is a stop token or the last one."""
        self.generated.append(token)
        if token in self.request.stops:
            self.finish = "stop"
        elif len(self.generated) >= self.request.max_new_tokens:
            self.finish = "length"


def requests_of(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    sampling: SamplingSettings,
    seed: int | None,
) -> list[Request]:
    """Return a request for each prompt; the i-th has the seed `seed` + i."""
    seeds = [None if seed is None else (seed + number) % (LARGEST_SEED + 1) for number in range(len(prompts))]
    return [
        Request(tuple(prompt), max_new_tokens, sampling, own, stops=stops)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
