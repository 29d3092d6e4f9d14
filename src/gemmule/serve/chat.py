"""Replies of /v1/chat/completions: whole, and in chunks."""

from collections.abc import Iterator
from json.encoder import encode_basestring_ascii
from typing import Any

from gemmule.inference.sampling import LogProbabilities
from gemmule.serve.completions import shown_tokens
from gemmule.serve.generation import Generation, finite, token_text
from gemmule.serve.replies import Part


class ChatFormat:
    """The objects of one reply."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def first_choices(self) -> list[dict[str, Any]]:
        """Return what is sent of each choice before any token: the role."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}
            for choice in range(self._generation.reply.choices)
        ]

    def prompt_ids(self) -> dict[str, Any]:
        """Return the ids of the prompt as a field of the whole reply, where asked for."""
        asked = self._generation.body.return_token_ids
        return {"prompt_token_ids": list(self._generation.prompts[0].ids)} if asked else {}

    def chunks(self, choice: int, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a part adds to a choice: text and tokens, then the end alone."""
        if part.text or part.tokens:
            yield {
                "index": choice,
                "delta": {"content": part.text},
                "logprobs": self._log_probabilities(part),
                "finish_reason": None,
                **self._ids(part),
            }
        if part.finish:
            yield {"index": choice, "delta": {}, "logprobs": None, "finish_reason": part.finish}

    def plain_chunk(self, choice: int, part: Part) -> str | None:
        """Return the JSON of the one chunk of a part that is text alone, in the middle of a choice; else None."""
        body = self._generation.body
        if part.finish or body.likeliest is not None or body.return_token_ids:
            return None
        text = encode_basestring_ascii(part.text)
        return f'{{"index":{choice},"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null}}'

    def whole(self, choice: int, part: Part) -> dict[str, Any]:
        """Return a choice of the whole reply."""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": part.text, "refusal": None},
            "logprobs": self._log_probabilities(part),
            "finish_reason": part.finish,
            **self._ids(part),
        }

    def _ids(self, part: Part) -> dict[str, Any]:
        return {"token_ids": part.tokens} if self._generation.body.return_token_ids else {}

    def _log_probabilities(self, part: Part) -> dict[str, Any] | None:
        if self._generation.body.likeliest is None:
            return None
        tokens = shown_tokens(part, self._generation)
        pairs = zip(tokens, part.scores[: len(tokens)], strict=True)
        return {"content": [self._token(token, scores) for token, scores in pairs], "refusal": None}

    def _token(self, token: int, scores: LogProbabilities) -> dict[str, Any]:
        likeliest = [self._scored(each, score) for each, score in scores.likeliest]
        return {**self._scored(token, scores.token), "top_logprobs": likeliest}

    def _scored(self, token: int, score: float) -> dict[str, Any]:
        served = self._generation.served
        return {
            "token": token_text(served, token),
            "logprob": finite(score),
            "bytes": list(served.token_bytes(token)),
        }
