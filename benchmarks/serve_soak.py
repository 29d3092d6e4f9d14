"""Does a server stay right, quick and small while clients come, are cut, fall silent, or read slowly?

    python benchmarks/serve_soak.py runs/story --seconds 300 --streams 64

Starts `gemmule serve`, learns what a few dozen requests are answered when they come alone, and then keeps so many
streams of them open. Of the clients one in nine is cut in the middle, one in nine sends half a request and falls
silent, and one in nine reads 100 bytes per second. Every reply that a client got whole, or the beginning that it got,
has to be the one that came alone. Reports percentiles of the time to the first token and of the gaps between tokens,
of clients that read at once; memory over time; and what is left in the engine at the end. `--kill` sends SIGTERM in
the middle instead of at the end. Exits with 1 where a reply differs, a row is left, or memory grew by more than 5 %
after the first fifth of the time.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.server import http_head, start_server
from harness.trials import machine

PROMPTS = ("Once upon a time", "Tom found a red", "Mia saw the owl. The owl", "The end. " * 12, "One day " * 60, "")
KINDS = ("reads",) * 6 + ("cut", "silent", "slow")
SLOW_BYTES, SLOW_SECONDS = 100, 1.0


@dataclass
class Seen:
    """What clients measured."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[Any] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


def requests(count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Return different requests of mixed lengths and settings."""
    draw = random.Random(seed)
    return [
        {
            "prompt": draw.choice(PROMPTS),
            "max_tokens": draw.randint(1, tokens),
            "temperature": draw.choice([0, 0.7, 1.0]),
            "min_p": draw.choice([0, 0.1]),
            "repetition_penalty": draw.choice([1.0, 1.1]),
            "n": draw.choice([1, 1, 1, 2]),
            "seed": number,
            "stream": True,
        }
        for number in range(count)
    ]


def texts(received: bytes) -> tuple[dict[int, str], str]:
    """Return what came of each choice, and how the stream ended."""
    found: dict[int, str] = {}
    end = "cut"
    for line in re.findall(rb"^data: (.*)\n", received, re.MULTILINE):
        if line == b"[DONE]":
            end = "done"
            continue
        data = json.loads(line)
        if "error" in data:
            end = data["error"]["code"]
            continue
        for choice in data["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found, end


class Clients:
    """Clients of one server."""

    def __init__(self, port: int, patience: float) -> None:
        self.port, self.patience, self.seen = port, patience, Seen()

    async def whole(self, body: dict[str, Any]) -> dict[int, str]:
        """Return the reply to a request."""
        found, end = texts(await self._read(body, "reads", random.Random(0)))
        assert end == "done", end
        return found

    async def get(self, path: str) -> str:
        """GET a path; return the whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer.decode()

    async def come_and_go(self, known: Sequence[tuple[dict[str, Any], dict[int, str]]], end: float, seed: int) -> None:
        """Be one client after the other until a moment of time.monotonic()."""
        draw = random.Random(seed)
        while time.monotonic() < end:
            body, expected = draw.choice(known)
            kind = draw.choice(KINDS)
            try:
                received = await self._read(body, kind, draw)
            except OSError:
                self.seen.ended["refused"] += 1
                await asyncio.sleep(0.05)
                continue
            if not received.startswith(b"HTTP/1.1 200"):
                status = received[9:12].decode() or "closed"
                self.seen.ended[f"{kind}: {status}"] += 1
                await asyncio.sleep(0.05)
                continue
            found, how = texts(received)
            self.seen.ended[f"{kind}: {how}"] += 1
            whole = how == "done"
            for choice, text in expected.items():
                own = found.get(choice, "")
                if own != text if whole else not text.startswith(own):
                    self.seen.wrong.append({"request": body, "kind": kind, "expected": text, "found": own})

    async def _read(self, body: dict[str, Any], kind: str, draw: random.Random) -> bytes:
        content = json.dumps(body).encode()
        limit = 4096 if kind == "slow" else 1 << 20
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        try:
            if kind == "silent":
                writer.write(http_head(len(content)) + content[: len(content) // 2])
                await asyncio.wait_for(reader.read(), draw.uniform(0.2, self.patience)) if draw.random() < 0.5 else None
                return b""
            began = last = time.monotonic()
            writer.write(http_head(len(content)) + content)
            received, cut = b"", draw.randint(1, 20_000)
            while piece := await reader.read(SLOW_BYTES if kind == "slow" else 65536):
                if kind == "reads" and b"data: " in piece:
                    now = time.monotonic()
                    (self.seen.gaps if b"data: " in received else self.seen.first).append(now - last)
                    last = now
                received += piece
                if kind == "cut" and len(received) > cut:
                    break
                if kind == "slow":
                    await asyncio.sleep(SLOW_SECONDS)
                    if time.monotonic() - began > self.patience:
                        break
            return received
        except TimeoutError:
            return b""
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def watch(self, process: int) -> None:
        """Note the memory of the server every second."""
        began = time.monotonic()
        while True:
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
            found = re.search(r"VmRSS:\s+(\d+) kB", status)
            self.seen.memory.append((time.monotonic() - began, int(found[1]) << 10 if found else 0))
            await asyncio.sleep(1)


async def soak(options: argparse.Namespace, port: int, server: "subprocess.Popen[str]") -> dict[str, Any]:
    """Run the clients; return what is to be reported."""
    clients = Clients(port, options.patience)
    known = []
    for body in requests(options.requests, options.tokens, options.seed):
        known.append((body, await clients.whole(body)))
    end = time.monotonic() + options.seconds
    watching = asyncio.create_task(clients.watch(server.pid))
    streams = [
        asyncio.create_task(clients.come_and_go(known, end, options.seed + 1 + number))
        for number in range(options.streams)
    ]
    if options.kill:
        await asyncio.sleep(options.seconds / 2)
        server.send_signal(signal.SIGTERM)
    await asyncio.gather(*streams)
    watching.cancel()
    left = 0.0
    if not options.kill:
        for _ in range(100):
            figures = await clients.get("/metrics")
            left = sum(
                map(float, re.findall(r"^gemmule_sequences_(?:running|queued)\{.*\} (\S+)$", figures, re.MULTILINE))
            )
            if not left:
                break
            await asyncio.sleep(0.1)
    return report(clients.seen, left, options.seconds)


def report(seen: Seen, left: float, seconds: float) -> dict[str, Any]:
    """Return the figures of a soak."""
    later = [size for moment, size in seen.memory if moment > seconds / 5] or [0]
    return {
        "ended": dict(sorted(seen.ended.items())),
        "wrong": len(seen.wrong),
        "first_wrong": seen.wrong[:1],
        "rows_left": left,
        "first_token_ms": percentiles(seen.first),
        "gap_ms": percentiles(seen.gaps),
        "memory_mb": [round(size / 1e6) for size in (later[0], max(later), later[-1])],
        "memory_grew": round(max(later) / max(later[0], 1) - 1, 4),
    }


def percentiles(numbers: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 90th, 99th percentile and the maximum, in milliseconds."""
    if len(numbers) < 2:
        return {}
    cuts = statistics.quantiles(numbers, n=100)
    found = {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(numbers)}
    return {name: round(1000 * number, 1) for name, number in found.items()}


def main() -> None:
    """Soak a server and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=48, help="different requests")
    parser.add_argument("--tokens", type=int, default=200, help="of a reply at most")
    parser.add_argument("--cache", default="64MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=20, help="seconds until slow and silent clients leave")
    parser.add_argument("--kill", action="store_true", help="SIGTERM in the middle")
    parser.add_argument("--log", type=Path, default=Path("serve_soak.log"), help="what the server says")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    server, port = start_server(options.model, options.log, "--cache", options.cache, "--drain", "10")
    try:
        found = asyncio.run(soak(options, port, server))
        if not options.kill:
            server.send_signal(signal.SIGTERM)
        found["exit_code"] = server.wait(60)
    finally:
        server.kill()
    found |= {"benchmark": "serve_soak", "seconds": options.seconds, "streams": options.streams, "machine": machine()}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if found["wrong"] or found["rows_left"] or found["exit_code"] or (not options.kill and found["memory_grew"] > 0.05):
        sys.exit(1)


if __name__ == "__main__":
    main()
