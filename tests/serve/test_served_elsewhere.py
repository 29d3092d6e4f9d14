"""Exports in the servers of others: the folder in `transformers serve`, the GGUF file in llama.cpp's server."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from serving import events_of, save_model, serving

from gemmule.tokenizer import Tokenizer
from runs import gemmule

pytestmark = pytest.mark.slow

PROMPT, TOKENS = "Mia found a red", 24


def skip_without(*modules: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed")


def export(model: Path, *options: object) -> None:
    ended = gemmule("export", model, *options)
    assert ended.code == 0, ended.err


@contextmanager
def server_of(*command: str) -> Iterator[int]:
    """Run a server on a free port until the block ends; yield its port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = subprocess.Popen(
        [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
    )
    try:
        end = time.monotonic() + 240  # both load slowly where other tests run, too
        while not _listens(port):
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.2)
        yield port
    finally:
        running.kill()
        running.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def complete(port: int, body: dict[str, Any]) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    assert response.status == 200, answer
    return answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model whose greedy reply to the prompt is plain ASCII: programs differ in halves of characters."""
    return save_model(tmp_path_factory.mktemp("plain") / "plain", tiny_tokenizer, seed=6)


@pytest.fixture(scope="module")
def expected(model: Path) -> Any:
    with serving(model) as served:
        return served.complete(prompt=PROMPT, max_tokens=TOKENS, temperature=0).json


def compare(found: Any, streamed: list[Any], expected: Any) -> None:
    text = expected["choices"][0]["text"]
    assert len(text) > 20
    assert found["choices"][0]["text"] == text
    assert found["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    parts = [event["choices"][0]["text"] for event in streamed if event != "[DONE]" and event["choices"]]
    assert "".join(parts) == text
    assert len(parts) > 5


def test_transformers_serves_the_folder_with_our_tokens(model: Path, expected: Any, tmp_path: Path) -> None:
    skip_without("transformers", "openai", "accelerate")
    folder = tmp_path / "plain-hf"
    export(model, "--to", "hf", "--dtype", "f32", "--out", folder)
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    with server_of("transformers.cli.transformers", "serve", str(folder), "--device", "cpu") as port:
        found = json.loads(complete(port, body))
        compare(found, events_of(complete(port, body | {"stream": True})), expected)


def test_the_server_of_llama_cpp_serves_the_file_with_our_tokens(model: Path, expected: Any, tmp_path: Path) -> None:
    skip_without("llama_cpp", "pydantic_settings", "sse_starlette", "starlette_context")
    file = tmp_path / "plain.gguf"
    export(model, "--to", "gguf", "--dtype", "f32", "--out", file)
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "repeat_penalty": 1}
    with server_of("llama_cpp.server", "--model", str(file), "--n_ctx", "256") as port:
        found = json.loads(complete(port, body))
        streamed = complete(port, body | {"stream": True}).replace(b"\r", b"")
        compare(found, events_of(streamed), expected)
