"""What stands before the application: who may ask, how much, how long; a line of the access log for each answer."""

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gemmule.serve.failures import ApiError
from gemmule.serve.page_files import page_paths
from gemmule.serve.settings import LOOPBACK_NAMES, ServerSettings
from gemmule.serve.streams import Receive, Send

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
_WILDCARDS = ("0.0.0.0", "::")
OPEN_PATHS = ("/health",)  # without an API key, for probes
# Of a body over the limit so much is read and dropped, so that a client that first sends all of it gets its answer.
_DROPPED = 4
_SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass
class Record:
    """One line of the access log."""

    id: str
    client: str
    method: str
    path: str
    status: int = 0
    outcome: str = ""
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Guard:
    """ASGI middleware; the application finds the `Record` of its request in the scope, under "gemmule"."""

    def __init__(self, app: App, settings: ServerSettings, write: Callable[[str], None] | None) -> None:
        self._app, self._settings, self._limits, self._write = app, settings, settings.limits, write
        self._names = _own_names(settings)
        self._open = {*OPEN_PATHS, *page_paths()}  # the page has no secrets, and asks for the key itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode("ascii") if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        client = scope.get("client") or ("", 0)
        record = Record(request_id, str(client[0]), scope["method"], scope["path"])
        scope["gemmule"] = record
        began = time.monotonic()

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", request_id.encode()), *_SAFETY,
                ]  # fmt: skip
            await send(message)

        try:
            self._check(scope, headers)
            limited = _LimitedBody(receive, headers, self._limits.body_bytes, self._limits.request_seconds)
            await self._app(scope, limited.receive, answer)
        except ApiError as error:
            await refuse(error, answer)
        finally:
            self._log(record, time.monotonic() - began)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError unless the request is for us, from nobody's web page, and has a key where one is needed."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_ours(_host_name(host)):
            raise ApiError(
                403,
                f"Host {host!r}: this server does not listen as that; start it with --allow-host",
                code="foreign_host",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        # Of our own page the origin is the host that was asked, whatever the scheme is before a proxy.
        if origin and origin not in self._settings.allowed_origins and _netloc(origin) != host.lower():
            raise ApiError(
                403, f"Origin {origin!r}: not allowed; start the server with --allow-origin", code="foreign_origin"
            )
        navigates = headers.get(b"sec-fetch-mode") == b"navigate" and scope["method"] in ("GET", "HEAD")
        if headers.get(b"sec-fetch-site") == b"cross-site" and not navigates and not origin:
            raise ApiError(403, "a web page of another site may not ask this server", code="foreign_origin")
        if self._settings.api_keys and scope["path"] not in self._open:
            self._check_key(headers.get(b"authorization", b""))

    def _check_key(self, given: bytes) -> None:
        scheme, _, key = given.partition(b" ")
        known = [hmac.compare_digest(key.strip(), each) for each in self._settings.api_keys]  # all, in constant time
        if scheme.lower() != b"bearer" or not any(known):
            state = "wrong" if key else "missing"
            message = f"the API key is {state}; send it as a header: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _is_ours(self, name: str) -> bool:
        if name in self._names:
            return True
        # Who listens on every address is reached by any of them; only names can be another's.
        return self._settings.host in _WILDCARDS and _is_address(name)

    def _log(self, record: Record, seconds: float) -> None:
        if self._write is None:
            return
        line = {"time": round(time.time(), 3), **vars(record), "seconds": round(seconds, 4)}
        line["path"] = record.path[:200]
        self._write(json.dumps({name: value for name, value in line.items() if value not in (None, "")}))


class _LimitedBody:
    """Receives a body of so many bytes within so many seconds; ApiError beyond."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], most: int, seconds: float) -> None:
        self._receive, self._most = receive, most
        self._read, self._complete = 0, False
        self._deadline = time.monotonic() + seconds
        length = headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() and len(length) < 20 else 0
        self._asks_first = headers.get(b"expect", b"").lower() == b"100-continue"

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive the next part."""
        if self._complete:
            return await self._receive()
        if self._asks_first and self._announced > self._most:  # so nothing of it is sent
            raise self._too_large()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._next()
                if max(self._read, self._announced) > self._most:
                    await self._drop()
                    raise self._too_large()
        except TimeoutError:
            if max(self._read, self._announced) > self._most:
                raise self._too_large() from None
            raise ApiError(
                408, "the body did not come in time", code="request_timeout", headers={"connection": "close"}
            ) from None
        return message

    async def _next(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        else:
            self._complete = True
        return message

    async def _drop(self) -> None:
        while not self._complete and self._read < _DROPPED * self._most:
            await self._next()

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._most:,} bytes"
        return ApiError(413, message, code="request_too_large", headers={"connection": "close"})


async def refuse(error: ApiError, send: Send) -> None:
    """Send an error as the answer."""
    body = error.encoded()
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers by name; of those that came twice the first, which differs from the rest only in attacks."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.lower(), value)
    return found


def _own_names(settings: ServerSettings) -> frozenset[str]:
    """Return the names as which the server can be asked, in lower case."""
    own = {settings.host.lower()} | {name.lower() for name in settings.allowed_hosts}
    if settings.host in LOOPBACK_NAMES or settings.host in _WILDCARDS:
        own |= LOOPBACK_NAMES
    return frozenset(own - {""})


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets, in lower case; nothing where it is none."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/\s]+))(?::[0-9]{1,5})?", host)
    return (match[1] or match[2]).lower() if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str:
    """Return host and port of an origin; nothing where it has none."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc.lower() if parts.scheme in ("http", "https") else ""
