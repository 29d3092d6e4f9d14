"""Servers for tests, on a free port of loopback: in a thread of this process, or in a process of their own."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.formats.folder import save_folder
from gemmule.serve.run import GemmuleServer
from gemmule.serve.settings import Limits, ModelSpec, ServerSettings
from gemmule.tokenizer import Tokenizer
from runs import wait_until
from tiny import lively_model, shallow_config

CONTEXT = 256


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """OpenAI's error object, which must be whole."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["code"], str)
        assert "Traceback" not in error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of the events; "[DONE]" stays text."""
        return events_of(self.body)


def events_of(body: bytes) -> list[Any]:
    """Return the data of events; every line is data, a comment or empty."""
    found = []
    for line in body.decode().split("\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert not line or line.startswith(":"), line
    return found


@dataclass
class Served:
    """A server that runs."""

    server: GemmuleServer
    loop: asyncio.AbstractEventLoop
    log: list[str] = field(default_factory=list)

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return the line of the access log of a request; it is written after the answer has been sent."""

        def lines() -> list[dict[str, Any]]:
            return [found for line in self.log if (found := json.loads(line))["id"] == request_id]

        wait_until(lambda: bool(lines()))
        return lines()[-1]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        """OpenAI's base URL."""
        return f"{self.server.address}/v1"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:
        """Send a request, by default POST with JSON where there is a body."""
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        given = dict({} if content is None else {"Content-Type": "application/json"}) | dict(headers or {})
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method or ("GET" if content is None else "POST"), path, content, given)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def complete(self, **body: Any) -> Answer:
        """POST /v1/completions."""
        return self.ask("/v1/completions", body)

    def chat(self, **body: Any) -> Answer:
        """POST /v1/chat/completions, by default with one message."""
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]} | body)


def save_model(folder: Path, tokenizer: Tokenizer, context: int = CONTEXT, seed: int = 0) -> Path:
    """Write a tiny model whose words are nonsense."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shallow_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    save_folder(lively_model(config, seed=seed), tokenizer, folder)
    return folder


def settings_for(*models: Path | str, limits: Mapping[str, Any] | None = None, **changes: Any) -> ServerSettings:
    """Return settings of a small server on a free port."""
    specs = tuple(ModelSpec(Path(model).name, str(model)) for model in models)
    given: dict[str, Any] = {"port": 0, "device": "cpu", "max_rows": 8, "cache_bytes": 64 << 20, "drain_seconds": 5}
    return ServerSettings(specs, limits=Limits(**(limits or {})), **(given | changes))


@contextmanager
def serving(
    *models: Path | str,
    limits: Mapping[str, Any] | None = None,
    on_start: Callable[[Served], None] | None = None,
    **changes: Any,
) -> Iterator[Served]:
    """Run a server while the block runs, then drain it; raises what it ended with.

    `on_start` is called when it listens, before it is ready.
    """
    lines: list[str] = []
    settings = settings_for(*models, limits=limits, **changes)
    ready, started = threading.Event(), threading.Event()
    running: list[Served] = []

    async def main() -> None:
        server = GemmuleServer(settings, lines.append)
        running.append(Served(server, asyncio.get_running_loop(), lines))
        started.set()
        await server.serve(ready.set)

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(60)
    served = running[0]
    if on_start is not None:
        on_start(served)
    assert ready.wait(60)
    try:
        yield served
    finally:
        if not served.loop.is_closed():
            served.loop.call_soon_threadsafe(served.server.drain)
        thread.join(60)
        assert not thread.is_alive()
    for failure in failures:
        raise failure


@contextmanager
def server_process(
    *arguments: object, program: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", int, list[str]]]:
    """Run `gemmule serve` on a free port; yield the process, its port and what it has printed so far."""
    start = ["-m", "gemmule"] if program is None else ["-c", program]
    command = [sys.executable, *start, "serve", *map(str, arguments), "--port", "0", "--cache", "64MB"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    assert running.stderr is not None
    said: list[str] = []
    try:
        for line in running.stderr:
            said.append(line)
            if line.startswith("ready: "):
                break
        found = re.search(r"http://[^:]+:(\d+)", "".join(said))
        assert found is not None, said
        yield running, int(found[1]), said
    finally:
        running.kill()
        running.communicate()
