"""What is asked of the engine, and what it answers: requests, their sequences, and an event per token."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gemmule.errors import GemmuleError, RecipeError
from gemmule.fields import LARGEST_REQUEST_SEED
from gemmule.inference.constraints import Constraint, ConstraintSpec
from gemmule.inference.sampling import LogProbabilities, Row, SamplingSettings, uniform
from gemmule.inference.text_stream import TextStream

# Sampling from the model's own distribution.
PLAIN = SamplingSettings()


class Event(NamedTuple):
    """One generated token, and the text that it completed."""

    token: int
    text: str
    # The finish reason: "stop" after a stop token or stop string, "length" at the limit, None before the last token.
    finish: str | None
    log_probabilities: LogProbabilities | None = None


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued; a reply depends on these alone.

    `prompt` has at least one token. Of `samples` replies, all read the prompt once. `seed` None is drawn when the
    request is made; sample k draws its token i with a number that is a function of (seed, k, i). Log-probabilities are
    of the model's own distribution, with so many of the likeliest tokens beside; None gives none. RecipeError where a
    number is out of range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingSettings = PLAIN
    seed: int | None = None
    samples: int = 1
    stops: frozenset[int] = frozenset()  # token ids
    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0  # before so many tokens no stop token is drawn
    log_probabilities: int | None = None
    prompt_log_probabilities: int | None = None  # of each token after the first; the prompt is then read anew
    constraint: ConstraintSpec | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt without tokens")
        least_new = 1 if self.prompt_log_probabilities is None else 0
        for name, least in (("max_new_tokens", least_new), ("samples", 1), ("min_new_tokens", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.seed is None:
            object.__setattr__(self, "seed", draw_seed())
        else:
            _check_seed(self.seed)

    @property
    def positions(self) -> int:
        """How many tokens are read at most; the last one of a reply is not."""
        return len(self.prompt) + max(self.max_new_tokens - 1, 0)

    @property
    def needs_text(self) -> bool:
        """Whether the engine needs a tokenizer for it."""
        return bool(self.stop_strings or self.constraint)


@dataclass(eq=False)
class SequenceState:
    """One reply that is being generated."""

    request: Request
    sample: int = 0
    stream: TextStream | None = None  # of the reply, where the engine has a tokenizer
    constraint: Constraint | None = None
    generated: list[int] = field(default_factory=list)  # token ids, the stop token included
    finish: str | None = None  # as in `Event`; "cancelled", or "error" where it failed
    error: GemmuleError | None = None  # why it failed
    cached: int = 0  # tokens of the prompt that were known already
    prompt_log_probabilities: list[LogProbabilities] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._row = Row(self.request.sampling, self.request.prompt)

    def next_row(self) -> Row:
        """Return how its next token is drawn; RecipeError where its constraint has become too complex."""
        row, request, index = self._row, self.request, len(self.generated)
        assert request.seed is not None
        if request.sampling.temperature:  # else nothing is drawn
            row.uniform = uniform(request.seed, self.sample, index)
        row.excluded = request.stops if index < request.min_new_tokens else ()
        row.allowed = None if self.constraint is None else torch.from_numpy(self.constraint.allowed())
        return row

    def append(self, token: int, log_probabilities: LogProbabilities | None = None) -> Event:
        """Add a generated token, and finish where it is a stop token, completes a stop string, or is the last one.

        RecipeError where its constraint has become too complex.
        """
        self.generated.append(token)
        self._row.append(token)
        text = ""
        if token in self.request.stops:
            self.finish = "stop"
        elif self.stream is not None:
            text = self.stream.feed(token)
        if self.finish is None and self._is_complete(token):
            self.finish = "stop"
        elif self.finish is None and len(self.generated) >= self.request.max_new_tokens:
            self.finish = "length"
        if self.finish and self.stream is not None:
            text += self.stream.end()
            self.finish = "stop" if self.stream.stopped else self.finish
        return Event(token, text, self.finish, log_probabilities)

    def fail(self, error: GemmuleError) -> None:
        """Finish with an error."""
        self.finish, self.error = "error", error

    def _is_complete(self, token: int) -> bool:
        """Whether a stop string has come, or the constraint allows nothing more."""
        if self.constraint is not None:
            self.constraint.accept(token)
            if self.constraint.finished:
                return True
        return self.stream is not None and self.stream.stopped


def requests_of(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    sampling: SamplingSettings,
    seed: int | None,
) -> list[Request]:
    """Return a request for each prompt; the i-th has the seed `seed` + i."""
    if seed is not None:
        _check_seed(seed)
    seeds = [None if seed is None else (seed + number) % (LARGEST_REQUEST_SEED + 1) for number in range(len(prompts))]
    return [
        Request(tuple(prompt), max_new_tokens, sampling, own, stops=stops)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]


def draw_seed() -> int:
    """Return a random seed, which JavaScript can hold exactly, too."""
    return secrets.randbits(53)


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_REQUEST_SEED:
        raise RecipeError(f"seed = {seed}: must be from 0 to {LARGEST_REQUEST_SEED}")
