"""A model of this process that chats, without HTTP: one engine over all turns; and the replay of its replies."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gemmule.errors import ModelError
from gemmule.inference.conversation import Chunk, Piece, ReplySettings, Usage, encode_piece, prompt_ids
from gemmule.inference.engine import step_or_raise
from gemmule.inference.requests import Request
from gemmule.serve.models import ServedModel


class LocalModel:
    """Replies in the caller's thread; earlier turns are taken from the engine's cache."""

    def __init__(self, served: ServedModel, chats: bool | None = None) -> None:
        """Take a model; `chats` is by default whether it has a chat template."""
        self.served = served
        self.chats = served.chats if chats is None else chats
        self.context: int | None = served.context
        self.trained_context = served.trained_context
        self.fingerprint: str | None = served.fingerprint
        self._stopped = False

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a user's text, special tokens as ordinary text, without bos."""
        return encode_piece(self.served.tokenizer, text)

    def stop(self) -> None:
        """End the reply that is being made, between two steps."""
        self._stopped = True

    def reply(self, pieces: Sequence[Piece], settings: ReplySettings, seed: int) -> Iterator[Chunk]:
        """Yield a reply to the pieces so far; ModelError where the context is full."""
        ids = prompt_ids(self.served.tokenizer, pieces, self.chats, settings.system)
        yield from self.complete(ids, settings, seed)

    def complete(self, ids: Sequence[int], settings: ReplySettings, seed: int) -> Iterator[Chunk]:
        """Yield a reply to the tokens that the model reads; errors as in `reply`."""
        engine, request = self.served.engine, self._request(ids, settings, seed)
        self._stopped = False
        yield Chunk("", prompt=request.prompt)
        (sequence,) = engine.submit(request)
        started = first = time.monotonic()
        usage = Usage(len(ids), 0, 0, 0.0)
        try:
            while not engine.idle:
                for _, event in step_or_raise(engine):
                    now = time.monotonic()
                    first = now if first == started else first
                    usage = Usage(len(ids), sequence.cached, len(sequence.generated), now - first)
                    yield Chunk(event.text, (event.token,), event.finish, usage if event.finish else None)
                if self._stopped and sequence.finish is None:
                    break
        finally:
            if sequence.finish is None:
                engine.cancel([sequence])
        if sequence.finish == "cancelled":
            assert sequence.stream is not None
            yield Chunk(sequence.stream.end(), (), "stopped", usage)

    def _request(self, ids: Sequence[int], settings: ReplySettings, seed: int) -> Request:
        served = self.served
        if not ids:
            raise ModelError("this model's tokenizer begins no text with bos: write a word first")
        if max(ids) >= served.vocab_size:
            raise ModelError(f"there is no token {max(ids)}: the model's vocabulary ends at {served.vocab_size - 1}")
        left = served.context - len(ids)
        if left < 1:
            full = f"{len(ids)} tokens fill the model's context of {served.context}"
            raise ModelError(f"{full}; continue from an earlier piece, or begin anew")
        limit = min(settings.max_tokens or left, left)
        return Request(
            tuple(ids),
            limit,
            settings.sampling,
            seed,
            stops=served.stops,
            stop_strings=settings.stop,
            min_new_tokens=min(settings.min_tokens, limit),
        )


class Repetition(NamedTuple):
    """How a reply compares with its repetition; `differs` is the first token that is another, from 0."""

    expected: list[int]
    generated: list[int]
    differs: int | None


def repeat(model: LocalModel, reply: Piece) -> Repetition:
    """Generate a reply once more, from what is written beside it, and compare; errors as in `LocalModel.reply`.

    Of one that the model ended, the end is compared, too: the repetition has a token more where it does not end there.
    """
    assert reply.tokens is not None
    assert reply.prompt is not None
    assert reply.seed is not None
    ended = reply.finish == "stop"
    settings = (reply.settings or ReplySettings()).replace(max_tokens=max(1, len(reply.tokens) + ended))
    generated: list[int] = []
    finish = None
    for chunk in model.complete(reply.prompt, settings, reply.seed):
        generated += chunk.tokens
        finish = chunk.finish or finish
    if finish == "stop" or not ended:
        generated = generated[: len(reply.tokens)]
    return Repetition(reply.tokens, generated, _first_difference(reply.tokens, generated))


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))
