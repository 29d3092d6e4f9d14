"""The server of `--watch`: what it costs, whom it answers, what it survives."""

import gzip
import http.client
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemmule.errors import OutputError
from gemmule.processes import resident_memory
from gemmule.report import watch
from gemmule.report.watch import LOOPBACK, WatchServer
from run_folders import Page, append_line, metrics_lines, write_lines, write_run


@contextmanager
def served(*folders: Path) -> Iterator[WatchServer]:
    server = WatchServer(folders, LOOPBACK, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server: WatchServer, method: str = "GET", path: str = "/", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, server.server_address[1], timeout=300)
    try:
        connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "_SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr(watch, "_SHARE", 1e9)
    return write_run(tmp_path / "story", 50)


def test_the_page_follows_the_run_and_a_reload_costs_nothing(run: Path) -> None:
    with served(run) as server:
        status, headers, body = ask(server)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "50 logged steps" in Page(body.decode()).text
        for _ in range(20):
            assert ask(server, If_None_Match=headers["ETag"])[::2] == (304, b"")
            assert ask(server)[2] == body
        assert server.page.made == 1
        append_line(run / "metrics.jsonl", {"step": 51, "loss": 1.0})
        status, newer, body = ask(server, If_None_Match=headers["ETag"])
        assert status == 200
        assert newer["ETag"] != headers["ETag"]
        assert "51 logged steps" in Page(body.decode()).text


def test_pages_are_made_at_most_as_often_as_their_share_of_a_core_allows(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_SHORTEST_PAUSE", 60.0)
    with served(run) as server:
        first = ask(server)[2]
        append_line(run / "metrics.jsonl", {"step": 51, "loss": 1.0})
        assert ask(server)[2] == first
        assert server.page.made == 1


def test_it_is_compressed_for_those_who_take_that(run: Path) -> None:
    with served(run) as server:
        _, headers, body = ask(server, Accept_Encoding="gzip, br")
        assert headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(body) == ask(server)[2]


@pytest.mark.parametrize("moment", ["before it begins", "while it is removed and begun again"])
def test_it_survives_a_run_that_restarts(run: Path, moment: str) -> None:
    if moment == "before it begins":
        shutil.rmtree(run)
    with served(run) as server:
        if moment != "before it begins":
            assert "50 logged steps" in Page(ask(server)[2].decode()).text
            shutil.rmtree(run)
        assert "no metrics are logged yet" in Page(ask(server)[2].decode()).text
        write_run(run, 30)
        assert "30 logged steps" in Page(ask(server)[2].decode()).text


def test_a_resumed_run_goes_back_to_its_checkpoint(run: Path) -> None:
    with served(run) as server:
        ask(server)
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        os.truncate(run / "metrics.jsonl", sum(map(len, lines[:20])))
        assert "20 logged steps" in Page(ask(server)[2].decode()).text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("attacker.example", 403),
        ("127.0.0.1.attacker.example:80", 403),
        ("", 403),
    ],
)
def test_other_names_for_this_machine_are_refused(run: Path, host: str, status: int) -> None:
    """A site whose name is pointed at the loopback address cannot read the page (DNS rebinding)."""
    with served(run) as server:
        assert ask(server, Host=host)[0] == status


def test_there_is_the_page_and_nothing_else(run: Path) -> None:
    with served(run) as server:
        for path in ("/metrics.jsonl", "/../story/recipe.toml", "//etc/passwd", "/%2e%2e/", "/favicon.ico"):
            assert ask(server, path=path)[::2] == (404, b"")
        assert ask(server, "POST")[0] == 501
        status, headers, body = ask(server, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 1000


def test_it_listens_on_loopback_and_a_port_in_use_is_named(run: Path) -> None:
    with served(run) as server:
        assert server.address.startswith("http://127.0.0.1:")
        port = server.server_address[1]
        with pytest.raises(OutputError, match=f"--port {port}: Address already in use"):
            WatchServer([run], LOOPBACK, port)


def test_slow_readers_hold_up_nobody(run: Path) -> None:
    with served(run) as server:
        ask(server)
        slow = []
        for _ in range(5):  # ask, and take nothing of the answer
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            reader.connect((LOOPBACK, server.server_address[1]))
            reader.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            slow.append(reader)
        silent = socket.create_connection((LOOPBACK, server.server_address[1]))  # asks nothing
        append_line(run / "metrics.jsonl", {"step": 51, "loss": 1.0})
        began = time.monotonic()
        while "51 logged steps" not in Page(ask(server)[2].decode()).text:  # a slow reader's thread may be making it
            assert time.monotonic() - began < 10
        for reader in (*slow, silent):
            reader.close()


def test_more_readers_than_it_has_room_for_are_told_to_come_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOST_READERS", 0)
    with served(run) as server:
        assert ask(server)[0] == 503


@pytest.mark.slow  # 360,000 lines: ten hours of ten steps per second
def test_ten_hours_of_metrics_and_five_readers_leave_the_memory_flat(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(line) + "\n" for line in metrics_lines(360_000)]
    write_lines(run / "metrics.jsonl", [])
    write_lines(run / "samples.jsonl", [])
    ended, pages = threading.Event(), [0] * 5

    def read(number: int) -> None:
        tag = ""
        while not ended.is_set():
            status, headers, _ = ask(server, If_None_Match=tag, Accept_Encoding="gzip")
            tag, pages[number] = headers["ETag"], pages[number] + (status == 200)
            time.sleep(0.05)

    memory = []
    with served(run) as server:
        readers = [threading.Thread(target=read, args=(number,)) for number in range(5)]
        for reader in readers:
            reader.start()
        try:
            for tenth in range(20):
                part = lines[tenth * len(lines) // 20 : (tenth + 1) * len(lines) // 20]
                with (run / "metrics.jsonl").open("a") as file:
                    file.writelines(part)
                append_line(run / "samples.jsonl", {"step": tenth, "prompt": "p", "text": "x" * 1_000_000})
                made = server.page.made
                end = time.monotonic() + 60
                while server.page.made < made + 2 and time.monotonic() < end:
                    append_line(run / "samples.jsonl", {"step": tenth + 0.5, "prompt": "p", "text": "y"})
                    time.sleep(0.1)
                memory.append(resident_memory() or 0)
        finally:
            ended.set()
            for reader in readers:
                reader.join()
        assert "360,000 logged steps" in Page(ask(server)[2].decode()).text
    assert min(pages) > 5
    assert max(memory[5:]) - memory[4] < 24e6, memory
