"""The process: socket, signals, the engine's thread, and how all of it ends."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from gemmule.errors import GemmuleError, OutputError, UserError
from gemmule.serve.app import Service, make_app
from gemmule.serve.connection import limited_connection
from gemmule.serve.engine_thread import EngineThread
from gemmule.serve.failures import unavailable
from gemmule.serve.follow import check_followed, follow
from gemmule.serve.settings import ServerSettings

log = logging.getLogger(__name__)

# Until streams have sent their last event.
_FLUSH_SECONDS = 5.0
# A thread that comes back from a step waits so long for the other at most; Python's default is 5 ms.
_SWITCH_SECONDS = 0.0005


class _Server(uvicorn.Server):
    """Uvicorn's server, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GemmuleServer:
    """A server with its socket; `serve` runs it to its end, in an event loop."""

    def __init__(self, settings: ServerSettings, write: Callable[[str], None] | None = None) -> None:
        self.settings, self.service = settings, Service(settings)
        self._socket = listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        limits = settings.limits
        config = uvicorn.Config(
            make_app(self.service, write),
            http=limited_connection(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(limits.idle_seconds),
            timeout_graceful_shutdown=int(2 * _FLUSH_SECONDS),
        )
        self._uvicorn = _Server(config)
        self._ended: asyncio.Event | None = None

    async def serve(self, on_ready: Callable[[], None] = lambda: None, note: Callable[[str], None] = log.info) -> None:
        """Answer until `drain` or a failure of the engine, which is raised; `note` gets what happens meanwhile."""
        self._ended = asyncio.Event()
        loop, service = asyncio.get_running_loop(), self.service

        def ready() -> None:
            service.ready = True
            on_ready()

        def failed(error: BaseException) -> None:
            service.failed = error
            self._end()

        engine = service.engine = EngineThread(self.settings, service.metrics, loop, ready, failed)
        engine.start()
        serving = asyncio.create_task(self._uvicorn.serve([self._socket]))
        ended = asyncio.create_task(self._ended.wait())
        following = asyncio.create_task(follow(engine, self.settings, note)) if self.settings.follow else None
        await asyncio.wait((serving, ended), return_when=asyncio.FIRST_COMPLETED)
        self._uvicorn.should_exit = True
        aborting = asyncio.create_task(self._abort_slow())
        await serving
        service.close()
        engine.stop(_FLUSH_SECONDS)
        for task in (ended, following, aborting):
            if task is not None:
                task.cancel()
        if service.failed is not None:
            raise service.failed

    async def _abort_slow(self) -> None:
        """Let go of clients that do not take their last event in time."""
        await asyncio.sleep(_FLUSH_SECONDS)
        for connection in [*self._uvicorn.server_state.connections]:
            connection.transport.abort()

    def drain(self) -> None:
        """Take no new requests, finish those that run within the time for it, then end; in the event loop."""
        if not self.service.draining:
            self.service.draining = True
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.service.replies:
                    await asyncio.sleep(0.02)
        for reply in [*self.service.replies]:
            reply.fail(unavailable("the server shut down before the reply was finished"))
        self._end()

    def _end(self) -> None:
        if self._ended is not None:
            self._ended.set()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; OutputError where the address cannot be had."""
    try:
        return _bind(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"--host {host} --port {port}: {reason}; name another, or --port 0 for a free one") from None


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(1024)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


def run(settings: ServerSettings, note: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once. GemmuleError where the engine failed."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each client that does not speak HTTP
    if settings.follow:
        check_followed(settings)
    write = _write_line if settings.access_log else None
    server = GemmuleServer(settings, write)

    def ready() -> None:
        assert server.service.engine is not None
        for served in server.service.engine.models.values():
            note(
                f"{served.id}: {served.parameters:,} parameters, {served.format}, context {served.context:,}; "
                f"a KV cache of up to {served.bound.bytes / 1e6:,.0f} MB keeps {served.bound.tokens:,} tokens"
                + ("; chats" if served.chats else "")
            )
        note(f"ready: {server.address}/v1 (Ctrl-C ends)")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _on_signal, server, number, note)
        note(f"listening on {server.address}")
        await server.serve(ready, note)

    try:
        asyncio.run(main())
    except UserError:
        raise
    except Exception as error:
        raise GemmuleError(f"the engine failed: {error!r:.200}; its traceback stands above") from None


def _on_signal(server: GemmuleServer, number: int, note: Callable[[str], None]) -> None:
    if server.service.draining:
        os._exit(128 + number)
    note(f"finishing what runs, for up to {server.settings.drain_seconds:g} seconds; a second signal ends at once")
    server.drain()


def _write_line(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
