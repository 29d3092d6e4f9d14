"""The generation engine: many requests, some tokens of each per step; they join and leave between steps."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gemmule.errors import ModelError, TokenizerError
from gemmule.inference.kv_cache import CacheSize, KVCache, exact_size
from gemmule.inference.requests import Event, Request, SequenceState, requests_of
from gemmule.inference.runners import Decoding, cache_dtype, choose_decoding, make_runner
from gemmule.inference.sampling import SamplingSettings, draw_unchecked, refuse_invalid
from gemmule.inference.step_batch import StepBatch
from gemmule.model.config import Kind
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer

# Tokens of prompts per step: few enough on a CPU that those who speak do not wait long. GPUs need more to be busy.
CHUNK_CPU, CHUNK_GPU = 128, 2048
# Rows of the KV cache where nothing else is said; more requests wait.
MAX_ROWS = 64


class Engine:
    """Continues prompts: `submit` requests, then `step` until `idle`.

    A step takes the next token of each sequence that speaks, and pieces of the prompts of those that begin, in the
    order of their requests. Sequences do not influence each other, and with native decoding on the CPU the tokens of
    a reply are the same, bit for bit, whatever else the engine does. Requests wait until the KV cache has room for
    their longest possible reply.
    """

    def __init__(
        self,
        model: Gemma3,
        max_rows: int,
        longest: int,
        decoding: Decoding = "auto",
        *,
        size: CacheSize | None = None,
        chunk: int | None = None,
    ) -> None:
        """Make an engine for `max_rows` sequences of `longest` positions; errors as in `choose_decoding`.

        `size` is that of the KV cache, which by default grows with what lies in it.
        """
        self._device = model.embedding.weight.device
        self.chunk = chunk or (CHUNK_CPU if self._device.type == "cpu" else CHUNK_GPU)
        self.longest = longest
        self.decoding = choose_decoding(model, decoding)
        if self.decoding == "compiled" and size is None:  # for static shapes
            size = exact_size(model.config, max_rows, longest, self.chunk)
        dtype = cache_dtype(model, self.decoding)
        self.cache = KVCache(model.config, max_rows, longest, size, dtype, self._device)
        self._runner = make_runner(model, self.cache, self.decoding)
        self._free = list(range(max_rows - 1, -1, -1))
        self._waiting: deque[list[SequenceState]] = deque()  # the samples of each request
        self._reading: dict[int, tuple[list[SequenceState], list[int]]] = {}  # samples and their rows, by the first row
        self._speaking: dict[int, SequenceState] = {}  # by row
        self.steps = self.tokens_run = 0  # so far

    def submit(self, request: Request) -> list[SequenceState]:
        """Add a request; return its samples. ValueError where the engine has no room for it, ever."""
        if request.positions > self.longest or request.samples > self.cache.rows:
            limits = f"the engine was made for {self.cache.rows} of {self.longest} positions"
            raise ValueError(f"{request.samples} sequences of up to {request.positions} positions: {limits}")
        samples = [SequenceState(request, sample) for sample in range(request.samples)]
        if not self.cache.could_fit(self._need(request), len(samples)):
            raise ValueError(f"{request.samples} sequences of {request.positions} positions: the KV cache is smaller")
        self._waiting.append([*samples])
        return samples

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._speaking)

    @torch.inference_mode()
    def step(self) -> list[SequenceState]:
        """Run the model once, and return the sequences that got a token.

        ModelError where the model's logits are not finite.
        """
        self._admit()
        batch, finished_prompts = self._plan()
        if not len(batch.tokens):
            return []
        logits = self._runner.run(batch)
        self.steps, self.tokens_run = self.steps + 1, self.tokens_run + len(batch.tokens)
        for row in dict.fromkeys(batch.rows.tolist()):
            self.cache.settle(row)
        sources = [*self._speaking]  # the row whose logits each sequence draws from
        for row in finished_prompts:
            samples, rows = self._reading.pop(row)
            for sample, own in zip(samples, rows, strict=True):
                if own != row:
                    self.cache.fork(row, own)
                self._speaking[own] = sample
                sources.append(row)
        if not sources:
            return []
        order = {row: index for index, row in enumerate(batch.rows[batch.outputs].tolist())}
        index = [order[row] for row in sources]
        if index != list(range(len(logits))):
            logits = logits[torch.tensor(index, device=logits.device)]
        return self._draw(logits)

    def cancel(self, samples: Iterable[SequenceState]) -> None:
        """End sequences before they are finished, wherever they are; their rows are free at once."""
        gone = {*samples}
        for waiting in [*self._waiting]:
            waiting[:] = [each for each in waiting if each not in gone]
        self._waiting = deque(waiting for waiting in self._waiting if waiting)
        for row, (reading, rows) in [*self._reading.items()]:
            if gone.issuperset(reading):
                del self._reading[row]
                self.cache.finish(row, len(rows))
                self._free += rows
            # Otherwise the others need the prompt: what is cancelled leaves when it has been read.
        for row, sequence in [*self._speaking.items()]:
            if sequence in gone:
                del self._speaking[row]
                self._leave(row)
        for sequence in gone:
            sequence.finish = sequence.finish or "cancelled"

    def _need(self, request: Request) -> dict[Kind, int]:
        return self.cache.need(request.positions, self.chunk)

    def _admit(self) -> None:
        """Give rows to the requests that wait, in order, while there is room."""
        while self._waiting:
            samples = self._waiting[0]
            request = samples[0].request
            need = self._need(request)
            if len(samples) > len(self._free) or not self.cache.fits(need, len(samples)):
                return
            self._waiting.popleft()
            rows = [self._free.pop() for _ in samples]
            known = self.cache.begin(rows[0], request.prompt, need, len(samples))
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
        for row, sequence in self._speaking.items():
            outputs.append(len(tokens))
            token = sequence.generated[-1]
            positions.append(self.cache.extend(row, (token,)))
            tokens.append(token)
            rows.append(row)
        left = self.chunk
        for row, (samples, _) in self._reading.items():
            if not left:
                break
            prompt = samples[0].request.prompt
            first = self.cache.length(row)
            piece = prompt[first : first + left]
            self.cache.extend(row, piece)
            tokens += piece
            positions += range(first, first + len(piece))
            rows += [row] * len(piece)
            left -= len(piece)
            if first + len(piece) == len(prompt):
                outputs.append(len(tokens) - 1)
                ended.append(row)
        return StepBatch(*(np.array(each, dtype=np.int64) for each in (tokens, positions, rows, outputs))), ended

    def _draw(self, logits: Tensor) -> list[SequenceState]:
        """Append a token to each sequence that speaks, from its row of the logits; let those that end leave."""
        advanced = [*self._speaking.values()]
        ids = self._sample(logits, advanced)
        refuse_invalid(ids)
        for sequence, token in zip(advanced, ids, strict=True):
            if sequence.finish is None:  # or it was cancelled while its prompt was read
                sequence.append(token)
        for row, sequence in [*self._speaking.items()]:
            if sequence.finish:
                del self._speaking[row]
                self._leave(row)
        return [sequence for sequence in advanced if sequence.finish != "cancelled"]

    def _leave(self, row: int) -> None:
        self.cache.finish(row)
        self._free.append(row)

    def _sample(self, logits: Tensor, sequences: Sequence[SequenceState]) -> list[int]:
        ids: list[int] = []
        for row, sequence in enumerate(sequences):
            generator = torch.Generator("cpu").manual_seed(((sequence.request.seed or 0) + len(sequence.generated) + 77 * sequence.sample) % 2**64)
            ids += draw_unchecked(logits[row : row + 1], sequence.request.sampling, [generator]).tolist()
        return ids


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
        advanced = {*engine.step()}
        if advanced:
            yield [each.generated[-1] if each in advanced else None for each in sequences]


def reply_to_all(
    model: Gemma3, requests: Sequence[Request], decoding: Decoding = "auto", max_rows: int = MAX_ROWS
) -> list[list[int]]:
    """Return the tokens of a reply to each request, the stop token included; ModelError as in `Engine.step`."""
    if not requests:
        return []
    rows = min(max_rows, len(requests))
    engine = Engine(model, rows, max(each.positions for each in requests), decoding)
    sequences = [engine.submit(request)[0] for request in requests]
    while not engine.idle:
        engine.step()
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
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> Iterator[Event]:
    """Generate from a prompt, one event per token, until a stop token or the limit.

    The seed is from 0 to 2^64 - 1. RecipeError names a setting that is out of range.
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = check_recipe(given, SamplingSettings, "of the options")
    decoder = tokenizer.stream_decoder()
    ids = encode_prompt(model, tokenizer, prompt)
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(ids))
    if limit < 1:
        return
    request = Request(tuple(ids), limit, sampling, seed, stops=stop_tokens(tokenizer))
    engine = Engine(model, 1, request.positions, decoding)
    (sequence,) = engine.submit(request)
    while not engine.idle:
        if not engine.step():
            continue
        token, finish = sequence.generated[-1], sequence.finish
        text = "" if finish == "stop" else decoder.feed(token)
        yield Event(token, text + decoder.end() if finish else text, finish)


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
    return frozenset(i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None)
