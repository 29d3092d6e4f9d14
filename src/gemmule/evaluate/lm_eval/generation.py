"""Replies to prompts that end at stop strings, many side by side; a free row is given to the next prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gemmule.errors import RecipeError
from gemmule.inference.engine import Engine, step_or_raise, stop_tokens
from gemmule.inference.requests import Request
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer


class GenerationSettings(NamedTuple):
    """How a task's replies are generated."""

    max_new_tokens: int
    until: tuple[str, ...]  # the text before the first of them is the reply
    sampling: SamplingSettings


class Prompt(NamedTuple):
    """A prompt (token ids, at least one) and how to reply to it."""

    ids: tuple[int, ...]
    settings: GenerationSettings


def read_generation_settings(options: Mapping[str, Any], max_new_tokens: int) -> GenerationSettings:
    """Read a task's generation_kwargs: until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p.

    RecipeError for others, and for values that are out of range.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    given = normalize_gen_kwargs(dict(options), max_new_tokens)
    until = tuple(each for each in handle_stop_sequences(given.pop("until"), eos=None) if each)
    limit, do_sample = given.pop("max_gen_toks"), given.pop("do_sample")
    known = {name: given.pop(name) for name in SamplingSettings.model_fields if name in given}
    if given:
        there = f"there are until, max_gen_toks, do_sample, {', '.join(SamplingSettings.model_fields)}"
        raise RecipeError(f"generation_kwargs: {', '.join(given)}: not supported; {there}")
    if not do_sample:
        known = {"temperature": 0.0}
    elif "temperature" in known:
        known["temperature"] = float(known["temperature"])
    return GenerationSettings(limit, until, check_recipe(known, SamplingSettings, "of generation_kwargs"))


def generate_replies(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    rows: int,
    done: Callable[[int], object] = lambda _: None,
    seed: int = 0,
) -> list[str]:
    """Generate a reply to each prompt, at most `rows` at a time, in the order of the prompts.

    A reply ends before a stop string, at a stop token or at its limit. Prompt i samples with the seed `seed` + i.
    """
    if not prompts:
        return []
    stops = stop_tokens(tokenizer)
    requests = [
        Request(ids, own.max_new_tokens, own.sampling, seed + number, stops=stops, stop_strings=own.until)
        for number, (ids, own) in enumerate(prompts)
    ]
    longest = max(request.positions for request in requests)
    engine = Engine(model, min(rows, len(requests)), longest, tokenizer=tokenizer)
    longest_first = sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt))
    numbers = {engine.submit(requests[number])[0]: number for number in longest_first}
    texts = [""] * len(requests)
    while not engine.idle:
        for sequence, event in step_or_raise(engine):
            texts[numbers[sequence]] += event.text
            if event.finish:
                done(1)
    return texts
