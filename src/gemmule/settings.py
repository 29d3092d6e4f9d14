"""Settings library: TOML and overrides to nested frozen models (pydantic), all errors reported at once.

Each `Settings` class is defined beside the code that uses it; this module reads, validates and writes them.
"""

import codecs
import json
import logging
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from gemmule.errors import OutputError, RecipeError
from gemmule.fields import (
    UNSET,
    can_be_unset,
    find_field,
    find_section,
    kind_of,
    section_of,
    takes_text_only,
    toml_value,
)

log = logging.getLogger(__name__)

# The value of a problem that has none.
NOTHING = object()


class Problem(NamedTuple):
    """One error in a recipe: dotted key, value, and a valid alternative."""

    key: str
    value: object
    advice: str

    def __str__(self) -> str:
        if self.value is NOTHING:
            return f"{self.key}: {self.advice}"
        return f"{self.key} = {json.dumps(self.value, default=str, ensure_ascii=False)}: {self.advice}"


class Settings(BaseModel):
    """A frozen group of settings; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Yield each invalid combination of values, with keys relative to this group."""
        yield from ()

    def changed(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, of a group in which every field has one."""
        return {name: value for (name, value), (_, default) in zip(self, type(self)(), strict=True) if value != default}

    def unused(self) -> frozenset[str]:
        """Return the fields without a meaning beside the others, which a written recipe leaves out."""
        return frozenset()

    @classmethod
    def adapt(cls, table: dict[str, Any], changes: dict[str, Any]) -> Iterator[str]:  # noqa: ARG003 - for subclasses
        """Adapt a recipe file to overrides that contradict it, and both to new names; yield one sentence per change."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed; unset fields stay unset."""
        return type(self).model_validate(self.model_dump(exclude_unset=True) | changes)


S = TypeVar("S", bound=Settings)


def read_recipe(
    path: Path,
    schema: type[S],
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> S:
    """Read the TOML file `path`, apply overrides, and return checked settings.

    Overrides are written `a.b=c` and applied after `changes`, a nested mapping; `warn` reports adapted settings. Raises
    one RecipeError that lists every unknown key, wrong type and invalid combination.
    """
    try:
        content = path.read_bytes()
        table = tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path}: is a folder; name a .toml file") from None
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise RecipeError(f"recipe {path}: not UTF-8 text but UTF-16; save it as UTF-8") from None
        raise RecipeError(f"recipe {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise RecipeError(f"recipe {path}: nested too deeply") from None
    except ValueError as error:  # also a number of thousands of digits
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from None
    return check_recipe(table, schema, str(path), overrides, changes, warn)


def check_recipe(
    table: Mapping[str, Any],
    schema: type[S],
    origin: str,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = log.warning,
) -> S:
    """Validate a nested mapping with overrides as settings; RecipeError lists all problems.

    `origin` names the mapping; the rest is as in `read_recipe`.
    """
    found: list[Problem] = []
    table, changed = _plain(table, origin), _plain(changes or {}, origin)
    for override in overrides:
        found += _override(changed, override, schema)
    changed = _plain(changed, origin)
    for sentence in _adapt(table, changed, schema):
        warn(sentence)
    _merge(table, changed)
    found += [*_without_undecodable(table), *_unset(table, schema)]
    while True:
        try:
            settings = schema.model_validate(table)
            break
        except ValidationError as error:
            # Remove each invalid value and validate again, so that combinations of the others are checked too.
            progress = False
            for item in error.errors():
                location = _field_location(schema, item["loc"])
                if all(problem.key != ".".join(location) for problem in found):  # removed values are missing now
                    found += _explain(schema, item, location, table)
                progress |= _fill(table, location, schema) if item["type"] == "missing" else _remove(table, location)
            if not progress:
                raise RecipeError(_report(origin, found)) from None
    # The defaults of removed values are not checked.
    faulty = {problem.key for problem in found}
    found += [problem for problem in _all_problems(settings) if problem.key not in faulty]
    if found:
        raise RecipeError(_report(origin, found))
    return settings


def _plain(table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return a copy of a table with dates as text."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(table, default=str))
    except RecursionError:
        raise RecipeError(f"recipe {origin}: nested too deeply") from None
    except ValueError:
        raise RecipeError(f"recipe {origin}: holds a number of thousands of digits") from None
    return copy


def _adapt(table: dict[str, Any], changes: Mapping[str, Any], schema: type[Settings]) -> Iterator[str]:
    """Let each section adapt to its changes."""
    for name in schema.model_fields:
        section, given, changed = section_of(schema, name), table.get(name, {}), changes.get(name, {})
        if section and issubclass(section, Settings) and isinstance(given, dict) and isinstance(changed, dict):
            yield from section.adapt(given, changed)


def _merge(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge changes into a table; a value where a section belongs is kept for validation."""
    for key, value in changes.items():
        if not isinstance(value, dict):
            table[key] = value
        elif isinstance(section := table.setdefault(key, {}), dict):
            _merge(section, value)


def _without_undecodable(table: dict[str, Any]) -> Iterator[Problem]:
    """Remove strings with bytes that are not UTF-8, from the shell; no recipe can be written with them."""
    for key, value in list(table.items()):
        try:
            f"{key}{None if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)}".encode()
        except UnicodeEncodeError:
            del table[key]
            yield Problem(key, value, "holds bytes that are not UTF-8; rename the file, or name its folder")
        else:
            if isinstance(value, dict):
                yield from (problem._replace(key=f"{key}.{problem.key}") for problem in _without_undecodable(value))


def _unset(table: dict[str, Any], schema: type[BaseModel]) -> Iterator[Problem]:
    """Remove settings that are set to none."""
    for key, value in list(table.items()):
        section, field = section_of(schema, key), schema.model_fields.get(key)
        if section and isinstance(value, dict):
            yield from (problem._replace(key=f"{key}.{problem.key}") for problem in _unset(value, section))
        elif field and isinstance(value, str) and can_be_unset(field) and value.lower() in (UNSET, "null"):
            del table[key]
            if value.lower() != UNSET:
                yield Problem(key, value, f"write {UNSET} to unset it")


def write_recipe(
    settings: Settings, path: Path, note: str, *, given_only: bool = False, comments: Mapping[str, str] | None = None
) -> None:
    """Write settings as TOML that `read_recipe` turns back into equal settings; `note` becomes the first comment.

    `given_only` omits unset fields, so that they can still be resolved. `comments` stand above the settings of their
    dotted keys.
    """
    lines = [f"# {note}"]
    left_out: dict[str, Any] = {name: set(value.unused()) for name, value in settings if isinstance(value, Settings)}
    left_out |= dict.fromkeys(settings.unused(), True)
    table = settings.model_dump(exclude_none=True, exclude_unset=given_only, exclude=left_out)
    _write_table(table, (), lines, comments or {})
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def read_comments(path: Path) -> dict[str, str]:
    """Return the comments that `write_recipe` wrote, by dotted key; none for a file that cannot be read."""
    comments: dict[str, str] = {}
    section, above = "", ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in lines:
        key = line.partition(" = ")[0]
        if line.startswith("["):
            section = f"{line.strip('[]')}."
        elif above and key.isidentifier():
            comments[section + key] = above
        above = line.removeprefix("# ") if line.startswith("# ") else ""
    return comments


def _write_table(
    table: Mapping[str, Any], prefix: tuple[str, ...], lines: list[str], comments: Mapping[str, str]
) -> None:
    groups = {key: value for key, value in table.items() if isinstance(value, dict)}
    values = {key: value for key, value in table.items() if key not in groups}
    if prefix and values:
        lines += ["", f"[{'.'.join(prefix)}]"]
    for key, value in values.items():
        comment = comments.get(".".join((*prefix, key)))
        lines += [*([f"# {comment}"] if comment else []), f"{key} = {toml_value(value)}"]
    for key, value in groups.items():
        _write_table(value, (*prefix, key), lines, comments)


def _override(changes: dict[str, Any], override: str, schema: type[BaseModel]) -> Iterator[Problem]:
    """Add an override `a.b=c` to nested changes; yield syntax errors."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        advice = "write it as section.key=value, for instance --set train.steps=100"
        yield Problem(f"--set {override}", NOTHING, advice)
        return
    for depth, key in enumerate(keys[:-1], start=1):
        value = find_field(schema, keys[:depth]) and not find_section(schema, keys[:depth])
        changes = changes.setdefault(key, {})
        if value or not isinstance(changes, dict):
            yield Problem(f"--set {override}", NOTHING, f"{key} is a value, not a section")
            return
    changes[keys[-1]] = _read_value(text, find_field(schema, keys))


def _read_value(text: str, field: FieldInfo | None) -> Any:
    """Parse a value as TOML; invalid TOML, or another type where a string is required, is an unquoted string."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text.strip() or text
    return text.strip() if field and takes_text_only(field) and not isinstance(value, str | list | dict) else value


def _field_location(schema: type[Settings], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Truncate pydantic's location, which continues into unions and list items, to the key of the setting."""
    keys: list[str] = []
    current: type[BaseModel] | None = schema
    for part in location:
        if current is None:
            break
        keys.append(str(part))
        current = section_of(current, str(part))
    return tuple(keys)


def _explain(schema: type[Settings], item: Any, location: tuple[str, ...], table: Any) -> Iterator[Problem]:
    """Convert a pydantic error to problems."""
    key, field = ".".join(location), find_field(schema, location)
    section = find_section(schema, location)
    if item["type"] == "missing":
        missing = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
        for name in [f"{key}.{name}" for name in missing] or [key]:
            yield Problem(name, NOTHING, "is required and not set")
        return
    value = table
    for part in location:
        value = value[part]
    if item["type"] == "value_error":
        advice = str(item["msg"]).removeprefix("Value error, ")
    elif field is None:
        from gemmule.synonyms import suggest  # imported for errors only

        advice = suggest(schema, location, isinstance(value, dict))
    elif section:
        advice = f"is a section, not a value: write its settings below [{key}]"
    else:
        advice = f"must be {kind_of(field)}{_how_to_write(value, field)}"
    yield Problem(key, value, advice)


def _how_to_write(value: object, field: FieldInfo) -> str:
    if isinstance(value, float) and value.is_integer() and "whole" in kind_of(field):
        return f"; write {int(value)}"
    if isinstance(value, int | float) and takes_text_only(field):
        return f'; write "{toml_value(value)}"'
    return ""


def _fill(table: Any, location: tuple[str, ...], schema: type[BaseModel]) -> bool:
    """Fill a missing required setting with an example, so that the others can be validated."""
    *sections, name = location
    for key in sections:
        section = section_of(schema, key)
        if section is None:
            return False
        table, schema = table.setdefault(key, {}), section
    field = schema.model_fields.get(name)
    example = {} if section_of(schema, name) else next(iter((field and field.examples) or ()), None)
    if example is None or name in table:
        return False
    table[name] = example
    return True


def _remove(table: Any, location: tuple[str, ...]) -> bool:
    for key in location[:-1]:
        table = table.get(key, {})
        if not isinstance(table, dict):
            return False
    return table.pop(location[-1], _remove) is not _remove


def _all_problems(settings: Settings, prefix: str = "") -> list[Problem]:
    found = [problem._replace(key=prefix + problem.key) for problem in settings.problems()]
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            found += _all_problems(value, f"{prefix}{name}.")
    return found


def _report(origin: str, found: list[Problem]) -> str:
    head = f"recipe {origin}: {len(found)} problems" if len(found) > 1 else f"recipe {origin}"
    report = head + "".join(f"\n  {problem}" for problem in dict.fromkeys(map(str, found)))
    return report.encode("utf-8", "backslashreplace").decode()  # file names need not be UTF-8
