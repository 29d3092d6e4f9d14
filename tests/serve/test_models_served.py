"""Several models, models that do not chat, and models that are still being loaded."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, save_model, serving

from gemmule.serve.models import load_model
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE
from sentences import SENTENCES


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Iterator[Served]:
    """A model that continues, one that brings a chat template, and one whose texts begin without bos."""
    folder = tmp_path_factory.mktemp("three")
    document = tiny_tokenizer.description
    template = Tokenizer(json.dumps(document), {"chat_template": CHAT_TEMPLATE})
    bare = Tokenizer(json.dumps(document | {"post_processor": None}), {})
    models = [
        save_model(folder / "plain", tiny_tokenizer),
        save_model(folder / "chatty", template, seed=1),
        save_model(folder / "bare", bare, seed=2),
    ]
    with serving(*models, max_rows=4) as server:
        yield server


def test_each_request_gets_its_model(three: Served) -> None:
    models = {each["id"]: each for each in three.ask("/v1/models").json["data"]}
    assert [*models] == ["plain", "chatty", "bare"]
    body = {"prompt": [2, 40, 41], "max_tokens": 12, "min_tokens": 12, "seed": 1}
    answers = {name: three.complete(model=name, **body).json for name in models}
    assert {name: answer["system_fingerprint"] for name, answer in answers.items()} == {
        name: model["fingerprint"] for name, model in models.items()
    }
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) == 3
    assert all(answer["model"] == name for name, answer in answers.items())


def test_models_run_side_by_side(three: Served) -> None:
    body = {"prompt": [2, 40, 41], "max_tokens": 60, "min_tokens": 60, "seed": 1}
    alone = {name: three.complete(model=name, **body).json["choices"] for name in ("plain", "chatty", "bare")}
    together: dict[str, Any] = {}

    def ask(name: str) -> None:
        together[name] = three.complete(model=name, **body).json["choices"]

    threads = [threading.Thread(target=ask, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


def test_a_model_must_be_named_where_there_are_several(three: Served) -> None:
    answer = three.complete(prompt="Mia")
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "plain, chatty, bare" in answer.error["message"]
    schema = three.ask("/openapi.json").json["components"]["schemas"]["CompletionBody"]
    assert schema["properties"]["model"]["enum"] == ["plain", "chatty", "bare"]
    assert "model" in schema["required"]


def test_a_model_without_a_template_does_not_chat(three: Served) -> None:
    for answer in (
        three.chat(model="plain"),
        three.ask("/tokenize", {"model": "plain", "messages": [{"role": "user", "content": "a"}]}),
    ):
        assert answer.status == 400
        assert answer.error["code"] == "no_chat_template"
        assert "/v1/completions" in answer.error["message"]
        assert "--chat" in answer.error["message"]
    assert three.chat(model="chatty", max_tokens=2).status == 200
    assert three.ask("/v1/models/plain").json["chats"] is False
    assert three.ask("/v1/models/chatty").json["chats"] is True


def test_an_empty_prompt_needs_a_beginning(three: Served) -> None:
    for prompt in ({}, {"prompt": ""}, {"prompt": ["Mia", ""]}):
        answer = three.complete(model="bare", **prompt)
        assert (answer.status, answer.error["param"]) == (400, "prompt")
        assert three.complete(model="plain", max_tokens=1, **prompt).status == 200
    assert three.ask("/tokenize", {"model": "bare", "prompt": ""}).json["tokens"] == []


def test_nothing_is_answered_until_the_models_are_warm(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, servers = threading.Event(), []

    def slow(*arguments: Any) -> Any:
        assert may_load.wait(60)
        return load_model(*arguments)

    def on_start(server: Served) -> None:
        servers.append(server)
        for answer in (server.ask("/health"), server.complete(prompt="Mia"), server.ask("/v1/models")):
            assert (answer.status, answer.error["code"]) == (503, "unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert server.ask("/openapi.json").status == 200
        assert server.ask("/metrics").status == 200
        may_load.set()

    monkeypatch.setattr("gemmule.serve.engine_thread.load_model", slow)
    with serving(model_folder, on_start=on_start) as server:
        assert servers
        assert server.ask("/health").status == 200
        assert server.complete(prompt="Mia").status == 200


def test_what_the_cache_can_never_hold_is_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    folder = save_model(tmp_path / "long", tiny_tokenizer, context=4096)
    with serving(folder, cache_bytes=6 << 20) as server:
        answer = server.complete(prompt="Mia", n=8, max_tokens=4000)
        assert (answer.status, answer.error["code"]) == (400, "cache_too_small")
        assert answer.error["param"] == "n"
        assert server.complete(prompt="Mia", n=8, max_tokens=5).status == 200


@pytest.mark.slow
def test_a_hundred_thousand_characters_are_read_where_they_fit(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    folder = save_model(tmp_path / "long", tiny_tokenizer, context=60_000)
    text = (" ".join(SENTENCES) + "\n") * 200
    with serving(folder, cache_bytes=1 << 30) as server:
        answer = server.complete(prompt=text[:100_000], max_tokens=1)
        assert answer.status == 200
        assert answer.json["usage"]["prompt_tokens"] > 10_000
