"""Who may ask, how much and how long."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Answer, Served, serving, settings_for

from gemmule.errors import UserError
from gemmule.serve.guard import Guard
from gemmule.serve.settings import ServerSettings, name_models, read_api_keys

KEY = "sk-gemmule-1234"


@pytest.fixture(scope="module")
def locked(model_folder: Path) -> Iterator[Served]:
    """A server with a key, small limits, and another name."""
    limits = {"head_bytes": 8192, "body_bytes": 10_000, "request_seconds": 0.6, "connections": 20}
    with serving(
        model_folder,
        limits=limits,
        api_keys=(KEY.encode(), b"another-key"),
        allowed_hosts=frozenset({"stories.example.org"}),
        allowed_origins=frozenset({"https://pages.example.org"}),
    ) as served:
        yield served


def raw(server: Served, *parts: bytes, pause: float = 0.0, seconds: float = 5.0) -> bytes:
    """Send bytes, and return all that comes until the server closes or so many seconds have passed."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while content := connection.recv(65536):
                received += content
        except (TimeoutError, ConnectionError):
            pass
    return received


def answer_of(content: bytes) -> Answer:
    head, _, body = content.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(status.split()[1]), headers, body)


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_without_the_key_nothing_is_answered(locked: Served, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for path, body in (("/v1/completions", {"prompt": "Mia"}), ("/v1/models", None), ("/metrics", None), ("/x", None)):
        answer = locked.ask(path, body, headers=headers)
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert answer.headers["x-should-retry"] == "false"


def test_a_key_that_is_no_text_is_wrong(locked: Served) -> None:
    head = (
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\xc3\r\nConnection: close\r\n\r\n"
    )
    assert answer_of(raw(locked, head)).status == 401


def test_either_key_opens(locked: Served) -> None:
    for key in (KEY, "another-key"):
        assert locked.ask("/v1/models", headers={"Authorization": f"Bearer {key}"}).status == 200
    assert locked.ask("/health").status == 200, "probes have no key"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("stories.example.org", 200),
        ("evil.example.org", 403),
        ("localhost.evil.example.org", 403),
        ("192.168.1.7", 403),
        ("evil@localhost", 403),
        ("", 403),
        ("localhost:80:80", 403),
    ],
)
def test_only_our_own_names_are_answered(locked: Served, host: str, status: int) -> None:
    answer = locked.ask("/health", headers={"Host": host})
    assert answer.status == status
    if status == 403:
        assert answer.error["code"] == "foreign_host"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://pages.example.org"}, 200),
        ({"Origin": "http://localhost:8000", "Host": "localhost:8000"}, 200),
        ({"Origin": "http://localhost:8001", "Host": "localhost:8000"}, 403),
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "file://localhost:8000", "Host": "localhost:8000"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(locked: Served, headers: dict[str, str], status: int) -> None:
    answer = locked.ask("/health", headers=headers)
    assert answer.status == status
    assert not any(name.startswith("access-control-") for name in answer.headers)


def test_a_server_on_every_address_is_reached_by_any_address_but_no_foreign_name() -> None:
    async def nothing(*_: object) -> None: ...

    guard = Guard(nothing, settings_for("x", host="0.0.0.0"), None)
    assert guard._is_ours("192.168.1.7")
    assert guard._is_ours("localhost")
    assert not guard._is_ours("evil.example.org")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413(locked: Served, chunked: bool) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\n"
    if chunked:
        sent = [
            f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(),
            *[b"1000\r\n" + b"x" * 4096 + b"\r\n"] * 5,
            b"0\r\n\r\n",
        ]
    else:
        sent = [f"{head}Content-Length: 20000\r\n\r\n".encode(), b"x" * 20000]
    answer = answer_of(raw(locked, *sent))
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


def test_who_asks_first_sends_nothing_of_a_body_over_the_limit(locked: Served) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 20000\r\nExpect: 100-continue\r\n\r\n"
    assert answer_of(raw(locked, head.encode())).status == 413


def test_a_body_far_over_the_limit_ends_the_connection(locked: Served) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
    began = time.monotonic()
    raw(locked, head.encode(), *[b"x" * 65536] * 1000)
    assert time.monotonic() - began < 4


def test_half_a_body_and_silence_is_closed_in_time(locked: Served) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    answer = answer_of(raw(locked, head.encode()))
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: local"])
def test_half_a_head_and_silence_is_closed_in_time(locked: Served, sent: bytes) -> None:
    began = time.monotonic()
    answer = answer_of(raw(locked, sent))
    assert 0.5 < time.monotonic() - began < 3
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


def test_a_head_that_trickles_is_closed_in_time(locked: Served) -> None:
    began = time.monotonic()
    raw(locked, b"GET /health HTTP/1.1\r\n", *[b"X-A: b\r\n"] * 12, pause=0.1)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "sent", [[b"X-A: " + b"a" * 65536] * 2000, [b"X-A: b\r\n" * 5000] * 100, [b"GET /" + b"a" * 65536] * 2000]
)
def test_endless_heads_are_closed(locked: Served, sent: list[bytes]) -> None:
    began = time.monotonic()
    received = raw(locked, b"" if sent[0].startswith(b"GET") else b"GET /health HTTP/1.1\r\nHost: localhost\r\n", *sent)
    assert time.monotonic() - began < 4
    if received:  # unless the connection was reset while we wrote
        assert answer_of(received).status == 431


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\0\x01\0\x01\xfc", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_gets_an_error(locked: Served, sent: bytes) -> None:
    answer = answer_of(raw(locked, sent))
    assert (answer.status, answer.error["code"]) == (400, "invalid_http")
    assert answer.headers["x-request-id"]


def test_many_connections_are_refused_and_leave_room_again(locked: Served) -> None:
    open_ = [socket.create_connection(("127.0.0.1", locked.port)) for _ in range(20)]
    try:
        time.sleep(0.1)
        assert answer_of(raw(locked, b"")).status == 503
    finally:
        for each in open_:
            each.close()
    time.sleep(0.2)
    assert locked.ask("/health").status == 200


def test_every_answer_has_a_request_id(locked: Served) -> None:
    for path, given, wanted in (("/health", "abc-1", "abc-1"), ("/x", "", None), ("/health", "a b\tc", None)):
        answer = locked.ask(path, headers={"x-request-id": given})
        found = answer.headers["x-request-id"]
        assert found == wanted if wanted else found.startswith("req_")
        assert locked.logged(found)["path"] == path


def test_a_file_of_keys_has_one_a_line() -> None:
    assert read_api_keys(b"first-key\n\n  second-key \r\n", "keys") == (b"first-key", b"second-key")
    for wrong in (b"", b"\n \n", b"short", b"with space inside", "schlüssel-1".encode()):
        with pytest.raises(UserError, match="keys: "):
            read_api_keys(wrong, "keys")


def test_models_are_named_by_their_paths() -> None:
    given = ["runs/story", "runs/other/model", "a/gemma-3.gguf", "x=runs/story", "runs/a/checkpoints/step-00000500"]
    names = [each.id for each in name_models(given)]
    assert names == ["story", "other", "gemma-3", "x", "a-step-00000500"]
    with pytest.raises(UserError, match="NAME=MODEL"):
        name_models(["runs/story", "other/story"])


def test_the_default_is_loopback_without_a_key() -> None:
    settings = ServerSettings(())
    assert settings.host == "127.0.0.1"
    assert not settings.allowed_origins


def test_a_client_that_goes_away_while_it_sends_is_no_failure(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.sendall(head.encode())
        time.sleep(0.1)
    end = time.monotonic() + 120
    while '"outcome": "cancelled"' not in locked.log[-1]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not caplog.records
