"""A server to measure: `gemmule serve` in a process of its own, and requests to it without a library."""

import re
import subprocess
import sys
import time
from pathlib import Path


def start_server(model: str, log: Path, *options: str) -> tuple["subprocess.Popen[str]", int]:
    """Start the server, and wait until it is ready; return it and its port. Its messages go to the file `log`."""
    command = [sys.executable, "-m", "gemmule", "serve", model, "--port", "0", "--no-access-log", *options]
    with log.open("w", encoding="utf-8") as file:  # not a pipe, which would fill
        server = subprocess.Popen(command, stderr=file, text=True)
    while server.poll() is None:
        if ready := re.search(r"^ready: http://[^:]+:(\d+)", log.read_text(encoding="utf-8"), re.MULTILINE):
            return server, int(ready[1])
        time.sleep(0.1)
    raise SystemExit(f"the server ended with {server.returncode}: {log.read_text(encoding='utf-8')}")


def http_head(length: int) -> bytes:
    """Return the head of a completion's request with a body of so many bytes."""
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length
    )
