"""From the bytes of a body to its fields, or to an error that names the first one that is wrong."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from gemmule.fields import kind_of
from gemmule.serve.failures import ApiError, invalid
from gemmule.serve.protocol import Body, JsonSchema, Message, ResponseFormat, StreamOptions

_SHOWN = 60  # characters of a value in a message
# Fields that are objects with fields of their own.
_SECTIONS = ("messages", "stream_options", "response_format")
_SECTION_SCHEMAS: dict[str, type[Body]] = {
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "json_schema": JsonSchema,
}
B = TypeVar("B", bound=Body)


def read_body(content: bytes, schema: type[B]) -> B:
    """Read a JSON object; ApiError names the first field that is wrong, and lists all mistakes."""
    try:
        given = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(given, dict):
        raise invalid(None, "the body is not a JSON object; send one", "invalid_json")
    given = _without_nulls(given, schema)
    schema.refuse(given)
    try:
        body = schema.model_validate(given)
    except ValidationError as error:
        raise _explain(schema, given, error.errors(include_url=False, include_context=False)) from None
    for problem in body.problems():
        raise problem
    return body


def _without_nulls(given: Mapping[str, Any], schema: type[Body]) -> dict[str, Any]:
    """Leave out known fields that are null, also those of settings that are objects and of messages."""
    known = schema.model_fields.keys() | schema.unsupported.keys() | {"schema"}
    found = {name: value for name, value in given.items() if value is not None or name not in known}
    for name, section in _SECTION_SCHEMAS.items():
        if isinstance(found.get(name), dict):
            found[name] = _without_nulls(found[name], section)
    if isinstance(found.get("messages"), list):
        messages = found["messages"]
        found["messages"] = [_without_nulls(each, Message) if isinstance(each, dict) else each for each in messages]
    return found


def _explain(schema: type[Body], given: Mapping[str, Any], errors: Sequence[ErrorDetails]) -> ApiError:
    """Return one error for all fields that are wrong; those that have alternatives are named once."""
    sentences: dict[str, tuple[str, str]] = {}
    for error in errors:
        param = _param(error["loc"], given)
        if param not in sentences:
            sentences[param] = _sentence(schema, given, param, error)
    first = next(iter(sentences))
    message = "; ".join(sentence for sentence, _ in [*sentences.values()][:5])
    return invalid(first, message, sentences[first][1])


def _param(location: Sequence[int | str], given: Any) -> str:
    """Return where an error is, without the names of alternatives that pydantic adds."""
    path = str(location[0])
    given = given.get(path)
    if path not in _SECTIONS:
        return path
    for part in location[1:]:
        if isinstance(given, list) and isinstance(part, int) and path == "messages":
            path, given = f"{path}[{part}]", given[part]
        elif isinstance(given, dict) and _schema_at(Body, path) is not None:
            path, given = f"{path}.{part}", given.get(part)
        else:
            break
    return path


def _sentence(schema: type[Body], given: Mapping[str, Any], param: str, error: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong with a field, and a code."""
    kind = error["type"]
    owner, _, name = param.rpartition(".")
    section = _schema_at(schema, owner)
    known = [*section.model_fields] if section else []
    if kind == "extra_forbidden":
        nearest = get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(known)}"
        return f"{param}: no such field{hint}", "unknown_parameter"
    if kind == "missing":
        return f"{param}: missing; give {_advice(schema, owner, name)}", "missing_parameter"
    wrong_type = kind.endswith("_type") or kind == "int_from_float"
    code = "invalid_type" if wrong_type else "invalid_value"
    return f"{param} = {_shown(_at(given, param))}: must be {_advice(schema, owner, name) or error['msg']}", code


def _schema_at(schema: type[Body], owner: str) -> type[Body] | None:
    """Return the schema of an object within the body."""
    if not owner:
        return schema
    if owner.startswith("messages["):
        return Message
    return _SECTION_SCHEMAS.get(owner.rpartition(".")[2])


def _advice(schema: type[Body], owner: str, name: str) -> str:
    """Return the values that a field takes, in words."""
    section = _schema_at(schema, owner)
    field = section.model_fields.get(name) if section else None
    if field is None:
        return "a message with role and content" if name.startswith("messages[") else ""
    try:
        return kind_of(field).removesuffix(", or none")
    except (KeyError, StopIteration):  # an object
        return "an object"


def _at(given: Any, param: str) -> Any:
    for part in param.replace("[", ".[").split("."):
        if part.startswith("[") and isinstance(given, list):
            given = given[int(part[1:-1])]
        elif isinstance(given, dict):
            given = given.get(part)
    return given


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
