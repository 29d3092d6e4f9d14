"""A server on loopback that shows runs while they train: one page, made again only when a run has changed."""

import gzip
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import OutputError
from gemmule.report.page import report_page
from gemmule.report.summary import read_runs, refresh, version

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_READER_SECONDS = 30  # after which a reader that takes nothing is let go
_MOST_READERS = 32
_SHARE = 0.05  # of a core, at most, that making the page takes from the run
_SHORTEST_PAUSE = 1.0  # seconds between two pages


class Answer(NamedTuple):
    """A page as it is sent, and the tag by which a browser asks whether it has changed."""

    body: bytes
    compressed: bytes
    tag: str


class LivePage:
    """The page of runs, made from what was appended to their logs, for any number of readers at once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._runs = read_runs(folders, expected=False)
        self._lock = threading.Lock()
        self._version: Any = None
        self._answer: Answer | None = None
        self._next = 0.0
        self.made = 0  # pages so far

    def answer(self) -> Answer:
        """Return the newest page: at once where nothing has changed, or it was made a moment ago."""
        current = self._answer
        if current is not None and not self._lock.acquire(blocking=False):
            return current  # another reader's thread is making it
        if current is None:
            self._lock.acquire()
        try:
            return self._made()
        finally:
            self._lock.release()

    def _made(self) -> Answer:
        if self._answer is not None and time.monotonic() < self._next:
            return self._answer
        seen = [version(facts) for facts in self._runs]
        if self._answer is None or seen != self._version:
            began = time.monotonic()
            for facts in self._runs:
                refresh(facts)
            body = report_page(self._runs, live=True).encode()
            self._answer = Answer(body, gzip.compress(body, 1), f'"{hashlib.sha256(body).hexdigest()[:32]}"')
            self._version = seen
            self.made += 1
            took = time.monotonic() - began
            self._next = time.monotonic() + max(_SHORTEST_PAUSE, took / _SHARE)
        return self._answer


class WatchServer(ThreadingHTTPServer):
    """Serves a live page; each reader has a thread, so a slow one holds up nobody."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folders: Sequence[Path], host: str, port: int) -> None:
        self.page = LivePage(folders)
        self.names = {host, LOOPBACK, "localhost", "[::1]"} if host in (LOOPBACK, "localhost") else None
        self.readers = threading.BoundedSemaphore(_MOST_READERS)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputError(f"--host {host} --port {port}: {reason}; name another, or leave --port out") from None

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Pass over readers that went away."""
        log.debug("a reader went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the page."""

    server: WatchServer
    server_version, sys_version = "gemmule", ""
    timeout = _READER_SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if self.server.names is not None and name not in self.server.names:  # another site's name for this machine
            self._refuse(403)
        elif self.path.partition("?")[0] != "/":
            self._refuse(404)
        elif not self.server.readers.acquire(blocking=False):
            self._refuse(503)
        else:
            try:
                self._send_page(with_body)
            finally:
                self.server.readers.release()

    def _send_page(self, with_body: bool) -> None:
        answer = self.server.page.answer()
        if self.headers.get("If-None-Match") == answer.tag:
            self.send_response(304)
            self._end(answer.tag, 0)
            return
        packed = "gzip" in self.headers.get("Accept-Encoding", "")
        body = answer.compressed if packed else answer.body
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        if packed:
            self.send_header("Content-Encoding", "gzip")
        self._end(answer.tag, len(body))
        if with_body:
            self.wfile.write(body)

    def _end(self, tag: str, length: int) -> None:
        for key, value in {
            "ETag": tag,
            "Content-Length": str(length),
            "Cache-Control": "no-cache",
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(key, value)
        self.end_headers()

    def _refuse(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the name that the library has
        log.debug(format, *arguments)
