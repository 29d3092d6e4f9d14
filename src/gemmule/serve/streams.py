"""Server-sent events to one client: sent as they come, an error as an event of its own."""

import asyncio
import json
import time
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
    """Sends events as they come, and comments while none do; `on_end` is called when it is over, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        keep_alive_seconds: float,
        stalled_seconds: float,
        on_end: Callable[[str], None],
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events, self._on_end = events, on_end
        self._keep_alive_seconds, self._stalled_seconds = keep_alive_seconds, stalled_seconds
        # When the last write began, and whether the client has not taken it yet. One task looks at them from time to
        # time: a timeout of each write would cost as much as the write.
        self._written, self._writing = time.monotonic(), True

    async def __call__(self, _scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Send the response."""
        outcome = "error"
        sending = asyncio.create_task(self._send(send))
        ends = (sending, asyncio.create_task(disconnected(receive)), asyncio.create_task(self._watch(send)))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            outcome = sending.result() if sending.done() else "cancelled"
        except OSError:
            outcome = "cancelled"
        finally:
            self._on_end(outcome)
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _send(self, send: Send) -> str:
        """Send everything; return the outcome."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._written, self._writing = time.monotonic(), False
        outcome = "done"
        try:
            async for content in self._events:
                await self._write(send, content)
        except ApiError as error:
            outcome = "error"
            await self._write(send, event(error.body()))
        await self._write(send, b"", more=False)
        return outcome

    async def _watch(self, send: Send) -> None:
        """Keep a silent stream alive; return where the client has taken nothing for long."""
        while True:
            await asyncio.sleep(min(self._keep_alive_seconds, self._stalled_seconds) / 4)
            silent = time.monotonic() - self._written
            if self._writing and silent > self._stalled_seconds:
                return
            if not self._writing and silent > self._keep_alive_seconds:
                await self._write(send, KEEP_ALIVE)

    async def _write(self, send: Send, content: bytes, *, more: bool = True) -> None:
        self._written, self._writing = time.monotonic(), True
        await send({"type": "http.response.body", "body": content, "more_body": more})
        self._writing = False
