"""Tokens per second through HTTP, compared with the engine alone.

    python benchmarks/serve.py runs/story

Starts `gemmule serve`. In each trial the same number of replies of --tokens tokens is generated three ways, in turn: by
the engine alone (in this process, as the server makes it), streamed, and not streamed; ratios are of one trial. The
client runs on the cores of the server. It counts the events of a stream and parses none. Prints a JSON object:

tokens_per_second   of all replies together, from the first request to the end of the last reply
ratio               of that through HTTP to that of the engine alone: the median of the trials, and its quartiles
cpu_us_per_token    CPU time in microseconds: the engine alone; the client, the server's event loop, its other threads
cpu_ratio           of the engine's CPU time to that of client and server: what the ratio is where all cores are busy.
                    Other programs that run meanwhile disturb it less, with OMP_NUM_THREADS=1 least
events_per_token    below 1 where the server joined events, because the client was slow
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemmule.inference.requests import Request
from gemmule.inference.sampling import STORYTELLING
from gemmule.processes import prepare_process
from gemmule.serve.models import ServedModel, load_model
from gemmule.serve.settings import ServerSettings, name_models
from harness.server import http_head, start_server
from harness.trials import machine, spread

STREAMED, WHOLE, ALONE = "streamed", "not streamed", "engine"


class Client(asyncio.Protocol):
    """Sends one request, and keeps what comes until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received: list[bytes] = []
        self._ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep a part of the answer."""
        self._received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        if exc is None:
            self._ended.set_result(b"".join(self._received))
        else:
            self._ended.set_exception(exc)

    async def answer(self) -> bytes:
        """Return the whole answer."""
        return await self._ended


class Bench:
    """A server, an engine like the server's, and requests whose prompts nobody has read."""

    def __init__(self, options: argparse.Namespace, served: ServedModel, port: int, process: int) -> None:
        self._count, self._tokens, self._prompt = options.requests, options.tokens, options.prompt
        self._served, self._port, self._process = served, port, process
        self._draw = random.Random(0)
        self.rates: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.events: list[float] = []

    def trial(self) -> None:
        """Measure each way once."""
        before, spent = time.perf_counter(), time.process_time()
        self._run_engine()
        self._note(ALONE, time.perf_counter() - before, {"engine": time.process_time() - spent})
        for way in (STREAMED, WHOLE):
            requests = [self._http_request(way == STREAMED) for _ in range(self._count)]
            client, server = time.process_time(), cpu_seconds(self._process)
            before = time.perf_counter()
            answers = asyncio.run(self._ask(requests))
            seconds = time.perf_counter() - before
            spent_there = {name: after - server[name] for name, after in cpu_seconds(self._process).items()}
            self._note(way, seconds, {"client": time.process_time() - client} | spent_there)
            for answer in answers:
                self._check(answer, streamed=way == STREAMED)

    def forget(self) -> None:
        """Drop what was measured, of a warmup."""
        for found in (self.rates, self.cpu, self.events):
            found.clear()

    def _prompt_ids(self) -> list[int]:
        return [self._draw.randrange(self._served.vocab_size) for _ in range(self._prompt)]

    def _run_engine(self) -> None:
        engine, served = self._served.engine, self._served
        for _ in range(self._count):
            engine.submit(
                Request(
                    tuple(self._prompt_ids()),
                    self._tokens,
                    STORYTELLING,
                    self._draw.getrandbits(32),
                    stops=served.stops,
                    min_new_tokens=self._tokens,
                )
            )
        while not engine.idle:
            engine.step()

    def _http_request(self, stream: bool) -> bytes:
        body = {
            "prompt": self._prompt_ids(),
            "max_tokens": self._tokens,
            "min_tokens": self._tokens,
            "temperature": STORYTELLING.temperature,
            "min_p": STORYTELLING.min_p,
            "seed": self._draw.getrandbits(32),
            "stream": stream,
        }
        content = json.dumps(body).encode()
        return http_head(len(content)) + content

    async def _ask(self, requests: Sequence[bytes]) -> list[bytes]:
        loop = asyncio.get_running_loop()

        async def ask(request: bytes) -> bytes:
            _, client = await loop.create_connection(lambda: Client(request), "127.0.0.1", self._port)
            return await client.answer()

        return await asyncio.gather(*map(ask, requests))

    def _check(self, answer: bytes, *, streamed: bool) -> None:
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(answer.decode())
        if streamed:
            self.events.append((answer.count(b"\ndata: ") - 2) / self._tokens)  # without the finish, and [DONE]
            assert answer.count(b"data: [DONE]") == 1
        else:
            assert f'"completion_tokens": {self._tokens}'.encode() in answer, answer

    def _note(self, way: str, seconds: float, cpu: dict[str, float]) -> None:
        tokens = self._count * self._tokens
        self.rates[way].append(tokens / seconds)
        self.cpu[way].append({name: 1e6 * spent / tokens for name, spent in cpu.items()})

    def report(self) -> dict[str, Any]:
        """Return what was measured."""
        spent = {way: [sum(each.values()) for each in found] for way, found in self.cpu.items()}
        return {
            "tokens_per_second": {way: spread(rates) for way, rates in self.rates.items()},
            "ratio": _ratios(self.rates, lambda alone, way: way / alone),
            "cpu_us_per_token": {
                way: {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}
                for way, found in self.cpu.items()
            },
            "cpu_ratio": _ratios(spent, lambda alone, way: alone / way),
            "events_per_token": round(statistics.mean(self.events), 4),
        }


def _ratios(figures: Mapping[str, Sequence[float]], ratio: Callable[[float, float], float]) -> dict[str, Any]:
    """Compare both ways through HTTP with the engine alone, trial by trial."""
    return {way: spread(map(ratio, figures[ALONE], figures[way])) for way in (STREAMED, WHOLE)}


def cpu_seconds(process: int) -> dict[str, float]:
    """Return the CPU time of a server so far, by threads; the event loop is its main thread."""
    found = {"event loop": 0.0, "other threads": 0.0}
    for folder in Path(f"/proc/{process}/task").iterdir():
        nanoseconds = int((folder / "schedstat").read_text(encoding="ascii").split()[0])
        found["event loop" if folder.name == str(process) else "other threads"] += nanoseconds / 1e9
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16, help="at once")
    parser.add_argument("--tokens", type=int, default=400, help="of a reply")
    parser.add_argument("--prompt", type=int, default=20, help="tokens of a prompt")
    parser.add_argument("--trials", type=int, default=9)
    options = parser.parse_args()
    cache = 256 << 20
    served = load_model(name_models([options.model])[0], ServerSettings((), cache_bytes=cache))
    with tempfile.TemporaryDirectory() as folder:
        server, port = start_server(options.model, Path(folder) / "log", "--cache", str(cache))
        try:
            bench = Bench(options, served, port, server.pid)
            bench.trial()
            bench.forget()
            for _ in range(options.trials):
                bench.trial()
        finally:
            server.terminate()
            server.wait(60)
    found = {"benchmark": "serve", "machine": machine("uvicorn", "httptools", "uvloop"), "model": options.model}
    found |= {"requests": options.requests, "tokens": options.tokens, "decoding": served.engine.decoding}
    json.dump(found | bench.report(), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    prepare_process()
    main()
