"""Describe the fields of settings: values, default, meaning.

Works on any pydantic model whose sections are models. Error messages and the table of all settings share the
descriptions.
"""

import json
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

# Keeps products of a few sizes within 64 bits.
LARGEST_COUNT = 10**9
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountFrom0 = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Not blank, and without a null character, which is invalid in file names.
Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
# The largest seed of torch's and NumPy's generators.
LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
# The largest seed of a request to the inference engine, which draws by a hash of its own.
LARGEST_REQUEST_SEED = 2**64 - 1

# The value that unsets an optional setting.
UNSET = "none"


class Noun(NamedTuple):
    """Metadata of a type: a description of its values."""

    words: str


class Setting(NamedTuple):
    """One row of the table of settings."""

    key: str  # dotted
    kind: str  # description of its values
    default: str  # as TOML; "none" where it is unset, "required" where there is none
    meaning: str


def settings_of(schema: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a schema and its sections, in declaration order."""
    for name, field in schema.model_fields.items():
        section = section_of(schema, name)
        if section is not None:
            yield from settings_of(section, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, kind_of(field), _default_of(field), field.description or "")


def section_of(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Return the schema of a section; None for a value or an unknown name."""
    field = schema.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def find_section(schema: type[BaseModel], location: Sequence[str]) -> type[BaseModel] | None:
    """Return the schema of the section at a key, or None; the empty key is the schema itself."""
    current: type[BaseModel] | None = schema
    for name in location:
        current = current and section_of(current, name)
    return current


def find_field(schema: type[BaseModel], location: Sequence[str]) -> FieldInfo | None:
    """Return the field at a dotted key, or None."""
    owner = find_section(schema, location[:-1])
    return owner.model_fields.get(location[-1]) if owner else None


def can_be_unset(field: FieldInfo) -> bool:
    """Whether a field may be None."""
    return NoneType in get_args(field.annotation)


def takes_text_only(field: FieldInfo) -> bool:
    """Whether a field takes only strings or lists of them, so that 2024 means the string "2024"."""
    return _leaves(field.annotation) == {str}


def _leaves(annotation: Any) -> set[type]:
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    inner = [arm for arm in get_args(annotation) if arm not in (NoneType, Ellipsis)]
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    return {leaf for arm in inner for leaf in _leaves(arm)} if inner else {annotation}


def kind_of(field: FieldInfo) -> str:
    """Describe the values of a field, such as "a number above 0, or none"."""
    return _kind(field.annotation, field.metadata)


_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe a type with its constraints."""
    if nouns := [item.words for item in metadata if isinstance(item, Noun)]:
        return nouns[-1]
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        beside = [single for item in inner[1:] for single in getattr(item, "metadata", [item])]
        return _kind(inner[0], beside)
    if origin in (Union, UnionType):
        return f"{_kind(next(arm for arm in inner if arm is not NoneType))}, or {UNSET}"
    if origin is Literal:
        *names, last = map(json.dumps, inner)
        return f"{', '.join(names)} or {last}" if names else last
    if origin in (tuple, list):
        item = _kind(inner[0])
        return "a list of " + next(item.replace(one, _MANY[kind]) for kind, one in _ONE.items() if item.startswith(one))
    return _ONE[annotation] + _range(annotation, metadata)


def _range(annotation: type, metadata: Sequence[Any]) -> str:
    bounds = {
        name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
    }
    if annotation is int and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if {"ge", "le"} <= bounds.keys():
        return f" from {bounds['ge']:,} to {bounds['le']:,}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join([" " + " and ".join(f"{words[name]} {bound:,}" for name, bound in bounds.items())] if bounds else [])


def _default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    return UNSET if default is None else toml_value(default)


def toml_value(value: object) -> str:
    """Format a value as TOML, which differs from JSON in inf, nan and the character DEL."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
