"""Replies to prompts that end at stop strings, many side by side; a free row is given to the next prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemmule.errors import RecipeError
from gemmule.inference.engine import Engine, stop_tokens
from gemmule.inference.requests import Request, SequenceState
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


@dataclass(eq=False)
class _Reply:
    """A reply that is being generated."""

    number: int
    sequence: SequenceState
    until: tuple[str, ...]
    pieces: Any  # the streaming decoder of its tokens
    text: str = field(default="")

    def take_last_token(self) -> bool:
        """Add the text of the last token; return whether a stop string is there."""
        finish = self.sequence.finish
        if finish != "stop":
            self.text += self.pieces.feed(self.sequence.generated[-1])
        if finish:
            self.text += self.pieces.end()
        return any(each in self.text for each in self.until)

    def cut_text(self) -> str:
        """Return the text before the first stop string."""
        return min((self.text.partition(each)[0] for each in self.until), key=len, default=self.text)


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
        Request(prompt.ids, prompt.settings.max_new_tokens, prompt.settings.sampling, seed + number, stops=stops)
        for number, prompt in enumerate(prompts)
    ]
    engine = Engine(model, min(rows, len(requests)), max(request.positions for request in requests))
    texts = [""] * len(requests)
    running: dict[SequenceState, _Reply] = {}
    for number in sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt)):  # the longest first
        (sequence,) = engine.submit(requests[number])
        until = prompts[number].settings.until
        running[sequence] = _Reply(number, sequence, until, tokenizer.stream_decoder())
    while not engine.idle:
        for sequence in engine.step():
            if running[sequence].take_last_token() and not sequence.finish:
                engine.cancel([sequence])
            elif not sequence.finish:
                continue
            reply = running.pop(sequence)
            texts[reply.number] = reply.cut_text()
            done(1)
    return texts
