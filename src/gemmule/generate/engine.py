"""From prompt to tokens, one at a time: the only way in which text is made; a whole reply is the stream's fold."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.generate.decode import Decoding, choose_decoding, decoder_for, prefill
from gemmule.generate.sampling import SamplingSettings, draw
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import arriving
from gemmule.tokenizer import Tokenizer


class Event(NamedTuple):
    """One generated token and the text that became complete with it."""

    token: int
    text: str
    # Why nothing follows: "stop" after an end token, "length" at the limit; None while more may come.
    finish: str | None


@torch.inference_mode()
def stream_tokens(
    model: Gemma3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: frozenset[int],
    sampling: SamplingSettings,
    seed: int | None = None,
    decoding: Decoding = "auto",
) -> Iterator[list[int | None]]:
    """Continue several prompts (token ids) side by side; each step yields a token per row, None for rows that ended.

    Rows do not influence each other: shorter prompts are padded on the left with a document of their own. `decoding`
    is one of the ways in `decode.py`.
    """
    device = model.embedding.weight.device
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if max_new_tokens < 1:
        return
    decoding = choose_decoding(model, len(prompts), decoding)
    cache, decoder = Cache(model.config), None
    logits = prefill(model, tokens, torch.arange(longest, device=device) - padding[:, None], cache)
    ended = [False] * len(prompts)
    capacity = longest + max_new_tokens - 1

    def step(chosen: Tensor, end: int) -> Tensor:
        nonlocal decoder
        decoder = decoder or decoder_for(model, cache, len(prompts), capacity, decoding)
        return decoder.step(chosen, end - padding)

    ahead = device.type == "cuda"  # it goes on while a token is read, in vain after the last one
    for end in range(longest, capacity + 1):
        chosen = draw(logits, sampling, generator)
        read = arriving(chosen)
        if ahead and end < capacity:
            logits = step(chosen, end)
        ids: list[int] = read().tolist()
        yield [None if done else token for token, done in zip(ids, ended, strict=True)]
        ended = [done or token in stops for token, done in zip(ids, ended, strict=True)]
        if all(ended) or end == capacity:
            return
        if not ahead:
            logits = step(chosen, end)


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
    """Continue a prompt, one event a token, until the model ends the text or the limit is reached."""
    sampling = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stops = stop_tokens(tokenizer)
    decoder = tokenizer.stream_decoder()
    ids = encode_prompt(model, tokenizer, prompt)
    limit = min(max_new_tokens, model.config.max_position_embeddings - len(ids))
    for count, (token,) in enumerate(stream_tokens(model, [ids], limit, stops, sampling, seed, decoding), start=1):
        assert token is not None
        finish = "stop" if token in stops else "length" if count == limit else None
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
    """Continue several prompts side by side and return each one with its whole continuation."""
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
    """Turn a prompt into ids that the model can continue; ModelError where there is nothing or too much to continue."""
    ids = tokenizer.encode(prompt)
    longest = model.config.max_position_embeddings
    if not ids:
        raise ModelError("the prompt is empty, and this model's tokenizer begins no text with bos: give it a word")
    if len(ids) >= longest:
        raise ModelError(f"the prompt has {len(ids)} tokens; this model's max_position_embeddings is {longest}")
    return ids


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text: the end of a document, and of a turn where the tokenizer has one."""
    return frozenset(i for i in (tokenizer.eos_id, tokenizer.end_of_turn_id) if i is not None)
