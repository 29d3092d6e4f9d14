"""A connection of uvicorn's with limits on heads, and errors in the shape of all others."""

import asyncio
import secrets
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gemmule.serve.failures import ApiError
from gemmule.serve.settings import Limits

# Bytes that wait in the socket's buffer before a stream joins what comes: about a hundred events.
_BUFFERED = 16 << 10


def limited_connection(limits: Limits) -> type[HttpToolsProtocol]:
    """Return a protocol class that keeps the limits."""

    class LimitedConnection(HttpToolsProtocol):
        """Closes connections that send no request, half of one, or one with a head beyond the limit."""

        _head = 0  # bytes so far of the head that is being read
        _in_head = True
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=_BUFFERED)
            if len(self.connections) > limits.connections:
                self._refuse(ApiError(503, "too many connections; try again later", code="too_many_connections"))
                return
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head += len(data)
            super().data_received(data)
            if self._in_head and self._head > limits.head_bytes and not self.transport.is_closing():
                message = f"the head of the request is larger than {limits.head_bytes:,} bytes"
                self._refuse(ApiError(431, message, code="headers_too_large"))

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if not self._in_head:
                self._expect_head()

        def on_headers_complete(self) -> None:
            self._head_came()
            super().on_headers_complete()

        def _expect_head(self) -> None:
            self._in_head, self._head = True, 0
            self._deadline = self.loop.call_later(limits.request_seconds, self._head_is_late)

        def _head_came(self) -> None:
            self._in_head = False
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _head_is_late(self) -> None:
            if not self.transport.is_closing():
                self._refuse(ApiError(408, "the request did not come in time", code="request_timeout"))

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, f"not HTTP: {msg}", code="invalid_http"))

        def _refuse(self, error: ApiError) -> None:
            """Send an error before there is a request, and close."""
            body = error.encoded()
            headers: dict[str, Any] = error.headers | {
                "content-type": "application/json",
                "content-length": len(body),
                "connection": "close",
                "x-request-id": f"req_{secrets.token_hex(12)}",
            }
            lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
            self.transport.close()

    return LimitedConnection
