"""`gemmule serve` as a process: how it begins, and all the ways in which it ends."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from serving import events_of, save_model, server_process

from gemmule.cli.serve import read_size
from gemmule.errors import UserError
from gemmule.tokenizer import Tokenizer
from runs import gemmule

# The engine's thread fails at a step of its own, after so many.
FAILING = """
import sys
from gemmule.inference.engine import Engine
step, count = Engine.step, 0
def fails(engine):
    global count
    count += 1
    if count > 60:
        raise RuntimeError("a kernel failed")
    return step(engine)
Engine.step = fails
from gemmule.__main__ import main
main()
"""

# A client that begins to read a stream, says so, and then does nothing.
CLIENT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
body = sys.argv[2].encode()
head = "POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
connection.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
connection.recv(100)
print(flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("long") / "long", tiny_tokenizer, context=8192)


def begin(port: int, body: Mapping[str, Any]) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def endless(**more: Any) -> dict[str, Any]:
    return {"prompt": "Mia", "max_tokens": 8000, "min_tokens": 8000, "stream": True} | more


def test_sigterm_finishes_what_runs_and_ends_with_0(long_model: Path) -> None:
    with server_process(long_model) as (running, port, said):
        assert any("keeps" in line and "tokens" in line for line in said), "the bound of the cache"
        connection = begin(port, endless(max_tokens=1500, min_tokens=1500))
        response = connection.getresponse()
        first = response.read(100)
        running.send_signal(signal.SIGTERM)
        assert events_of(first + response.read())[-1] == "[DONE]"
        connection.close()
        out, _ = running.communicate(timeout=120)
        assert running.returncode == 0
        line = json.loads(out.splitlines()[-1])
        assert (line["path"], line["outcome"], line["completion_tokens"]) == ("/v1/completions", "done", 1500)


@pytest.mark.slow
def test_what_is_left_after_the_drain_gets_an_error_and_the_process_ends_with_0(long_model: Path) -> None:
    with server_process(long_model, "--drain", "0.3") as (running, port, _):
        connections = [begin(port, endless(n=8)) for _ in range(2)]
        responses = [each.getresponse() for each in connections]
        running.send_signal(signal.SIGTERM)
        for response in responses:
            assert events_of(response.read())[-1]["error"]["code"] == "unavailable"
        for connection in connections:
            connection.close()
        running.communicate(timeout=120)
        assert running.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(long_model: Path, number: signal.Signals) -> None:
    with server_process(long_model) as (running, port, _):
        connection = begin(port, endless(n=8))
        connection.getresponse()
        running.send_signal(number)
        time.sleep(0.2)
        assert running.poll() is None
        began = time.monotonic()
        running.send_signal(number)
        running.communicate(timeout=120)
        assert time.monotonic() - began < 5
        assert running.returncode == 128 + number
        connection.close()


def test_a_failure_of_the_engine_ends_the_process_with_1(long_model: Path) -> None:
    with server_process(long_model, program=FAILING) as (running, port, _):
        connection = begin(port, endless())
        events = events_of(connection.getresponse().read())
        assert events[-1]["error"]["code"] == "engine_failed"
        assert len(events) > 20
        connection.close()
        _, error = running.communicate(timeout=120)
        assert running.returncode == 1
        assert "RuntimeError: a kernel failed" in error
        assert error.splitlines()[-1].startswith("gemmule: the engine failed")


@pytest.mark.slow
def test_clients_that_are_killed_cost_nothing(long_model: Path) -> None:
    with server_process(long_model) as (running, port, _):
        clients = [
            subprocess.Popen([sys.executable, "-c", CLIENT, str(port), json.dumps(endless())], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        for each in clients:
            assert each.stdout is not None
            each.stdout.readline()
            each.kill()
            each.communicate()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            connection = HTTPConnection("127.0.0.1", port, timeout=300)
            connection.request("GET", "/metrics")
            if 'gemmule_sequences_running{model="long"} 0.0' in connection.getresponse().read().decode():
                break
            connection.close()
            time.sleep(0.05)
        connection.close()
        assert time.monotonic() < end
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=120)
        assert running.returncode == 0


@pytest.mark.slow
def test_the_key_of_the_environment_is_asked_for(long_model: Path) -> None:
    with server_process(long_model, environment={"GEMMULE_API_KEY": "secret-key"}) as (_, port, _):
        for key, status in (("secret-key", 200), ("other-key", 401)):
            connection = HTTPConnection("127.0.0.1", port, timeout=300)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status
            connection.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing-here", "--port", "0"], "nothing-here"),
        (["{model}", "{model}", "--port", "0"], "NAME=MODEL"),
        (["{model}", "--api-key-file", "nothing-here"], "--api-key-file nothing-here: cannot be read"),
        (["{model}", "--cache", "much"], "--cache much: not a size"),
        (["{model}", "--cache", "1kb", "--port", "0"], "more with --cache, or a shorter --context"),
        (["{model}", "--context", "9000", "--port", "0"], "--context 9000"),
        (["{model}", "--host", "256.1.1.1"], "--host 256.1.1.1"),
        (["{model}", "--port", "{taken}"], "name another, or --port 0"),
        (["{model}", "--follow", "--port", "0"], "is no run folder"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(long_model: Path, arguments: list[str], sentence: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = gemmule("serve", *(each.format(model=long_model, taken=port) for each in arguments))
    assert ended.code == 2
    assert sentence in ended.err
    assert "Traceback" not in ended.err


def test_sizes_are_read_in_both_kinds_of_units() -> None:
    sizes = ["512MB", "2GB", "1.5GiB", "100", "1 kib", "7B"]
    assert [read_size(each) for each in sizes] == [512 * 10**6, 2 * 10**9, 3 * 2**29, 100, 1024, 7]
    for wrong in ("", "GB", "-1GB", "0", "1TBB", "nan", "1e999", "inf"):
        with pytest.raises(UserError):
            read_size(wrong)


def test_the_log_of_threads_is_empty_at_the_end() -> None:
    assert [thread.name for thread in threading.enumerate() if thread.name == "engine"] == []
