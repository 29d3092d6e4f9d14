"""Server-sent events to one client: sent as they come, an error as an event of its own."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from gemmule.serve.failures import ApiError

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class ClientGone(Exception):  # noqa: N818 - a state that the caller resolves, not an error
    """The client went away, or takes nothing any more."""


def event(data: Any) -> bytes:
    """Return an event of JSON data."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Return when the client goes away; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come; `on_end` is called when the stream is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        stalled_seconds: float,
        on_end: Callable[[str], None],
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._on_end = events, on_end
        self._stalled_seconds = stalled_seconds

    async def __call__(self, _scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send the response."""
        outcome = "error"
        gone = asyncio.create_task(disconnected(receive))
        sending = asyncio.create_task(self._send(send))
        try:
            await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            outcome = sending.result() if sending.done() else "cancelled"
        except ClientGone:
            outcome = "cancelled"
        finally:
            self._on_end(outcome)
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)

    async def _send(self, send: Send) -> str:
        """Send everything; return the outcome."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        outcome = "done"
        try:
            async for content in self._events:
                await self._write(send, content)
        except ApiError as error:
            outcome = "error"
            await self._write(send, event(error.body()))
        await self._write(send, b"", more=False)
        return outcome

    async def _write(self, send: Send, content: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._stalled_seconds):
                await send({"type": "http.response.body", "body": content, "more_body": more})
        except (TimeoutError, OSError):
            raise ClientGone from None
