"""What the two endpoints answer to good requests, whole and streamed."""

import json
import re
from typing import Any

import pytest
from serving import CONTEXT, Served

from gemmule.serve.settings import LOOPBACK
from gemmule.tokenizer import Tokenizer


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """Fold the chunks of a stream into text, tokens, log-probabilities and end of each choice."""
    choices: dict[int, dict[str, Any]] = {}
    assert events[-1] == "[DONE]"
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            own = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ids": [], "finish": None})
            assert own["finish"] is None, "nothing follows the end"
            own["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            own["ids"] += choice.get("token_ids", [])
            own["logprobs"] += [choice["logprobs"]] if choice["logprobs"] else []
            own["finish"] = choice["finish_reason"]
    return choices


def flat(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the log-probabilities of chunks."""
    return {name: [each for part in parts for each in part[name] or []] for name in parts[0]}


BODIES: list[dict[str, Any]] = [
    {"prompt": "Mia found", "seed": 1},
    {"prompt": "Mia found", "seed": 1, "n": 3, "temperature": 0.5},
    {"prompt": ["Mia", "Tom saw"], "seed": 2, "n": 2, "top_k": 5},
    {"prompt": [2, 40, 41], "seed": 3, "min_p": 0.1, "repetition_penalty": 1.3},
    {"prompt": [[2, 40, 41], [2]], "seed": 3, "presence_penalty": 1.5, "frequency_penalty": -1},
    {"prompt": "Mia", "seed": 4, "logprobs": 3, "echo": True},
    {"prompt": ["Mia", "Tom"], "seed": 4, "logprobs": 0, "echo": True, "n": 2},
    {"prompt": "Mia found", "echo": True, "logprobs": 2, "max_tokens": 0},
    {"prompt": ["Mia found", "Tom"], "echo": True, "max_tokens": 0},
    {"prompt": "Mia", "max_tokens": 0},
    {"prompt": "Mia", "seed": 5, "return_token_ids": True, "logit_bias": {"50": 100}},
    {"prompt": "Mia", "seed": 6, "stop": ["e", "zzz"], "max_tokens": 60},
    {"prompt": "Mia", "seed": 6, "stop_token_ids": list(range(0, 380, 7)), "max_tokens": 60, "logprobs": 1},
    {"prompt": "Mia", "seed": 7, "min_tokens": 20, "max_tokens": 30},
    {"prompt": "Mia", "seed": 8, "regex": "(yes|no), [a-z]{3}", "max_tokens": 30},
    {"prompt": "Mia", "seed": 8, "grammar": 'start: "a"+ "b"', "max_tokens": 9},
    {"prompt": "Mia", "seed": 9, "response_format": {"type": "json_object"}, "max_tokens": 9},
    {"prompt": "Mia", "seed": 9, "response_format": {"type": "text"}},
]


@pytest.mark.parametrize("body", BODIES, ids=[json.dumps(each)[:60] for each in BODIES])
def test_a_streamed_completion_is_the_whole_one(server: Served, body: dict[str, Any]) -> None:
    whole = server.complete(**body)
    assert whole.status == 200, whole.body
    events = server.complete(**body, stream=True, stream_options={"include_usage": True}).events
    choices = joined(events)
    assert len(choices) == len(whole.json["choices"])
    for choice in whole.json["choices"]:
        own = choices[choice["index"]]
        assert own["text"] == choice["text"]
        assert own["finish"] == choice["finish_reason"]
        assert own["ids"] == choice.get("token_ids", [])
        if choice["logprobs"]:
            assert flat(own["logprobs"]) == choice["logprobs"]
    usage = events[-2]
    assert usage["choices"] == []
    assert usage["usage"].keys() == whole.json["usage"].keys()
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole.json["usage"][name]
    assert all(each["usage"] is None for each in events[:-2])


@pytest.mark.parametrize(
    "body",
    [
        {"seed": 1},
        {"seed": 1, "n": 2, "logprobs": True},
        {"seed": 1, "logprobs": True, "top_logprobs": 4, "max_completion_tokens": 7},
        {"seed": 1, "return_token_ids": True, "stop": "a"},
    ],
)
def test_a_streamed_chat_is_the_whole_one(server: Served, body: dict[str, Any]) -> None:
    body = {"max_tokens": 7} | body
    whole = server.chat(**body)
    assert whole.status == 200, whole.body
    choices = joined(server.chat(**body, stream=True).events)
    for choice in whole.json["choices"]:
        own = choices[choice["index"]]
        assert own["text"] == choice["message"]["content"]
        assert own["finish"] == choice["finish_reason"]
        assert own["ids"] == choice.get("token_ids", [])
        if choice["logprobs"]:
            assert [each for part in own["logprobs"] for each in part["content"]] == choice["logprobs"]["content"]


def test_a_chat_streams_the_role_first_and_the_end_alone(server: Served) -> None:
    first, *middle, last, _ = server.chat(stream=True, max_tokens=8, min_tokens=8).events
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert len(middle) == 8, "one event a token"
    assert all(each["choices"][0]["finish_reason"] is None for each in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert len({each["id"] for each in (first, *middle, last)}) == 1


def test_streams_have_data_and_comments_alone(server: Served) -> None:
    answer = server.complete(prompt="Mia", stream=True, max_tokens=4)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.body.decode().split("\n")
    assert all(not line or line.startswith(("data: ", ":")) for line in lines)
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_a_seed_that_was_drawn_is_told_and_repeats_the_reply(server: Served) -> None:
    first = server.complete(prompt="Mia", max_tokens=20).json
    again = server.complete(prompt="Mia", max_tokens=20, seed=first["seed"]).json
    assert again["choices"] == first["choices"]
    assert first["seed"] < 2**53, "exact in JavaScript"
    assert server.complete(prompt="Mia", max_tokens=20).json["choices"] != first["choices"]
    streamed = server.complete(prompt="Mia", max_tokens=20, stream=True).events
    assert (
        joined(streamed)[0]["text"]
        == (server.complete(prompt="Mia", max_tokens=20, seed=streamed[0]["seed"]).json["choices"][0]["text"])
    )


def test_each_prompt_of_a_list_gets_the_reply_that_it_gets_alone(server: Served) -> None:
    prompts = ["Mia", "Tom saw", "The owl"]
    together = server.complete(prompt=prompts, seed=3, n=2).json["choices"]
    alone = [server.complete(prompt=each, seed=3, n=2).json["choices"] for each in prompts]
    assert [each["text"] for each in together] == [each["text"] for own in alone for each in own]
    assert [each["index"] for each in together] == list(range(6))


def test_log_probabilities_of_the_prompt_begin_with_null(server: Served, tiny_tokenizer: Tokenizer) -> None:
    text = "Mia found the key"
    choice = server.complete(prompt=text, echo=True, logprobs=2, max_tokens=0).json["choices"][0]
    assert choice["text"] == text
    found, ids = choice["logprobs"], tiny_tokenizer.encode(text)
    assert len(found["tokens"]) == len(ids)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(isinstance(each, float) for each in found["token_logprobs"][1:])
    for token, likeliest, score in zip(found["tokens"], found["top_logprobs"], found["token_logprobs"], strict=True):
        if likeliest is not None:
            assert likeliest[token] == score
            assert len(likeliest) in (2, 3)
    for token, place in zip(found["tokens"][1:], found["text_offset"][1:], strict=True):
        assert text[place:].startswith(token)


def test_log_probabilities_of_a_prompt_are_those_of_the_reply_that_said_it(server: Served) -> None:
    said = server.complete(prompt=[2, 40], max_tokens=9, min_tokens=9, logprobs=1, return_token_ids=True, seed=1).json
    ids = said["choices"][0]["token_ids"]
    read = server.complete(prompt=[2, 40, *ids], max_tokens=0, echo=True, logprobs=1).json
    assert read["choices"][0]["logprobs"]["token_logprobs"][2:] == said["choices"][0]["logprobs"]["token_logprobs"]


def test_tokens_join_to_the_text_and_have_their_bytes(server: Served) -> None:
    choice = server.chat(logprobs=True, top_logprobs=2, max_tokens=30, seed=1).json["choices"][0]
    content = choice["logprobs"]["content"]
    text = b"".join(bytes(each["bytes"]) for each in content).decode("utf-8", "replace")
    assert text == choice["message"]["content"]
    for each in content:
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] <= 0


def test_a_stop_string_ends_the_reply_before_it(server: Served) -> None:
    text = server.complete(prompt="Mia", seed=6, max_tokens=60).json["choices"][0]["text"]
    stop = text[20:23]
    choice = server.complete(prompt="Mia", seed=6, max_tokens=60, stop=stop).json["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_constraint_is_kept(server: Served) -> None:
    pattern = "(yes|no), [a-z]{3}"
    choice = server.complete(prompt="Mia", regex=pattern, max_tokens=40).json["choices"][0]
    assert re.fullmatch(pattern, choice["text"])
    schema = {
        "type": "object",
        "properties": {"age": {"enum": [5, 6]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = server.chat(response_format=format_, max_tokens=100).json["choices"][0]["message"]["content"]
    assert json.loads(content) in ({"age": 5}, {"age": 6})


def test_neighbors_of_a_role_and_parts_of_a_text_are_joined(server: Served) -> None:
    def tokens(*messages: dict[str, Any]) -> list[int]:
        answer = server.ask("/tokenize", {"messages": messages})
        assert answer.status == 200, answer.body
        return answer.json["tokens"]

    one = tokens({"role": "system", "content": "Be kind.\n\nBe brief."}, {"role": "user", "content": "Who?\n\nWhy?"})
    assert one == tokens(
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
    )


def test_a_chat_that_goes_on_is_read_from_the_cache(server: Served) -> None:
    messages = [{"role": "user", "content": "The owl saw the key and Mia found two eggs by the red kite."}]
    first = server.chat(messages=messages, max_tokens=20, min_tokens=20, seed=1).json
    said = first["choices"][0]["message"]["content"]
    longer = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "Why?"}]
    usage = server.chat(messages=longer, max_tokens=1, seed=1).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_tokens_and_back(server: Served, tiny_tokenizer: Tokenizer) -> None:
    answer = server.ask("/tokenize", {"model": "tiny", "prompt": "Mia found", "return_token_strs": True}).json
    ids = tiny_tokenizer.encode("Mia found")
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == CONTEXT
    assert "".join(answer["token_strs"]) == "<bos>Mia found"
    bare = server.ask("/tokenize", {"prompt": "Mia found", "add_special_tokens": False}).json["tokens"]
    assert bare == ids[1:]
    assert server.ask("/detokenize", {"tokens": bare}).json == {"prompt": "Mia found"}
    assert server.ask("/detokenize", {"tokens": ids}).json == {"prompt": "<bos>Mia found"}
    assert server.ask("/tokenize", {}).error["param"] == "prompt"
    assert server.ask("/detokenize", {"tokens": [380]}).error["param"] == "tokens"


def test_timings_tell_what_took_how_long(server: Served) -> None:
    timings = server.complete(prompt="Mia", max_tokens=9, min_tokens=9, timings=True).json["timings"]
    assert timings["predicted_n"] == 9
    assert timings["predicted_ms"] > 0
    last = server.complete(prompt="Mia", max_tokens=9, timings=True, stream=True).events[-2]
    assert last["choices"] == []
    assert last["timings"].keys() == timings.keys()


def test_models_are_described(server: Served) -> None:
    (model,) = server.ask("/v1/models").json["data"]
    assert model["id"] == "tiny"
    assert model["context"] == CONTEXT
    assert model["chats"] is True
    assert model["format"] == "fp32"
    assert server.ask("/v1/models/tiny").json == model
    assert server.complete(prompt="Mia").json["system_fingerprint"] == model["fingerprint"]


def test_health_and_metrics(server: Served) -> None:
    assert server.ask("/health").json == {"status": "ok"}
    server.complete(prompt="Mia", max_tokens=3, min_tokens=3)
    text = server.ask("/metrics").body.decode()
    assert re.search(r'gemmule_requests_total\{endpoint="/v1/completions",outcome="done"\} [1-9]', text)
    assert re.search(r'gemmule_sequences_running\{model="tiny"\} 0\.0', text)
    assert re.search(r"gemmule_generated_tokens_total [1-9]", text)
    assert re.search(r"gemmule_first_token_seconds_count [1-9]", text)


def test_the_access_log_has_no_prompts(server: Served) -> None:
    answer = server.complete(prompt="Mia-secret", max_tokens=2, min_tokens=2)
    line = server.logged(answer.headers["x-request-id"])
    assert line["client"] == LOOPBACK
    assert (line["method"], line["path"], line["status"], line["outcome"]) == ("POST", "/v1/completions", 200, "done")
    assert line["completion_tokens"] == 2
    assert line["model"] == "tiny"
    assert not any("secret" in each for each in server.log)
