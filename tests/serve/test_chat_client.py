"""`gemmule chat --url` on a server of ours, and on others."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving

from gemmule.errors import UserError
from gemmule.inference.conversation import Piece, ReplySettings
from gemmule.serve.client import RemoteModel
from runs import Ended, gemmule
from saved_sheets import read_pieces

SESSION = "/set max_tokens 12\n/set seed 5\nMia found\nthe owl\n/retry\n/set temperature 0\n/edit 1 Tom\n"


def chat(served: Served, *options: object, lines: str = SESSION) -> Ended:
    return gemmule("chat", "--url", served.url, *options, given=lines.encode())


@pytest.mark.parametrize("kind", ["--story", "--turns"])
def test_a_server_replies_as_the_model_here_does(server: Served, model_folder: Path, tmp_path: Path, kind: str) -> None:
    lines = f"{SESSION}/save {tmp_path}/there.json\n"
    there = chat(server, kind, lines=lines)
    here = gemmule("chat", model_folder, kind, given=lines.replace("there.json", "here.json").encode())
    assert (there.code, there.err) == (0, "")
    assert there == here
    one, other = (
        [replace(piece, usage=None) for piece in read_pieces(tmp_path / f"{name}.json")] for name in ("there", "here")
    )
    assert one == other
    replayed = gemmule("generate", model_folder, "--replay", tmp_path / "there.json")
    assert (replayed.code, replayed.err) == (0, "")


def test_a_server_says_whether_its_model_chats(server: Served) -> None:
    assert RemoteModel(server.url).chats
    assert RemoteModel(server.server.address, "tiny").context == 256
    assert RemoteModel(server.server.address).trained_context is None, "no run folder"
    assert chat(server, lines="Hello\n/tokens\n").out.splitlines()[-1].startswith("used ")


def test_words_are_no_special_tokens_for_a_server(server: Served) -> None:
    ids = RemoteModel(server.url).encode("<end_of_turn>")
    assert ids is not None
    assert len(ids) > 1


def test_a_name_that_is_not_served_is_told(server: Served) -> None:
    ended = gemmule("chat", "big", "--url", server.url)
    assert ended == (2, "", f"gemmule: --url {server.url}: it serves no model 'big'; there are tiny\n")


def test_what_the_server_refuses_is_a_sentence(server: Served) -> None:
    ended = chat(server, lines="Hello " * 300 + "\n")
    assert ended.code == 2
    assert "the context of tiny is 256" in ended.err


def test_nobody_there_is_a_sentence() -> None:
    ended = gemmule("chat", "--url", "http://127.0.0.1:9")
    assert ended.code == 2
    told = "--url http://127.0.0.1:9: no server answers: Connection refused; start one with `gemmule serve MODEL`"
    assert ended.err == f"gemmule: {told}\n"
    for url in ("ftp://x", "http://", "http://x:port"):
        assert f"--url {url}: no address of a server" in gemmule("chat", "--url", url).err


def test_the_key_is_asked_for_and_sent(model_folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-long-secret\n")
    with serving(model_folder, api_keys=(b"a-long-secret",)) as served:
        assert "give the key with --api-key-file" in chat(served).err
        assert chat(served, "--api-key-file", key).code == 0


def test_stop_ends_the_reply_at_once_and_frees_the_row(server: Served) -> None:
    model = RemoteModel(server.url, chats=False)
    settings = ReplySettings(max_tokens=200, min_tokens=200)
    pieces = [Piece("user", "Mia", model.encode("Mia"))]
    chunks = []
    for chunk in model.reply(pieces, settings, 1):
        chunks.append(chunk)
        model.stop()
    assert chunks[-1].finish == "stopped"
    assert [each.finish for each in model.reply(pieces, ReplySettings(max_tokens=2, min_tokens=2), 1)][-1] == "length"


def test_options_of_a_model_here_are_refused_beside_a_server(server: Served) -> None:
    told = "gemmule: --url leaves --int8 without effect; give one of them\n"
    assert chat(server, "--int8") == (2, "", told)
    told = "gemmule: --api-key-file x: only a server asks for a key; give --url, too\n"
    assert gemmule("chat", "model", "--api-key-file", "x") == (2, "", told)


@contextmanager
def answering(*events: str, models: Any = None) -> Iterator[tuple[str, list[Any]]]:
    """Serve as another program of OpenAI's API might; yield the address, and the bodies that come."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(json.dumps(models or {"data": [{"id": "other"}]}).encode(), "application/json")

        def do_POST(self) -> None:
            bodies.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self._answer("".join(f"data: {event}\n\n" for event in events).encode(), "text/event-stream")

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None: ...  # noqa: A002

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def test_another_server_gets_only_what_openais_api_has() -> None:
    with answering(said("Hel"), said("lo"), "[DONE]") as (url, bodies):
        ended = gemmule("chat", "--url", f"{url}/v1/", given=b"/set min_p 0\nHi\n")
    assert ended == (0, "Hello\n", "")
    ((path, body),) = bodies
    assert path == "/v1/chat/completions"
    assert body.keys() == {"model", "stream", "stream_options", "temperature", "max_tokens", "seed", "messages"}


def test_a_stream_that_merely_ends_or_fails_is_an_error() -> None:
    with answering(said("Hel")) as (url, _):
        ended = gemmule("chat", "--url", url, given=b"Hi\n")
    assert (ended.code, ended.out) == (2, "Hel\n")
    assert "the reply was cut: the stream ended before its end" in ended.err
    failure = json.dumps({"error": {"message": "the engine failed", "type": "x", "param": None, "code": "x"}})
    with answering(said("Hel"), failure) as (url, _), pytest.raises(UserError, match="the engine failed"):
        [*RemoteModel(url).reply([Piece("user", "Hi")], ReplySettings(), 1)]


def test_what_is_no_api_is_a_sentence() -> None:
    with answering(models=[1]) as (url, _), pytest.raises(UserError, match="no answer of OpenAI's API"):
        RemoteModel(url)
