"""The generation engine: many requests, some tokens of each per step; they join and leave between steps."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemmule.errors import DeviceError, GemmuleError, ModelError, TokenizerError
from gemmule.inference.constraints import Constraint, ConstraintCompiler, ConstraintSpec
from gemmule.inference.kv_cache import CacheSize, CacheTooSmallError, KVCache, exact_size
from gemmule.inference.native.sampler import make_sampler
from gemmule.inference.requests import Event, Request, SequenceState, requests_of
from gemmule.inference.runners import Decoding, cache_dtype, choose_decoding, make_runner
from gemmule.inference.sampling import LogProbabilities, Query, Row, SamplingSettings, refuse_invalid
from gemmule.inference.step_batch import StepBatch
from gemmule.inference.text_stream import TextStream
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer

# Tokens of prompts per step: on a CPU so few that sequences in the middle of a reply do not wait long; GPUs need more
# to be busy.
CHUNK_CPU, CHUNK_GPU = 128, 2048
# Tokens per step of a prompt whose log-probabilities are asked for: there are logits of each.
SCORED_CHUNK = 16
# Rows of the KV cache where nothing else is said; more requests wait.
MAX_ROWS = 64


class TokenEvent(NamedTuple):
    """A token that a sequence got in a step; `event` is None where the sequence finished without one.

    Its `finish` is then "error", with the reason in its `error`, or "length" where `max_new_tokens` is 0.
    """

    sequence: SequenceState
    event: Event | None


class Engine:
    """Continues prompts: `submit` requests, then `step` until `idle`.

    A step takes the next token of each sequence that is decoding, and pieces of the prompts of those that begin, in
    the order of their requests. Sequences do not influence each other, and with native decoding on the CPU the tokens
    and log-probabilities of a reply are the same, bit for bit, whatever else the engine does. Requests wait until the
    KV cache has room for their longest possible reply.
    """

    def __init__(
        self,
        model: Gemma3,
        max_rows: int,
        longest: int,
        decoding: Decoding = "auto",
        *,
        tokenizer: Tokenizer | None = None,
        size: CacheSize | None = None,
        chunk: int | None = None,
    ) -> None:
        """Make an engine for `max_rows` sequences of `longest` positions; errors as in `choose_decoding`.

        With a tokenizer events have text, and requests may have stop strings and constraints. `size` is that of the KV
        cache, which by default grows with what lies in it. A step reads at most `chunk` tokens of prompts.
        """
        self._device = model.embedding.weight.device
        self.chunk = chunk or (CHUNK_CPU if self._device.type == "cpu" else CHUNK_GPU)
        self.longest = longest
        self.decoding = choose_decoding(model, decoding)
        if self.decoding == "compiled" and size is None:  # for static shapes
            size = exact_size(model.config, max_rows, longest, self.chunk)
        dtype = cache_dtype(model, self.decoding)
        try:
            self.cache = KVCache(model.config, max_rows, longest, size, dtype, self._device)
        except (RuntimeError, MemoryError) as error:  # torch has no other name for it
            reason = f"no memory for a KV cache of {max_rows:,} x {longest:,} positions"
            raise DeviceError(f"decoding {self.decoding!r}: {reason}; make fewer tokens, or use 'plain'") from error
        self._runner, self._sampler = make_runner(model, self.cache, self.decoding), make_sampler(self._device)
        self._tokenizer, self._vocabulary = tokenizer, model.config.vocab_size
        self._constraints: ConstraintCompiler | None = None
        self._constraints_lock = Lock()
        self._free = list(range(max_rows - 1, -1, -1))
        self._queue: deque[list[SequenceState]] = deque()  # the samples of each request
        self._reading: dict[int, tuple[list[SequenceState], list[int]]] = {}  # samples and their rows, by the first row
        self._decoding: dict[int, SequenceState] = {}  # by row
        self.steps = self.tokens_run = 0  # so far

    def submit(self, request: Request) -> list[SequenceState]:
        """Add a request; return its samples.

        ValueError where the engine could never hold it (CacheTooSmallError where it has the rows and positions), or has
        no tokenizer for it; RecipeError where its settings name a token that the vocabulary lacks.
        """
        sampling, count = request.sampling, request.samples
        sampling.check_vocabulary(self._vocabulary)
        if request.needs_text and self._tokenizer is None:
            raise ValueError("stop strings and constraints need an engine with a tokenizer")
        if request.positions > self.longest or count > self.cache.rows:
            limits = f"the engine was made for {self.cache.rows} of {self.longest} positions"
            raise ValueError(f"{count} sequences of up to {request.positions} positions: {limits}")
        if not self.cache.could_fit(self._need(request), count):
            raise CacheTooSmallError(f"{count} sequences of {request.positions} positions: the KV cache is smaller")
        samples = [self._new_sequence(request, sample) for sample in range(count)]
        self._queue.append([*samples])
        return samples

    def compile_constraint(self, spec: ConstraintSpec) -> Constraint:
        """Compile a constraint, which takes 0.1 s the first time; any thread may do that before `submit` does.

        RecipeError where it is none.
        """
        with self._constraints_lock:
            if self._constraints is None:
                assert self._tokenizer is not None
                stops = stop_tokens(self._tokenizer)
                self._constraints = ConstraintCompiler(self._tokenizer, self._vocabulary, stops)
        return self._constraints.compile(spec)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._queue or self._reading or self._decoding)

    @property
    def queued(self) -> list[SequenceState]:
        """The sequences that have no row yet, in their order."""
        return [sequence for samples in self._queue for sequence in samples]

    @property
    def running(self) -> int:
        """How many sequences have a row."""
        return self.cache.rows - len(self._free)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Run the model once, and return the tokens that sequences got."""
        self._admit()
        batch, finished_prompts = self._plan()
        if not len(batch.tokens):
            return []
        logits = self._runner.run(batch)
        self.steps, self.tokens_run = self.steps + 1, self.tokens_run + len(batch.tokens)
        for row in dict.fromkeys(batch.rows.tolist()):
            self.cache.settle(row)
        self._score_prompts(batch, logits)
        sources = [*self._decoding]  # the row whose logits each sequence draws from
        for row in finished_prompts:
            sources += [row] * self._begin_decoding(row)
        if not sources:
            return []
        order = {row: index for index, row in enumerate(batch.rows[batch.outputs].tolist())}
        index = [order[row] for row in sources]
        if index != list(range(len(logits))):
            logits = logits[torch.tensor(index, dtype=torch.long, device=logits.device)]
        return self._draw(logits)

    def cancel(self, samples: Iterable[SequenceState]) -> None:
        """End sequences before they are finished, wherever they are; their rows are free at once."""
        gone = {sequence for sequence in samples if not sequence.finish}
        for queued in self._queue:
            queued[:] = [each for each in queued if each not in gone]
        self._queue = deque(queued for queued in self._queue if queued)
        for row, (reading, rows) in [*self._reading.items()]:
            if gone.issuperset(reading):
                del self._reading[row]
                self.cache.finish(row, len(rows))
                self._free += rows
            # Otherwise the others need the prompt: what is cancelled leaves when it has been read.
        for sequence in gone:
            sequence.finish = "cancelled"
        self._drop_finished()

    def _new_sequence(self, request: Request, sample: int) -> SequenceState:
        if self._tokenizer is None:
            return SequenceState(request, sample)
        constraint = None if request.constraint is None else self.compile_constraint(request.constraint)
        return SequenceState(request, sample, TextStream(self._tokenizer, request.stop_strings), constraint)

    def _need(self, request: Request) -> dict[Kind, int]:
        return self.cache.need(request.positions, self.chunk)

    def _admit(self) -> None:
        """Give rows to the requests that wait, in order, while there is room."""
        while self._queue:
            samples = self._queue[0]
            request = samples[0].request
            need = self._need(request)
            if len(samples) > len(self._free) or not self.cache.fits(need, len(samples)):
                return
            self._queue.popleft()
            rows = [self._free.pop() for _ in samples]
            anew = request.prompt_log_probabilities is not None
            known = self.cache.begin(rows[0], request.prompt, need, len(samples), anew=anew)
            for sample in samples:
                sample.cached = known
            self._reading[rows[0]] = samples, rows

    def _plan(self) -> tuple[StepBatch, list[int]]:
        """Return what the next step computes, and the rows whose prompts it reads to the end."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        outputs: list[int] = []
        ended: list[int] = []
        for row, sequence in self._decoding.items():
            token = sequence.generated[-1]
            outputs.append(len(tokens))
            positions.append(self.cache.extend(row, (token,)))
            tokens.append(token)
            rows.append(row)
        left = self.chunk
        for row, (samples, _) in self._reading.items():
            if left <= 0:
                break
            request, first = samples[0].request, self.cache.length(row)
            scored = request.prompt_log_probabilities is not None
            piece = request.prompt[first : first + (min(left, SCORED_CHUNK) if scored else left)]
            self.cache.extend(row, piece)
            tokens += piece
            positions += range(first, first + len(piece))
            rows += [row] * len(piece)
            left -= len(piece)
            done = first + len(piece) == len(request.prompt)
            if done:
                ended.append(row)
            if scored:
                outputs += range(len(tokens) - len(piece), len(tokens))
            elif done:
                outputs.append(len(tokens) - 1)
        return StepBatch(*(np.array(each, dtype=np.int64) for each in (tokens, positions, rows, outputs))), ended

    def _score_prompts(self, batch: StepBatch, logits: Tensor) -> None:
        """Keep the log-probabilities of the prompt tokens that were asked for."""
        if not self._reading:
            return
        asked: list[tuple[SequenceState, Query]] = []
        rows, positions = batch.rows[batch.outputs].tolist(), batch.positions[batch.outputs].tolist()
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            if row not in self._reading:
                continue
            first = self._reading[row][0][0]
            top_n = first.request.prompt_log_probabilities
            if top_n is not None and position + 1 < len(first.request.prompt):
                asked.append((first, Query(index, first.request.prompt[position + 1], top_n)))
        found = self._sampler.log_probabilities(logits, [query for _, query in asked])
        for (sequence, _), each in zip(asked, found, strict=True):
            sequence.prompt_log_probabilities.append(each)

    def _begin_decoding(self, row: int) -> int:
        """Give each sample of a prompt that has been read a row of its own, to decode; return how many there are."""
        samples, rows = self._reading.pop(row)
        for sample, own in zip(samples, rows, strict=True):
            sample.prompt_log_probabilities = samples[0].prompt_log_probabilities
            if own != row:
                self.cache.fork(row, own)
            self._decoding[own] = sample
        return len(samples)

    def _draw(self, logits: Tensor) -> list[TokenEvent]:
        """Append a token to each sequence that is decoding, from its row of the logits; let those that end leave."""
        sequences = [*self._decoding.values()]
        rows = [_next_row(sequence) for sequence in sequences]
        ids = self._sampler.draw_rows(logits, [row or _ANY for row in rows]).tolist()
        queries = [
            Query(index, ids[index], sequence.request.log_probabilities)
            for index, sequence in enumerate(sequences)
            if sequence.request.log_probabilities is not None and ids[index] >= 0
        ]
        scores = dict(
            zip((query.row for query in queries), self._sampler.log_probabilities(logits, queries), strict=True)
        )
        events = [
            TokenEvent(sequence, _append(sequence, token, scores.get(index)))
            for index, (sequence, token) in enumerate(zip(sequences, ids, strict=True))
            if sequence.finish != "cancelled"  # while its prompt was read
        ]
        self._drop_finished()
        return events

    def _drop_finished(self) -> None:
        for row, sequence in [*self._decoding.items()]:
            if sequence.finish:
                del self._decoding[row]
                self.cache.finish(row)
                self._free.append(row)


# How a token is drawn that nobody takes.
_ANY = Row(SamplingSettings(temperature=0))


def _next_row(sequence: SequenceState) -> Row | None:
    """Return how the next token of a sequence is drawn; None where it is finished, or fails."""
    if sequence.finish is not None or sequence.request.max_new_tokens == 0:
        return None
    try:
        return sequence.next_row()
    except GemmuleError as error:
        sequence.fail(error)
        return None


def _append(sequence: SequenceState, token: int, scores: LogProbabilities | None) -> Event | None:
    """Append what was drawn; None where the sequence fails."""
    if sequence.request.max_new_tokens == 0:
        sequence.finish = "length"
    if sequence.finish is not None:
        return None
    try:
        refuse_invalid([token])
        return sequence.append(token, scores)
    except GemmuleError as error:
        sequence.fail(error)
        return None


def run_alone(engine: Engine, request: Request) -> Iterator[Event]:
    """Yield the events of a request of one sample in an engine that has no other; raise what it fails with."""
    engine.submit(request)
    while not engine.idle:
        for _, event in step_or_raise(engine):
            yield event


def step_or_raise(engine: Engine) -> list[tuple[SequenceState, Event]]:
    """Run the model once; return the tokens that sequences got, and raise the error of a sequence that failed."""
    events = engine.step()
    for sequence, event in events:
        if event is None and sequence.error is not None:
            raise sequence.error
    return [(sequence, event) for sequence, event in events if event is not None]


def stream_tokens(
    model: Gemma3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    sampling: SamplingSettings,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> Iterator[list[int | None]]:
    """Generate from several prompts (token ids) as one batch; each step yields a token per row, None for the others.

    Row i draws with the seed `seed` + i, as it would alone. `decoding` is one of those in `runners.py`. ModelError
    where the model's logits are not finite.
    """
    if max_new_tokens < 1 or not prompts:
        return
    requests = requests_of(prompts, max_new_tokens, stops, sampling, seed)
    engine = Engine(model, len(requests), max(each.positions for each in requests), decoding)
    sequences = [engine.submit(request)[0] for request in requests]
    while not engine.idle:
        if events := step_or_raise(engine):
            tokens = {sequence: event.token for sequence, event in events}
            yield [tokens.get(sequence) for sequence in sequences]


def reply_to_all(
    model: Gemma3, requests: Sequence[Request], decoding: Decoding = "auto", max_rows: int = MAX_ROWS
) -> list[list[int]]:
    """Return the tokens of a reply to each request, the stop token included; ModelError as in `stream_tokens`."""
    if not requests:
        return []
    rows = min(max_rows, len(requests))
    engine = Engine(model, rows, max(each.positions for each in requests), decoding)
    sequences = [engine.submit(request)[0] for request in requests]
    while not engine.idle:
        step_or_raise(engine)
    return [sequence.generated for sequence in sequences]


def generate(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: Sequence[str] = (),
    min_new_tokens: int = 0,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> Iterator[Event]:
    """Generate from a prompt, one event per token, until a stop token, one of the `stop` strings, or the limit.

    Stop strings are no part of the text. The seed is from 0 to 2^64 - 1. RecipeError names a setting that is out of
    range.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
    given |= {"frequency_penalty": frequency_penalty}
    sampling = check_recipe(given, SamplingSettings, "of the options")
    ids = encode_prompt(model, tokenizer, prompt)
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(ids))
    if limit < 1:
        return
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    request = Request(tuple(ids), limit, sampling, seed, 1, stop_tokens(tokenizer), strings, min_new_tokens)
    yield from run_alone(Engine(model, 1, request.positions, decoding, tokenizer=tokenizer), request)


def complete(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingSettings,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> list[str]:
    """Generate from several prompts; return each prompt with its continuation."""
    if not prompts:
        return []
    given = [encode_prompt(model, tokenizer, prompt) for prompt in prompts]
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings - max(map(len, given)))
    requests = requests_of(given, max_new_tokens, stop_tokens(tokenizer), sampling, seed)
    replies = reply_to_all(model, requests, decoding)
    return [tokenizer.decode([*ids, *reply]) for ids, reply in zip(given, replies, strict=True)]


def encode_prompt(model: Gemma3, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt; ModelError where it has no token, or as many as the model has positions."""
    try:
        ids = tokenizer.encode(prompt)
    except TokenizerError as error:
        raise TokenizerError(f"the prompt cannot be encoded: {error}") from None
    longest = model.config.max_position_embeddings
    if not ids:
        raise ModelError("the prompt is empty, and this model's tokenizer begins no text with bos: give it a word")
    if len(ids) >= longest:
        raise ModelError(f"the prompt has {len(ids)} tokens; this model's max_position_embeddings is {longest}")
    return ids


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the stop tokens: end of document, and end of turn where the tokenizer has one."""
    return frozenset(tokenizer.stop_ids)
