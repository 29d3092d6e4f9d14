"""What streams do when the engine is busy, clients are slow or gone, and things fail."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, Served, save_model, serving

from gemmule.errors import ModelError
from gemmule.inference.engine import Engine, TokenEvent
from gemmule.inference.requests import Event, Request, SequenceState
from gemmule.inference.sampling import LogProbabilities
from gemmule.serve.engine_thread import HAND_OVER_SECONDS, EngineThread, Tokens
from gemmule.serve.failures import ApiError
from gemmule.serve.replies import Got, Part, Reply, join_parts
from gemmule.tokenizer import Tokenizer
from runs import wait_until

LONG = 4000  # tokens: some seconds


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model that can go on for long."""
    return save_model(tmp_path_factory.mktemp("long") / "long", tiny_tokenizer, context=8192)


@pytest.fixture
def busy(long_folder: Path) -> Iterator[Served]:
    """A server of two rows and a queue of two, which soon gives up a client."""
    limits = {"queue": 2, "keep_alive_seconds": 0.2, "stalled_seconds": 4.0}
    with serving(long_folder, limits=limits, max_rows=2, drain_seconds=1, chunk=32) as served:
        yield served


def endless(**more: Any) -> dict[str, Any]:
    return {"prompt": "Mia", "max_tokens": LONG, "min_tokens": LONG, "seed": 1} | more


def begin(server: Served, body: dict[str, Any]) -> socket.socket:
    """Send a completion, and return the connection after the first bytes of its answer."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=300)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def figure(server: Served, name: str) -> float:
    """Return a figure of /metrics."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.ask("/metrics").body.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def running(server: Served) -> float:
    return figure(server, 'gemmule_sequences_running{model="long"}')


def queued(server: Served) -> float:
    return figure(server, 'gemmule_sequences_queued{model="long"}')


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(busy: Served, stream: bool) -> None:
    connection = begin(busy, endless(stream=stream, n=2))
    wait_until(lambda: running(busy) == 2)
    connection.close()
    wait_until(lambda: running(busy) == 0)
    assert figure(busy, "gemmule_generated_tokens_total") < 2 * LONG
    wait_until(lambda: any('"outcome": "cancelled"' in line for line in busy.log))


def test_a_client_that_leaves_the_queue_is_forgotten(busy: Served) -> None:
    first = begin(busy, endless(stream=True, n=2))
    wait_until(lambda: running(busy) == 2)
    second = begin(busy, endless(stream=True, n=2))
    wait_until(lambda: queued(busy) == 2)
    second.close()
    wait_until(lambda: queued(busy) == 0)
    first.close()
    wait_until(lambda: running(busy) == 0)


def test_a_full_queue_is_429_and_takes_more_later(busy: Served) -> None:
    open_ = [begin(busy, endless(stream=True, n=2)) for _ in range(2)]
    wait_until(lambda: queued(busy) == 2)
    answer = busy.complete(prompt="Mia")
    assert (answer.status, answer.error["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) > 0
    assert "x-should-retry" not in answer.headers
    for each in open_:
        each.close()
    wait_until(lambda: running(busy) == 0)
    assert busy.complete(prompt="Mia").status == 200


def test_a_stream_that_waits_is_kept_alive_by_comments(busy: Served) -> None:
    first = begin(busy, endless(stream=True, n=2))
    wait_until(lambda: running(busy) == 2)
    second = begin(busy, {"prompt": "Tom", "stream": True, "max_tokens": 1})
    received = b""
    while received.count(b": keep-alive\n\n") < 2:
        received += second.recv(65536)
    first.close()
    while b"[DONE]" not in received:
        received += second.recv(65536)
    second.close()


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_given_up(busy: Served) -> None:
    body = json.dumps(endless(stream=True, logprobs=20, prompt=[2] * 3, n=2)).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", busy.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: running(busy) == 2)
    wait_until(lambda: any('"outcome": "cancelled"' in line for line in busy.log))
    wait_until(lambda: running(busy) == 0)
    connection.close()


def deliver(reply: Reply, choice: int, *events: Event) -> None:
    sequence = SequenceState(reply.requests[0], choice)
    reply.deliver(choice, sequence, [Got(event, time.monotonic()) for event in events])


def test_what_waits_for_a_slow_client_is_joined() -> None:
    async def read() -> None:
        reply = Reply([Request((2,), 9999, samples=2)], streamed=True)
        deliver(reply, 0, Event(5, "Mi", None), Event(6, "a", None))
        deliver(reply, 1, Event(8, "Tom", None))
        assert await reply.parts() == [(0, Part("Mi", [5])), (0, Part("a", [6])), (1, Part("Tom", [8]))]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reply.parts(), 0.01)
        for token in range(3000):
            deliver(reply, token % 2, Event(token, f"{token} ", None))
        deliver(reply, 0, Event(9, ".", "stop"))
        deliver(reply, 1, Event(9, ".", "length"))
        parts = await reply.parts()
        assert len(parts) < 1100
        joined = join_parts(parts)
        assert joined[0].tokens == [*range(0, 3000, 2), 9]
        assert joined[1].text == " ".join(map(str, range(1, 3000, 2))) + " ."
        assert [joined[0].finish, joined[1].finish] == ["stop", "length"]
        assert await reply.parts() == []

    asyncio.run(read())


def test_all_streams_wake_the_event_loop_together(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver, delivered = EngineThread._deliver, []

    def counting(thread: EngineThread, tokens: Tokens) -> None:
        delivered.append(sum(map(len, tokens.values())))
        deliver(thread, tokens)

    monkeypatch.setattr(EngineThread, "_deliver", counting)
    with serving(long_folder, max_rows=8) as server:
        began = time.monotonic()
        answer = server.complete(prompt="Mia", n=8, max_tokens=300, min_tokens=300, stream=True)
        seconds = time.monotonic() - began
    unfinished = [each for each in answer.events[:-1] if each["choices"][0]["finish_reason"] is None]
    assert sum(delivered) == len(unfinished) == 8 * 300
    # Once for the first tokens, once for the last ones, and at most every 20 ms between.
    assert len(delivered) <= 2 + seconds / HAND_OVER_SECONDS


def test_first_and_last_tokens_do_not_wait(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemmule.serve.engine_thread.HAND_OVER_SECONDS", 3600.0)
    with serving(long_folder, max_rows=2, drain_seconds=0.1) as server:
        connection = begin(server, endless(stream=True))
        received = b""
        while b"data: " not in received:
            received += connection.recv(65536)
        assert server.complete(prompt="Tom", max_tokens=9, min_tokens=9).json["usage"]["completion_tokens"] == 9
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            received += connection.recv(1 << 20)
        assert received.count(b"data: ") == 1
        connection.close()


def test_an_error_comes_after_what_was_said() -> None:
    async def read() -> None:
        reply = Reply([Request((2,), 9)], streamed=True)
        deliver(reply, 0, Event(5, "Mia", None))
        reply.fail(ApiError(500, "no", code="x"))
        assert await reply.parts() == [(0, Part("Mia", [5]))]
        with pytest.raises(ApiError, match="no"):
            await reply.parts()

    asyncio.run(read())


def test_draining_finishes_what_runs_and_takes_nothing_new(long_folder: Path) -> None:
    with serving(long_folder, max_rows=2, drain_seconds=30) as server:
        answers: list[Answer] = []
        body = {"prompt": "Mia", "max_tokens": 600, "min_tokens": 600, "stream": True, "return_token_ids": True}
        thread = threading.Thread(target=lambda: answers.append(server.complete(**body)))
        thread.start()
        wait_until(lambda: running(server) == 1)
        server.loop.call_soon_threadsafe(server.server.drain)
        wait_until(lambda: server.server.service.draining)
        refused = server.complete(prompt="Tom")
        assert (refused.status, refused.error["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert server.ask("/health").status == 503
        thread.join(60)
    assert answers[0].events[-1] == "[DONE]"
    assert sum(len(each["choices"][0].get("token_ids", ())) for each in answers[0].events[:-1]) == 600


def test_what_does_not_finish_in_time_gets_an_error_event(long_folder: Path) -> None:
    answers: list[Answer] = []
    with serving(long_folder, max_rows=2, drain_seconds=0.2) as server:
        threads = [
            threading.Thread(target=lambda stream=stream: answers.append(server.complete(**endless(stream=stream))))
            for stream in (True, False)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: running(server) == 2)
    for thread in threads:
        thread.join(60)
    for answer in answers:
        error = answer.error if answer.status == 503 else answer.events[-1]["error"]
        assert error["code"] == "unavailable"
        assert "[DONE]" not in answer.body.decode()


def test_a_failure_of_the_engine_reaches_every_stream(
    long_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step, failing = Engine.step, threading.Event()

    def fails(engine: Engine) -> list[TokenEvent]:
        if failing.is_set():
            raise RuntimeError("a kernel failed")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fails)
    answers: list[Answer] = []

    def serve_until_it_fails() -> None:
        with serving(long_folder, max_rows=2) as server:
            threads = [
                threading.Thread(target=lambda stream=stream: answers.append(server.complete(**endless(stream=stream))))
                for stream in (True, True, False)  # one waits in the queue
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: running(server) + queued(server) == 3)
            failing.set()
            for thread in threads:
                thread.join(60)

    with pytest.raises(RuntimeError, match="a kernel failed"):
        serve_until_it_fails()
    for answer in answers:
        error = answer.error if answer.status == 500 else answer.events[-1]["error"]
        assert error["code"] == "engine_failed"
        assert "kernel" not in error["message"]
    assert len(answers) == 3


def test_a_sequence_that_fails_ends_its_request_alone(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = server.complete(prompt="Tom", seed=1, max_tokens=30).json["choices"]
    append = SequenceState.append

    def fails(sequence: SequenceState, token: int, scores: LogProbabilities | None = None) -> Event | None:
        if sequence.request.prompt == (2, 40) and len(sequence.generated) == 3:
            sequence.fail(ModelError("no"))
            return None
        return append(sequence, token, scores)

    monkeypatch.setattr(SequenceState, "append", fails)
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(server.complete(prompt="Tom", seed=1, max_tokens=30)))
    thread.start()
    streamed = server.complete(prompt=[2, 40], n=2, stream=True, min_tokens=9, max_tokens=9)
    assert streamed.events[-1]["error"]["message"] == "no"
    whole = server.complete(prompt=[2, 40], n=2, min_tokens=9, max_tokens=9)
    assert whole.error["code"]
    thread.join(60)
    assert answers[0].json["choices"] == expected
