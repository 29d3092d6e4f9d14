"""The generation engine: prompts to streams of tokens and text; a whole reply is its events joined."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gemmule.distributed import copy_to_cpu_async
from gemmule.errors import ModelError, RecipeError, TokenizerError
from gemmule.inference.decode import Decoding, make_decoder, prefill
from gemmule.inference.kv_cache import BatchCache
from gemmule.inference.sampling import SamplingSettings, draw_unchecked, refuse_invalid
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer


class Event(NamedTuple):
    """One generated token and the text that it completed."""

    token: int
    text: str
    # The finish reason: "stop" after a stop token, "length" at the limit, None before the last token.
    finish: str | None


@dataclass(eq=False)
class SequenceState:
    """One sequence of a batch: what was requested, and the state of its generation."""

    prompt: Sequence[int]  # token ids, at least one
    sampling: SamplingSettings
    generator: torch.Generator  # on the CPU; the draws of this sequence alone come from it
    max_new_tokens: int
    stops: frozenset[int]
    generated: list[int] = field(default_factory=list)  # token ids, the stop token included
    finish: str | None = None  # as in `Event`

    @property
    def position(self) -> int:
        """The position of the next token."""
        return len(self.prompt) + len(self.generated)

    @property
    def capacity(self) -> int:
        """How many positions are fed to the model at most; the last token is not."""
        return len(self.prompt) + self.max_new_tokens - 1

    def append(self, token: int) -> None:
        """Add a generated token, and finish where it is a stop token or the last one."""
        self.generated.append(token)
        if token in self.stops:
            self.finish = "stop"
        elif len(self.generated) >= self.max_new_tokens:
            self.finish = "length"


class Engine:
    """Decodes a batch of sequences, one token of each per step; they join and leave between steps.

    Sequences do not influence each other: each has a row of the KV cache and a generator of its own.
    """

    def __init__(self, model: Gemma3, max_rows: int, capacity: int, decoding: Decoding = "auto") -> None:
        """Make an engine of at most `max_rows` sequences of `capacity` positions; errors as in `choose_decoding`."""
        self.sequences: list[SequenceState] = []  # that are not finished, in the order of rows
        self._model, self._max_rows, self._capacity = model, max_rows, capacity
        self._decoder = make_decoder(model, max_rows, capacity, decoding)
        self._device = model.embedding.weight.device
        self._logits = torch.empty(
            0, dtype=torch.float32, device=self._device
        )  # of the next token of each sequence, (B,V)
        self._pending: Tensor | None = None  # tokens (B,) that were sampled, and not yet fed to the model
        self._positions = torch.empty(0, dtype=torch.long, device=self._device)  # of those tokens, (B,)

    @torch.inference_mode()
    def insert(self, sequences: Sequence[SequenceState]) -> None:
        """Prefill sequences as one batch, shorter ones with left padding, and add them.

        ValueError where there are too many, or one is longer than the capacity.
        """
        longest, rows = max(each.capacity for each in sequences), len(self.sequences) + len(sequences)
        if longest > self._capacity or rows > self._max_rows:
            limits = f"the engine was made for {self._max_rows} of {self._capacity} positions"
            raise ValueError(f"{rows} sequences of up to {longest} positions: {limits}")
        self._feed_pending()
        lengths = torch.tensor([len(each.prompt) for each in sequences], dtype=torch.long, device=self._device)
        width = max(len(each.prompt) for each in sequences)
        padded = [[0] * (width - len(each.prompt)) + list(each.prompt) for each in sequences]
        tokens = torch.tensor(padded, dtype=torch.long, device=self._device)
        positions = torch.arange(width, device=self._device) - (width - lengths)[:, None]
        cache = BatchCache(self._model.config)
        logits = prefill(self._model, tokens, positions, cache)
        self._decoder.insert(cache)
        self._logits = torch.cat((self._logits, logits)) if self.sequences else logits
        self._positions = torch.cat((self._positions, lengths))
        self.sequences += sequences

    @torch.inference_mode()
    def step(self) -> list[SequenceState]:
        """Append a token to each sequence, drop those that are finished, and return all that got one.

        ModelError where the model's logits are not finite.
        """
        self._feed_pending()
        advanced = list(self.sequences)
        self._pending = self._sample()
        read = copy_to_cpu_async(self._pending)
        if self._device.type == "cuda" and any(len(each.generated) + 1 < each.max_new_tokens for each in advanced):
            self._feed_pending()  # the GPU computes while the tokens are read, in vain for sequences that end here
        ids: list[int] = read().tolist()
        refuse_invalid(ids)
        for sequence, token in zip(advanced, ids, strict=True):
            sequence.append(token)
        self._evict([row for row, sequence in enumerate(advanced) if sequence.finish])
        return advanced

    @torch.inference_mode()
    def evict(self, sequence: SequenceState) -> None:
        """Drop a sequence before it is finished."""
        self._evict([self.sequences.index(sequence)])

    def _evict(self, rows: list[int]) -> None:
        if not rows:
            return
        kept = [row for row in range(len(self.sequences)) if row not in rows]
        self.sequences = [self.sequences[row] for row in kept]
        self._decoder.evict(rows)
        index = torch.tensor(kept, dtype=torch.long, device=self._device)
        self._positions = self._positions[index]
        if self._pending is None:
            self._logits = self._logits[index]
        else:
            self._pending = self._pending[index] if kept else None

    def _feed_pending(self) -> None:
        """Decode the tokens that were sampled last, if that was not done yet."""
        if self._pending is not None:
            self._logits = self._decoder.step(self._pending.clamp(min=0), self._positions)
            self._positions = self._positions + 1
            self._pending = None

    def _sample(self) -> Tensor:
        """Sample the next token of each sequence, (B,), those of equal settings at once."""
        groups: dict[SamplingSettings, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            groups.setdefault(sequence.sampling, []).append(row)
        generators = [sequence.generator for sequence in self.sequences]
        if len(groups) == 1:
            return draw_unchecked(self._logits, self.sequences[0].sampling, generators)
        tokens = torch.empty(len(self.sequences), dtype=torch.long, device=self._device)
        for settings, rows in groups.items():
            tokens[rows] = draw_unchecked(self._logits[rows], settings, [generators[row] for row in rows])
        return tokens


def seeded_generator(seed: int | None) -> torch.Generator:
    """Return a generator on the CPU, randomly seeded for None; RecipeError where the seed is out of range."""
    if seed is not None and not 0 <= seed < 2**64:
        raise RecipeError(f"seed = {seed}: must be from 0 to {2**64 - 1}")
    generator = torch.Generator("cpu")
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def stream_tokens(
    model: Gemma3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    sampling: SamplingSettings,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> Iterator[list[int | None]]:
    """Generate from several prompts (token ids) as one batch; each step yields a token per row, None for finished rows.

    Row i draws with the seed `seed` + i, as it would alone. `decoding` is one of those in `decode.py`. ModelError where
    the model's logits are not finite.
    """
    others = (seeded_generator(None if seed is None else (seed + row) % 2**64) for row in range(1, len(prompts)))
    generators = [seeded_generator(seed), *others]
    sequences = [
        SequenceState(prompt, sampling, generator, max_new_tokens, stops)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]
    if max_new_tokens < 1:
        return
    engine = Engine(model, len(sequences), max(each.capacity for each in sequences), decoding)
    engine.insert(sequences)
    while engine.sequences:
        advanced = set(engine.step())
        yield [each.generated[-1] if each in advanced else None for each in sequences]


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
    stops = stop_tokens(tokenizer)
    decoder = tokenizer.stream_decoder()
    ids = encode_prompt(model, tokenizer, prompt)
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(ids))
    sequence = SequenceState(ids, sampling, seeded_generator(seed), limit, stops)
    if limit < 1:
        return
    engine = Engine(model, 1, sequence.capacity, decoding)
    engine.insert([sequence])
    while engine.sequences:
        engine.step()
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
    """Generate from several prompts as one batch; return each prompt with its continuation."""
    if not prompts:
        return []
    stops = stop_tokens(tokenizer)
    replies = [encode_prompt(model, tokenizer, prompt) for prompt in prompts]
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings - max(map(len, replies)))
    for step in stream_tokens(model, [*map(tuple, replies)], max_new_tokens, stops, sampling, seed, decoding):
        for reply, token in zip(replies, step, strict=True):
            if token is not None:
                reply.append(token)
    return [tokenizer.decode(reply) for reply in replies]


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
