"""From a generation to its HTTP response, in the format of either endpoint."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import Response

from gemmule.serve.generation import Generation
from gemmule.serve.replies import Part
from gemmule.serve.streams import DONE, ClientGone, Receive, disconnected, event

T = TypeVar("T")
# Log-probabilities from which on an answer is written in another thread, so that streams do not wait for it.
_LARGE = 500
_EVENT_END = "]}\n\n"


class Format(Protocol):
    """The objects of a reply, as an endpoint has them."""

    whole_kind: str
    chunk_kind: str

    def first_choices(self) -> list[dict[str, Any]]:
        """Return what is sent of each choice before any token."""

    def prompt_ids(self) -> dict[str, Any]:
        """Return the ids of the prompt as a field of the whole reply, where asked for and not in the choices."""

    def chunks(self, choice: int, part: Part) -> Iterator[dict[str, Any]]:
        """Yield what a part adds to a choice."""

    def plain_chunk(self, choice: int, part: Part) -> str | None:
        """Return the JSON of the one chunk of a part that is text alone, in the middle of a choice; else None."""

    def whole(self, choice: int, part: Part) -> dict[str, Any]:
        """Return a choice of the whole reply."""


async def stream(generation: Generation, format_: Format) -> AsyncIterator[bytes]:
    """Yield the events of a reply, those that came together at once."""
    body, reply = generation.body, generation.reply
    options = body.stream_options
    counted = bool(options and options.include_usage)
    head = generation.head(format_.chunk_kind) | ({"usage": None} if counted else {})
    # What each event begins with, encoded once.
    prefix = f'data: {json.dumps(head, separators=(",", ":"))[:-1]},"choices":['
    for choice in format_.first_choices():
        yield event(head | {"choices": [choice]} | (format_.prompt_ids() if choice["index"] == 0 else {}))
    size = _prompt_scores(generation)
    while parts := await reply.parts():
        chunks = functools.partial(_encoded, prefix, format_, parts)
        yield await asyncio.to_thread(chunks) if size > _LARGE else chunks()
        size = 0
    if counted or body.timings:
        last = head | {"choices": []}
        last |= {"usage": generation.usage()} if counted else {}
        last |= {"timings": generation.timings()} if body.timings else {}
        yield event(last)
    yield DONE


async def whole(generation: Generation, format_: Format) -> bytes:
    """Return the whole reply as JSON; ApiError where it fails."""
    reply = generation.reply
    choices = {choice: Part() for choice in range(reply.choices)}
    while parts := await reply.parts():
        for choice, part in parts:
            choices[choice].join(part)
    answer = generation.head(format_.whole_kind)

    def content() -> bytes:
        answer["choices"] = [format_.whole(choice, part) for choice, part in choices.items()]
        answer.update(format_.prompt_ids())
        answer["usage"] = generation.usage()
        if generation.body.timings:
            answer["timings"] = generation.timings()
        return json.dumps(answer, ensure_ascii=False).encode()

    scores = _prompt_scores(generation) + sum(len(part.scores) for part in choices.values())
    return await asyncio.to_thread(content) if scores > _LARGE else content()


def _encoded(prefix: str, format_: Format, parts: Sequence[tuple[int, Part]]) -> bytes:
    """Return the events of parts."""
    events: list[str] = []
    for choice, part in parts:
        if (plain := format_.plain_chunk(choice, part)) is not None:
            events.append(prefix + plain + _EVENT_END)
        else:
            chunks = format_.chunks(choice, part)
            events += [prefix + json.dumps(each, separators=(",", ":")) + _EVENT_END for each in chunks]
    return "".join(events).encode()


def _prompt_scores(generation: Generation) -> int:
    """Return how many log-probabilities of prompts are returned."""
    reply = generation.reply
    asked = reply.requests[0].prompt_log_probabilities is not None
    return reply.samples * sum(len(prompt.ids) for prompt in generation.prompts) if asked else 0


async def unless_gone(receive: Receive, awaited: Coroutine[Any, Any, T]) -> T:
    """Return what is awaited; ClientGone where the client goes away first."""
    gone, pending = asyncio.create_task(disconnected(receive)), asyncio.create_task(awaited)
    try:
        await asyncio.wait((gone, pending), return_when=asyncio.FIRST_COMPLETED)
        if not pending.done():
            raise ClientGone
        return pending.result()
    finally:
        for task in (gone, pending):
            task.cancel()
        await asyncio.gather(gone, pending, return_exceptions=True)


def json_response(content: Any, status: int = 200) -> Response:
    """Return a response of JSON."""
    return Response(json.dumps(content, ensure_ascii=False).encode(), status, media_type="application/json")
