"""From the body of either endpoint to engine requests, and what their replies have in common."""

import asyncio
import secrets
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from gemmule.errors import RecipeError, UserError
from gemmule.inference.constraints import ConstraintSpec
from gemmule.inference.requests import Request, draw_seed
from gemmule.inference.sampling import LogProbabilities, SamplingSettings
from gemmule.serve.failures import invalid
from gemmule.serve.models import ServedModel
from gemmule.serve.prompts import Prompt, check_ids
from gemmule.serve.protocol import CompletionBody, Sampled
from gemmule.serve.replies import Reply
from gemmule.serve.settings import Limits

# What JSON has instead of minus infinity, as OpenAI has it.
_LEAST = -9999.0


@dataclass
class Generation:
    """A request of either endpoint on its way."""

    id: str
    served: ServedModel
    body: Sampled
    prompts: list[Prompt]
    reply: Reply
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """Return what each object of the reply begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.id,
            "system_fingerprint": self.served.fingerprint,
            "seed": self.seed,
        }

    def usage(self) -> dict[str, Any]:
        """Return how many tokens were read and generated."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.reply.generated,
            "total_tokens": read + self.reply.generated,
            "prompt_tokens_details": {"cached_tokens": sum(self.reply.cached)},
        }

    def timings(self) -> dict[str, Any]:
        """Return how long the parts of the work took, in milliseconds, under llama.cpp's names where it has them."""
        times = self.reply.times
        admitted = times.admitted or times.submitted
        first = times.first or admitted
        last = times.last or first
        read = sum(len(prompt.ids) for prompt in self.prompts) - sum(self.reply.cached)
        rest = self.reply.generated - self.reply.choices
        return {
            "cache_n": sum(self.reply.cached),
            "prompt_n": read,
            "queue_ms": round(1000 * (admitted - times.submitted), 3),
            "prompt_ms": round(1000 * (first - admitted), 3),
            "predicted_n": self.reply.generated,
            "predicted_ms": round(1000 * (last - first), 3),
            "predicted_per_second": round(rest / (last - first), 3) if last > first and rest > 0 else None,
        }


def make_generation(kind: str, served: ServedModel, body: Sampled, prompts: list[Prompt], limits: Limits) -> Generation:
    """Turn a body and its prompts into engine requests; ApiError where the model or the limits refuse them."""
    samples = body.n or 1
    most = min(limits.samples, served.engine.cache.rows)
    if samples > most:
        raise invalid("n", f"n = {samples}: must be from 1 to {most}")
    if samples * len(prompts) > limits.choices:
        message = f"prompt: {len(prompts)} prompts of {samples} replies; at most {limits.choices} replies a request"
        raise invalid("prompt", message)
    seed = draw_seed() if body.seed is None else body.seed
    sampling = _sampling(served, body)
    stops, constraint = _stops(served, body, limits), constraint_of(body)
    requests = [_request(served, body, prompt, sampling, seed, stops, constraint) for prompt in prompts]
    return Generation(
        f"{kind}-{secrets.token_hex(12)}", served, body, prompts, Reply(requests, streamed=bool(body.stream)), seed
    )


def _request(
    served: ServedModel,
    body: Sampled,
    prompt: Prompt,
    sampling: SamplingSettings,
    seed: int,
    stops: frozenset[int],
    constraint: ConstraintSpec | None,
) -> Request:
    left = served.context - len(prompt.ids)
    limit = left if body.new_tokens is None else min(body.new_tokens, left)
    scores = None
    if limit == 0:
        scores = body.likeliest or 0  # what only reads a prompt
    elif isinstance(body, CompletionBody) and body.echo:
        scores = body.likeliest
    try:
        return Request(
            prompt=prompt.ids,
            max_new_tokens=limit,
            sampling=sampling,
            seed=seed,
            samples=body.n or 1,
            stops=stops,
            stop_strings=body.stop_strings,
            min_new_tokens=min(body.min_tokens or 0, limit),
            log_probabilities=body.likeliest,
            prompt_log_probabilities=scores,
            constraint=constraint,
        )
    except RecipeError as error:
        raise invalid(None, str(error)) from None


def _sampling(served: ServedModel, body: Sampled) -> SamplingSettings:
    names = SamplingSettings.model_fields.keys() - {"logit_bias"}
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    check_ids(served, [*biases], "logit_bias")
    return SamplingSettings(**given, logit_bias=tuple(sorted(biases.items())))


def _stops(served: ServedModel, body: Sampled, limits: Limits) -> frozenset[int]:
    """Return the stop tokens; ApiError for stop strings or ids that cannot be."""
    strings = body.stop_strings
    if len(strings) > limits.stop_strings:
        raise invalid("stop", f"stop: {len(strings)} texts; at most {limits.stop_strings}")
    if max(map(len, strings), default=0) > limits.stop_length:
        raise invalid("stop", f"stop: a text of over {limits.stop_length} characters")
    given = body.stop_token_ids or []
    check_ids(served, given, "stop_token_ids")
    return served.stops.union(given)


def constraint_of(body: Sampled) -> ConstraintSpec | None:
    """Return what the reply is constrained to; ApiError with the library's sentence where that is nothing."""
    format_ = body.response_format
    try:
        if body.regex is not None:
            param = "regex"
            return ConstraintSpec.regex(body.regex)
        if body.grammar is not None:
            param = "grammar"
            return ConstraintSpec.grammar(body.grammar)
        param = "response_format"
        if format_ is None or format_.type == "text":
            return None
        if format_.json_schema is None:
            return ConstraintSpec.json_object()
        return ConstraintSpec.json_schema(format_.json_schema.schema_)
    except UserError as error:
        raise invalid(param, str(error)) from None


async def check_constraint(generation: Generation, threads: Executor) -> None:
    """Compile the constraint in one of the threads, so that the engine has it; ApiError where it cannot be."""
    constraint = generation.reply.requests[0].constraint
    if constraint is None:
        return
    body = generation.body
    param = "regex" if body.regex is not None else "grammar" if body.grammar is not None else "response_format"
    try:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(threads, generation.served.engine.compile_constraint, constraint)
    except UserError as error:
        raise invalid(param, str(error)) from None


def token_text(served: ServedModel, token: int) -> str:
    """Return a token as text, where it is not valid UTF-8 with its bytes escaped, as OpenAI has it."""
    return served.token_bytes(token).decode("utf-8", "backslashreplace")


def finite(log_probability: float) -> float:
    """Return a number that JSON has."""
    return max(log_probability, _LEAST)


def unique_alternatives(served: ServedModel, scores: LogProbabilities, token: int) -> dict[str, float]:
    """Return the likeliest tokens by their texts, of equal texts the likelier, and the token itself."""
    found: dict[str, float] = {}
    for each, score in (*scores.likeliest, (token, scores.token)):
        found.setdefault(token_text(served, each), finite(score))
    return found


def alternative_ids(served: ServedModel, scores: LogProbabilities, token: int) -> dict[str, int]:
    """Return the ids of `unique_alternatives`."""
    found: dict[str, int] = {}
    for each in (*(likely for likely, _ in scores.likeliest), token):
        found.setdefault(token_text(served, each), each)
    return found
