"""Two servers behind nginx, with the configuration of examples/serve/nginx.conf."""

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from serving import events_of, save_model, server_process

from gemmule.tokenizer import Tokenizer
from runs import wait_until

CONFIGURATION = Path(__file__).parents[2] / "examples" / "serve" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
NAME = "stories.example.org"
COMPLETIONS = "/v1/completions"
STALLED_TOKENS = 77
# A server whose replies of so many tokens stop after three.
STALLING = f"""
import time
from gemmule.inference.engine import Engine
step, seen = Engine.step, 0
def stalls(engine):
    global seen
    if seen >= 3:
        time.sleep(60)
    events = step(engine)
    seen += sum(event.sequence.request.max_new_tokens == {STALLED_TOKENS} for event in events)
    return events
Engine.step = stalls
from gemmule.__main__ import main
main()
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


class Proxied(NamedTuple):
    """nginx and the servers behind it."""

    port: int
    servers: dict[int, "subprocess.Popen[str]"]  # by port

    def answered(self) -> dict[int, int]:
        """Return how many requests each server has answered."""
        return {port: int(sum(figures(port, "gemmule_requests_total"))) for port in self.servers}

    def answering(self) -> int:
        """Return the server that runs a sequence, when one does."""
        running: list[int] = []

        def found() -> bool:
            running[:] = [port for port in self.servers if figures(port, "gemmule_sequences_running") == [1]]
            return bool(running)

        wait_until(found)
        return running[0]


def begin(port: int, path: str, body: dict[str, Any] | None = None, **headers: str) -> HTTPResponse:
    """Send a request on a connection of its own, which the response closes."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    given = {"Content-Type": "application/json", "Connection": "close"} | headers
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), given)
    return connection.getresponse()


def ask(port: int, path: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
    """Return the status and the JSON of an answer."""
    with begin(port, path, body, **headers) as response:
        return response.status, json.loads(response.read())


def complete(port: int, prompt: str, tokens: int = 8) -> Any:
    """Return the choices of a reply of so many tokens."""
    status, body = ask(port, COMPLETIONS, {"prompt": prompt, "max_tokens": tokens, "seed": 1})
    assert status == 200
    return body["choices"]


def stream(port: int, prompt: str, tokens: int) -> HTTPResponse:
    """Begin the stream of a reply of so many tokens."""
    body = {"prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "seed": 1, "stream": True}
    return begin(port, COMPLETIONS, body)


def refuses(port: int) -> bool:
    """Whether a server is being shut down."""
    return ask(port, COMPLETIONS, {"prompt": "Mia"})[0] == 503


def figures(port: int, name: str) -> list[float]:
    """Return the values of a metric of generation."""
    with begin(port, "/metrics") as response:
        lines = response.read().decode().splitlines()
    wanted = (f'{name}{{endpoint="/v1/', f"{name}{{model=")
    return [float(line.split()[-1]) for line in lines if line.startswith(wanted)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("proxied") / "tiny", tiny_tokenizer, context=8192)


@contextmanager
def nginx(folder: Path, servers: tuple[int, ...]) -> Iterator[int]:
    """Run nginx with the configuration of the example, other ports in the place of its own; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        own = free.getsockname()[1]
    text = CONFIGURATION.read_text(encoding="utf-8")
    ports = {"listen 8080;": f"listen 127.0.0.1:{own};"}
    ports |= {f"127.0.0.1:{8001 + index} ": f"127.0.0.1:{port} " for index, port in enumerate(servers)}
    for old, new in ports.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "gemmule.conf").write_text(text, encoding="utf-8")
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;\nevents {{}}\n"
    main += f"http {{ access_log off; {temporary} include {folder}/gemmule.conf; }}\n"
    (folder / "nginx.conf").write_text(main, encoding="utf-8")
    assert NGINX is not None
    running = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")])

    def listens() -> bool:
        assert running.poll() is None, "nginx ended; its standard error has the reason"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", own)) == 0

    try:
        wait_until(listens)
        yield own
    finally:
        running.terminate()
        running.wait(20)


@pytest.fixture
def proxied(model: Path, tmp_path: Path) -> Iterator[Proxied]:
    options = ("--chat", "--allow-host", NAME, "--no-access-log")
    with (
        server_process(model, *options) as (first, first_port, _),
        server_process(model, *options) as (second, second_port, _),
        nginx(tmp_path, (first_port, second_port)) as port,
    ):
        yield Proxied(port, {first_port: first, second_port: second})


def choices(response: HTTPResponse) -> list[Any]:
    """Return the events of a stream without what differs between two streams of the same reply."""
    with response:
        return [event if event == "[DONE]" else event["choices"] for event in events_of(response.read())]


def test_streams_are_the_servers_event_by_event(proxied: Proxied) -> None:
    first, second = (choices(stream(port, "Mia saw", 60)) for port in proxied.servers)
    through = choices(stream(proxied.port, "Mia saw", 60))
    assert through == first == second
    assert through[-1] == "[DONE]"
    assert len(through) > 30


def test_an_event_is_passed_on_as_soon_as_it_comes(model: Path, tmp_path: Path) -> None:
    # A proxy that collects events would send nothing before the reply goes on.
    with (
        server_process(model, "--no-access-log", program=STALLING) as (_, port, _),
        nginx(tmp_path, (port, port)) as proxy,
        stream(proxy, "Mia", STALLED_TOKENS) as response,
    ):
        assert response.read1(1 << 16).count(b"\n\n") <= 4


def test_a_server_that_is_shut_down_finishes_its_streams_and_the_other_takes_over(proxied: Proxied) -> None:
    expected = complete(proxied.port, "Mia")
    with stream(proxied.port, "Mia", 6000) as long:
        first = long.read(200)
        ending = proxied.answering()
        (other,) = proxied.servers.keys() - {ending}
        before = proxied.answered()[other]
        proxied.servers[ending].send_signal(signal.SIGTERM)
        wait_until(partial(refuses, ending))
        # The same beginning, so it goes to the server that refuses it.
        assert complete(proxied.port, "Mia") == expected
        assert proxied.servers[ending].poll() is None, "it ended before the request came"
        events = events_of(first + long.read())
    assert events[-1] == "[DONE]"
    assert proxied.servers[ending].wait(20) == 0
    assert complete(proxied.port, "Mia") == expected, "nobody listens there now"
    assert int(sum(figures(other, "gemmule_requests_total"))) == before + 2


def test_the_turns_of_a_chat_go_to_one_server_and_different_texts_to_both(proxied: Proxied) -> None:
    messages = [{"role": "system", "content": "You are a fox."}, {"role": "user", "content": "Who are you?"}]
    cached = []
    for _ in range(4):
        _, body = ask(proxied.port, "/v1/chat/completions", {"messages": messages, "max_tokens": 20, "min_tokens": 20})
        cached.append(body["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages += [body["choices"][0]["message"], {"role": "user", "content": "Go on, please."}]
    assert sorted(proxied.answered().values()) == [0, 4]
    assert cached[0] == 0
    assert min(cached[1:]) > 0
    before = proxied.answered()
    for number in range(20):
        complete(proxied.port, f"{number} foxes", 1)
    between = proxied.answered()
    for number in range(20):
        messages[1]["content"] = f"Are you {number}?"
        ask(proxied.port, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    after = proxied.answered()
    assert all(after[port] - between[port] >= 3 <= between[port] - before[port] for port in proxied.servers)


def test_names_and_origins_are_checked_behind_nginx_too(proxied: Proxied) -> None:
    own = f"{NAME}:{proxied.port}"
    assert ask(proxied.port, "/v1/models", Host=own, Origin=f"http://{own}")[0] == 200
    foreign = "elsewhere.example.org"
    for host, origin in ((own, f"http://{foreign}"), (foreign, f"http://{foreign}")):
        status, body = ask(proxied.port, "/v1/models", Host=host, Origin=origin)
        assert status == 403
        assert body["error"]["code"].startswith("foreign_")


def test_where_all_refuse_the_client_gets_their_answer(proxied: Proxied) -> None:
    with ExitStack() as streams:
        for port, running in proxied.servers.items():
            streams.enter_context(stream(port, "Mia", 6000)).read(100)
            running.send_signal(signal.SIGTERM)
            wait_until(partial(refuses, port))
        for number in range(4):
            with begin(proxied.port, COMPLETIONS, {"prompt": f"{number} foxes"}) as response:
                assert response.status == 503
                assert response.headers["retry-after"]
                assert json.loads(response.read())["error"]["code"] == "unavailable"
