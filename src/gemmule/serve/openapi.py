"""The description of the API at /openapi.json."""

from typing import Any

import gemmule
from gemmule.serve.guard import OPEN_PATHS
from gemmule.serve.protocol import (
    MOST_STOP_TOKENS,
    TOKEN_ID_BOUND,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Sampled,
    TokenizeBody,
)
from gemmule.serve.settings import ServerSettings

JSON = "application/json"
_REFERENCE = "#/components/schemas/{model}"

Schema = dict[str, Any]


def describe(settings: ServerSettings, vocab_size: int) -> Schema:
    """Return the OpenAPI document; `model` is one of those that are served, all of which have `vocab_size` tokens."""
    bodies: dict[str, type[Body]] = {
        "/v1/completions": CompletionBody,
        "/v1/chat/completions": ChatBody,
        "/tokenize": TokenizeBody,
        "/detokenize": DetokenizeBody,
    }
    schemas = dict(_ANSWERS)
    paths: dict[str, Any] = {}
    for path, body in bodies.items():
        schema = body_schema(body, settings, vocab_size)
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        content: Schema = {JSON: {"schema": _refer(_ANSWER_OF[path])}}
        if path.startswith("/v1/"):
            content["text/event-stream"] = {}
        paths[path] = {
            "post": {
                "operationId": path.rpartition("/")[2] if path != "/v1/chat/completions" else "chat_completions",
                "requestBody": {"required": True, "content": {JSON: {"schema": _refer(body.__name__)}}},
                "responses": {
                    "200": {"description": "The answer.", "content": content},
                    **_errors(400, 404, 408, 413, 415, 429, 500, 503),
                },
            }
        }
    for path, name in _ANSWER_OF.items():
        if path not in paths:
            paths[path] = {"get": _read(path, name)}
    for path, item in paths.items():
        for operation in item.values():
            operation["responses"] |= _errors(403, *([401] if settings.api_keys and path not in OPEN_PATHS else []))
    components: Schema = {"schemas": schemas}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Gemmule", "version": gemmule.__version__},
        "paths": paths,
        "components": components,
    }
    if settings.api_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return document


def body_schema(body: type[Body], settings: ServerSettings, vocab_size: int) -> Schema:
    """Return the JSON schema of a body, with what of the settings and the vocabulary bounds it."""
    schema = body.model_json_schema(ref_template=_REFERENCE, by_alias=True)
    fields, limits = schema["properties"], settings.limits
    for name in (*body.unsupported, "best_of"):  # accepted where they change nothing
        fields.pop(name, None)
    names = [spec.id for spec in settings.models]
    fields["model"] = {"enum": [*names, None] if len(names) == 1 else names, "title": "Model"}
    if len(names) > 1:
        schema["required"] = [*schema.get("required", []), "model"]
    _bound_ids(schema, vocab_size)
    if "n" in fields:
        fields["n"]["anyOf"][0]["maximum"] = min(limits.samples, settings.max_rows)
        _bound_texts(fields["stop"], limits.stop_strings, limits.stop_length)
        fields["stop_token_ids"]["anyOf"][0]["maxItems"] = MOST_STOP_TOKENS
        fields["regex"]["anyOf"][0]["format"] = "regex"
        biases = fields["logit_bias"]["anyOf"][0]
        biases["patternProperties"] = {numbers_below(vocab_size): biases.pop("patternProperties").popitem()[1]}
        biases["additionalProperties"] = False
    together = [*_TOGETHER.get(body, []), *(_TOGETHER[Sampled] if issubclass(body, Sampled) else [])]
    if together:
        schema["allOf"] = together
    if "ResponseFormat" in schema.get("$defs", {}):
        both: Schema = {"allOf": [_has("type", "json_schema"), _has("json_schema")]}
        neither: Schema = {"allOf": [_has("type", "text", "json_object"), _is("json_schema", None)]}
        schema["$defs"]["ResponseFormat"]["oneOf"] = [both, neither]
    return schema


def _is(name: str, *values: Any) -> Schema:
    """Match objects in which a field is missing or has one of the values."""
    return {"properties": {name: {"enum": [*values]}}}


def _has(name: str, *values: Any) -> Schema:
    """Match objects in which a field has one of the values, or any but null."""
    return {"required": [name], "properties": {name: {"enum": [*values]} if values else {"not": {"type": "null"}}}}


_TEXT_FORMAT: Schema = {
    "properties": {"response_format": {"type": ["object", "null"], "properties": {"type": {"const": "text"}}}}
}
# What fields ask of each other.
_TOGETHER: dict[type[Body], list[Schema]] = {
    Sampled: [
        {"anyOf": [_is("stream_options", None), _has("stream", True)]},
        {
            "anyOf": [
                {"allOf": [_is("regex", None), _is("grammar", None)]},
                {"allOf": [_is("regex", None), _TEXT_FORMAT]},
                {"allOf": [_is("grammar", None), _TEXT_FORMAT]},
            ]
        },
    ],
    ChatBody: [
        {"anyOf": [_is("top_logprobs", None, 0), _has("logprobs", True)]},
        {"anyOf": [_is("max_tokens", None), _is("max_completion_tokens", None)]},
    ],
    TokenizeBody: [
        {"oneOf": [_has("prompt"), _has("messages")]},
    ],
}


def numbers_below(size: int) -> str:
    """Return the pattern of the numbers from 0 to size - 1, without leading zeros."""
    last = str(size - 1)
    shorter = ["0", *([f"[1-9][0-9]{{0,{len(last) - 2}}}"] if len(last) > 1 else [])]
    same = []
    for place, digit in enumerate(last):
        lowest = 1 if place == 0 else 0
        if int(digit) > lowest:
            rest = len(last) - place - 1
            same.append(f"{last[:place]}[{lowest}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^({'|'.join([*shorter, *same, last])})$"


def _bound_ids(schema: Any, vocab_size: int) -> None:
    """Bound all token ids."""
    if isinstance(schema, dict):
        if schema.get("exclusiveMaximum") == TOKEN_ID_BOUND and schema.get("type") == "integer":
            schema["exclusiveMaximum"] = vocab_size
        for each in schema.values():
            _bound_ids(each, vocab_size)
    elif isinstance(schema, list):
        for each in schema:
            _bound_ids(each, vocab_size)


def _bound_texts(field: Schema, most: int, length: int) -> None:
    for each in field["anyOf"]:
        if each.get("type") == "string":
            each["maxLength"] = length
        elif each.get("type") == "array":
            each["maxItems"] = most
            each["items"]["maxLength"] = length
        elif "anyOf" in each:
            _bound_texts(each, most, length)


def _read(path: str, answer: str) -> Schema:
    operation: Schema = {
        "operationId": path.strip("/").partition("/{")[0].replace("/", "_") + ("_one" if "{" in path else ""),
        "responses": {
            "200": {"description": "The answer.", "content": {JSON: {"schema": _refer(answer)}}},
            **_errors(503),
        },
    }
    if path == "/metrics":
        operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if "{model}" in path:
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [parameter]
        operation["responses"] |= _errors(404)
    return operation


def _errors(*statuses: int) -> Schema:
    return {
        str(status): {"description": "An error.", "content": {JSON: {"schema": _refer("Error")}}} for status in statuses
    }


def _refer(name: str) -> Schema:
    return {"$ref": _REFERENCE.format(model=name)}


def _object(required: Schema, **optional: Any) -> Schema:
    return {"type": "object", "properties": required | optional, "required": [*required]}


_TEXT, _COUNT, _FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
_COUNT_OR_NULL: Schema = {"type": ["integer", "null"], "minimum": 0}
_IDS = {"type": "array", "items": _COUNT}
_NUMBERS = {"type": "object", "additionalProperties": {"type": "number"}}
_ANY: Schema = {"type": ["object", "null"]}

_ANSWER_OF = {
    "/v1/completions": "Completion",
    "/v1/chat/completions": "ChatCompletion",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/v1/models": "Models",
    "/v1/models/{model}": "Model",
    "/health": "Health",
    "/metrics": "Metrics",
    "/openapi.json": "OpenApi",
}


def _reply(kind: str, choice: Schema) -> Schema:
    head = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT, "seed": _COUNT}
    usage = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
    choices = {"type": "array", "items": choice, "minItems": 1}
    return _object(head | {"object": {"const": kind}, "choices": choices, "usage": usage}, timings=_ANY)


_FINISH: Schema = {"enum": ["stop", "length"]}
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "context": _COUNT,
        "trained_context": _COUNT_OR_NULL,
        "parameters": _COUNT,
        "format": _TEXT,
        "chats": _FLAG,
        "reproducible": _FLAG,
        "fingerprint": _TEXT,
        "run": _TEXT_OR_NULL,
        "checkpoint": _TEXT,
        "step": _COUNT_OR_NULL,
        "followed": _FLAG,
    }
)
_ANSWERS: dict[str, Schema] = {
    "Completion": _reply(
        "text_completion",
        _object({"index": _COUNT, "text": _TEXT, "logprobs": _ANY, "finish_reason": _FINISH}, token_ids=_IDS),
    ),
    "ChatCompletion": _reply(
        "chat.completion",
        _object(
            {
                "index": _COUNT,
                "message": _object({"role": {"const": "assistant"}, "content": _TEXT}),
                "logprobs": _ANY,
                "finish_reason": _FINISH,
            },
            token_ids=_IDS,
        ),
    ),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _IDS},
        token_strs={"type": ["array", "null"], "items": _TEXT},
    ),
    "Text": _object({"prompt": _TEXT}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _refer("Model")}}),
    "Health": _object({"status": {"const": "ok"}}),
    "Metrics": _TEXT,
    "OpenApi": {"type": "object"},
    "Error": _object(
        {"error": _object({"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT})},
    ),
}
