"""Requests that others made up: schemathesis from /openapi.json, and mutated bodies and heads."""

import gc
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, save_model, serving
from test_guarding import answer_of, raw

from gemmule.processes import resident_memory
from gemmule.tokenizer import Tokenizer

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Iterator[Served]:
    """A server whose context and cache have room for what generators make up."""
    folder = save_model(tmp_path_factory.mktemp("roomy") / "roomy", tiny_tokenizer, context=4096)
    with serving(folder, chat=True, max_rows=8, cache_bytes=256 << 20) as served:
        yield served


def schemathesis(server: Served, mode: str, examples: int) -> "subprocess.CompletedProcess[str]":
    """Run all checks of schemathesis' command."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.server.address}/openapi.json"]
    options = ["--mode", mode, "--max-examples", str(examples), "--checks", "all", "--no-color", "--seed", "1"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)}
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_description_is_kept_by_all_checks(roomy: Served) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    done = schemathesis(roomy, "all", 40)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_most_bodies_that_the_description_allows_are_answered(roomy: Served) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    roomy.log.clear()
    done = schemathesis(roomy, "positive", 60)
    assert done.returncode == 0, done.stdout[-5000:]
    for path in ("/v1/completions", "/v1/chat/completions"):
        statuses = [line["status"] for line in map(json.loads, roomy.log) if line["path"] == path]
        assert len(statuses) > 20
        assert statuses.count(200) >= len(statuses) / 2


BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": ["Mia", "Tom"],
    "max_tokens": 3,
    "temperature": 0.5,
    "n": 1,
    "stop": ["a", "\u00e9"],
    "logit_bias": {"5": 1.5},
    "stream": False,
    "echo": True,
    "logprobs": 2,
    "seed": 7,
    "response_format": {"type": "text"},
}
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    2**70,
    1e308,
    "",
    "\0",
    "x" * 300,
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    0.5,
    "5",
]


def mutated_value(draw: random.Random) -> bytes:
    """Change one value or name of a good body."""
    body = dict(BODY)
    name = draw.choice([*body])
    if draw.random() < 0.2:
        body[draw.choice(["x", "", name.upper(), name[:-1]])] = body.pop(name)
    else:
        body[name] = draw.choice(STRANGE)
    return json.dumps(body).encode()


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Remove, repeat or change some bytes."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content))
        until = place + draw.randint(1, 5)
        insert = draw.choice([b"", content[place:until] * 2, bytes(draw.randrange(256) for _ in range(3))])
        content = content[:place] + insert + content[until:]
    return content


def test_mutated_bodies_get_the_right_answer_and_cost_nothing(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(1)
    good = json.dumps(BODY).encode()
    before = None
    statuses = []
    for number in range(1000):
        body = mutated_value(draw) if draw.random() < 0.6 else mutated_bytes(draw, good)
        answer = server.ask("/v1/completions", raw=body)
        statuses.append(answer.status)
        assert answer.status in (200, 400, 404), (answer.body, body)
        if answer.status != 200:
            assert answer.error["message"], body
        if number == 500:
            gc.collect()
            before = resident_memory()
    assert 50 < statuses.count(200) < 900
    after = resident_memory()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    if before is not None and after is not None:
        assert after - before < 8 << 20


def test_mutated_heads_get_an_answer_or_are_closed(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(2)
    body = b'{"prompt": "Mia", "max_tokens": 1}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: */*\r\n"
        b"Connection: close\r\nX-Request-Id: one\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    for _ in range(300):
        received = raw(server, mutated_bytes(draw, head) + body + b"\r\n\r\n", seconds=0.3)
        if received:
            answer = answer_of(received)
            assert answer.status in (200, 400, 403, 404, 405, 408, 413, 415), received
            if answer.status >= 400 and b"HEAD" not in received:
                assert answer.body == b"" or answer.error
    assert server.ask("/health").status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
