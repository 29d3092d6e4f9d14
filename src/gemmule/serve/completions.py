"""Replies of /v1/completions: whole, and in chunks."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from json.encoder import encode_basestring_ascii
from typing import Any

from gemmule.inference.sampling import LogProbabilities
from gemmule.serve.generation import Generation, alternative_ids, finite, token_text, unique_alternatives
from gemmule.serve.prompts import Prompt
from gemmule.serve.protocol import CompletionBody
from gemmule.serve.replies import Part


class CompletionFormat:
    """The objects of one reply."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(self, generation: Generation) -> None:
        assert isinstance(generation.body, CompletionBody)
        self._generation, self._body = generation, generation.body
        self._begun: dict[int, _Offsets] = {}  # by choice

    def first_choices(self) -> list[dict[str, Any]]:
        """Return what is sent of each choice before any token: nothing."""
        return []

    def prompt_ids(self) -> dict[str, Any]:
        """Return nothing: each choice has the ids of its prompt."""
        return {}

    def chunks(self, choice: int, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a part adds to a choice: text and tokens, then the end alone."""
        fresh = choice not in self._begun
        content = self._content(choice, part)
        if fresh or content["text"] or part.tokens:
            yield {"index": choice, **content, "finish_reason": None}
        if part.finish:
            yield {"index": choice, "text": "", "logprobs": None, "finish_reason": part.finish}

    def plain_chunk(self, choice: int, part: Part) -> str | None:
        """Return the JSON of the one chunk of a part that is text alone, in the middle of a choice; else None.

        Most are; to write them like this takes a tenth of the time.
        """
        body = self._body
        if part.finish or choice not in self._begun or body.logprobs is not None or body.return_token_ids:
            return None
        text = encode_basestring_ascii(part.text)
        return f'{{"index":{choice},"text":{text},"logprobs":null,"finish_reason":null}}'

    def whole(self, choice: int, part: Part) -> dict[str, Any]:
        """Return a choice of the whole reply."""
        return {"index": choice, **self._content(choice, part), "finish_reason": part.finish}

    def _content(self, choice: int, part: Part) -> dict[str, Any]:
        """Return text, log-probabilities and ids of a part; before the first one comes the prompt, where asked for."""
        generation, body = self._generation, self._body
        prompt = generation.prompts[choice // generation.reply.samples]
        fresh = choice not in self._begun
        offsets = self._begun.setdefault(choice, _Offsets(generation))
        echoes = bool(body.echo and fresh)
        content: dict[str, Any] = {"text": (prompt.text if echoes else "") + part.text, "logprobs": None}
        if body.logprobs is not None:
            before = generation.reply.prompt_scores[choice // generation.reply.samples]
            content["logprobs"] = self._log_probabilities(offsets, part, (prompt, before) if echoes else None)
        if body.return_token_ids:
            content["token_ids"] = part.tokens
            if fresh:
                content["prompt_token_ids"] = list(prompt.ids)
        return content

    def _log_probabilities(
        self, offsets: "_Offsets", part: Part, echoed: tuple[Prompt, Sequence[LogProbabilities]] | None
    ) -> dict[str, Any]:
        served = self._generation.served
        tokens: list[int] = []
        scores: list[LogProbabilities | None] = []
        places: list[int] = []
        if echoed is not None:
            prompt, before = echoed
            tokens, scores = [*prompt.ids], [None, *before]
            places = offsets.of_prompt(prompt)
        shown = shown_tokens(part, self._generation)
        places += offsets.of_tokens(shown)
        tokens += shown
        scores += part.scores[: len(shown)]
        found: dict[str, Any] = {
            "tokens": [token_text(served, token) for token in tokens],
            "token_logprobs": [None if each is None else finite(each.token) for each in scores],
            "top_logprobs": [
                None if each is None else unique_alternatives(served, each, token)
                for token, each in zip(tokens, scores, strict=True)
            ],
            "text_offset": places,
        }
        if self._body.return_token_ids:
            found["top_token_ids"] = [
                None if each is None else alternative_ids(served, each, token)
                for token, each in zip(tokens, scores, strict=True)
            ]
        return found


class _Offsets:
    """Where tokens begin in the text of a choice, in characters."""

    def __init__(self, generation: Generation) -> None:
        self._tokenizer = generation.served.tokenizer
        self._decoder = self._tokenizer.stream_decoder()
        self._length = 0

    def of_prompt(self, prompt: Prompt) -> list[int]:
        """Return the offsets of the prompt's tokens, which come first."""
        decoder = self._tokenizer.stream_decoder()
        ends = accumulate(len(decoder.feed(token)) for token in prompt.ids)
        self._length = len(prompt.text)
        return [0, *ends][:-1]

    def of_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Return the offsets of the next tokens."""
        places = []
        for token in tokens:
            places.append(self._length)
            self._length += len(self._decoder.feed(token))
        return places


def shown_tokens(part: Part, generation: Generation) -> list[int]:
    """Return the tokens of a part without the stop token that ended it, which is no text."""
    ended = part.finish == "stop" and part.tokens and part.tokens[-1] in generation.reply.requests[0].stops
    return part.tokens[:-1] if ended else part.tokens
