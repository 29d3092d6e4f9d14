"""OpenAI's own client, unchanged."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Served

openai: Any = pytest.importorskip("openai", reason="openai is not installed")


@pytest.fixture
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as own:
        yield own


def test_models_are_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model


def test_completion_streamed_is_the_whole_one(client: Any) -> None:
    whole = client.completions.create(model="tiny", prompt="Mia found", max_tokens=12, seed=5)
    chunks = [*client.completions.create(model="tiny", prompt="Mia found", max_tokens=12, seed=5, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_chat_streamed_is_the_whole_one(client: Any) -> None:
    messages = [{"role": "user", "content": "Who are you?"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=5)
    chunks = [*client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=5, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_the_asynchronous_client_gets_the_same(server: Served, client: Any) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as own:
            stream = await own.completions.create(model="tiny", prompt="Mia", max_tokens=9, seed=1, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    whole = client.completions.create(model="tiny", prompt="Mia", max_tokens=9, seed=1)
    assert asyncio.run(ask()) == whole.choices[0].text
