"""OpenAI's own client, unchanged."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from serving import Served

openai: Any = pytest.importorskip("openai", reason="openai is not installed")

pytestmark = pytest.mark.slow  # the extra clients is not installed by `make test`


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


COMPLETION: list[dict[str, Any]] = [
    {"prompt": ["Mia", "Tom"], "n": 2, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.5},
    {"prompt": [2, 40, 41], "frequency_penalty": 0.5, "logit_bias": {"50": 5}, "stop": ["a", "b"], "user": "me"},
    {"prompt": [[2, 40], [2]], "logprobs": 2, "echo": True, "best_of": 1},
    {"prompt": "Mia", "extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3}},
    {"prompt": "Mia", "extra_body": {"return_token_ids": True, "timings": True, "stop_token_ids": [60]}},
    {"prompt": "Mia", "extra_body": {"regex": "[ab]{3}"}},
]
CHAT: list[dict[str, Any]] = [
    {"n": 2, "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5, "stop": "a"},
    {"logprobs": True, "top_logprobs": 3, "logit_bias": {"50": 5}, "max_completion_tokens": 5, "user": "me"},
    {"response_format": {"type": "json_object"}, "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
    {"extra_body": {"top_k": 5, "min_p": 0.01, "return_token_ids": True}, "reasoning_effort": "low"},
]


@pytest.mark.parametrize("parameters", COMPLETION)
def test_every_parameter_of_completions(client: Any, parameters: dict[str, Any]) -> None:
    given = {"model": "tiny", "max_tokens": 8, "seed": 3} | parameters
    whole = client.completions.create(**given)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    usage = None
    for chunk in client.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


@pytest.mark.parametrize("parameters", CHAT)
def test_every_parameter_of_chats(client: Any, parameters: dict[str, Any]) -> None:
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    limit = {} if "max_completion_tokens" in parameters else {"max_tokens": 8}
    given = {"model": "tiny", "messages": messages, "seed": 3} | limit | parameters
    whole = client.chat.completions.create(**given)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


def test_errors_have_their_own_classes(server: Served, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="Mia", temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="there are tiny"):
        client.completions.create(model="gpt-5", prompt="Mia")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="Mia")


def test_a_parsed_reply_is_of_its_class(client: Any) -> None:
    class Animal(BaseModel):
        name: Literal["owl", "cat"]
        legs: Literal[2, 4]

    parsed = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "Who?"}], response_format=Animal, max_tokens=80, seed=1
    )
    assert parsed.choices[0].message.parsed.name in ("owl", "cat")
