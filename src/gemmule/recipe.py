"""Recipes: TOML in, nested frozen settings out, every mistake reported at once.

Each `Settings` class stands beside the code that uses it; this module knows how to read, check
and write them, not what they mean.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gemmule.errors import OutputError, RecipeError


class Problem(NamedTuple):
    """One thing wrong with a recipe: the dotted key, its value, and what would work."""

    key: str
    value: object
    advice: str

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.value, default=str, ensure_ascii=False)}: {self.advice}"


class Settings(BaseModel):
    """A frozen group of settings; unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Yield each combination of values that cannot work, with keys relative to this group."""
        yield from ()

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like the original; what nobody set stays not set."""
        return type(self).model_validate(self.model_dump(exclude_unset=True) | changes)


S = TypeVar("S", bound=Settings)


def read_recipe(path: Path, schema: type[S], overrides: Sequence[str] = ()) -> S:
    """Read the TOML file `path`, apply `a.b=c` overrides, and return checked settings.

    Raises RecipeError that lists every unknown key, wrong type and impossible combination together.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path}: is a folder; name a .toml file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    return check_recipe(table, schema, str(path))


def check_recipe(table: Mapping[str, Any], schema: type[S], origin: str) -> S:
    """Turn a nested mapping into settings, or raise RecipeError with every problem found; `origin` names it."""
    table = json.loads(json.dumps(table, default=str))
    found: list[Problem] = []
    while True:
        try:
            settings = schema.model_validate(table)
            break
        except ValidationError as error:
            # Take each faulty value out and look again, so that combinations of the others are checked too.
            progress = False
            for item in error.errors():
                location = _field_location(schema, item["loc"])
                if all(problem.key != ".".join(location) for problem in found):  # what was taken out is missing now
                    found.append(_explain(schema, item, location))
                progress |= _remove(table, location)
            if not progress:
                raise RecipeError(_report(origin, found)) from None
    # Where a faulty value was taken out its default stands, of which there is nothing to say.
    faulty = {problem.key for problem in found}
    found += [problem for problem in _all_problems(settings) if problem.key not in faulty]
    if found:
        raise RecipeError(_report(origin, found))
    return settings


def write_recipe(settings: Settings, path: Path, note: str, *, given_only: bool = False) -> None:
    """Write settings as TOML that `read_recipe` turns back into equal settings; `note` becomes the first comment.

    `given_only` leaves out what was not set, so that it can still be settled later.
    """
    lines = [f"# {note}"]
    _write_table(settings.model_dump(exclude_none=True, exclude_unset=given_only), (), lines)
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _write_table(table: Mapping[str, Any], prefix: tuple[str, ...], lines: list[str]) -> None:
    groups = {key: value for key, value in table.items() if isinstance(value, dict)}
    values = {key: value for key, value in table.items() if key not in groups}
    if prefix and values:
        lines += ["", f"[{'.'.join(prefix)}]"]
    lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    for key, value in groups.items():
        _write_table(value, (*prefix, key), lines)


def _toml(value: object) -> str:
    """Write a value as JSON does, except where TOML differs: inf and nan, and the character DEL."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Put a value written `a.b=c` into a nested table; RecipeError where it is not written so."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: write it as section.key=value, for instance --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # an unquoted string, as a shell user writes it
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {key} is a value, not a section")
    table[keys[-1]] = value


def _field_location(schema: type[Settings], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Cut pydantic's location (which goes on into unions and list items) down to the setting's own dotted key."""
    keys: list[str] = []
    current: type[Settings] | None = schema
    for part in location:
        if current is None:
            break
        keys.append(str(part))
        current = _group(current, str(part))
    return tuple(keys)


def _group(schema: type[Settings], name: str) -> type[Settings] | None:
    field = schema.model_fields.get(name)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _explain(schema: type[Settings], item: Any, location: tuple[str, ...]) -> Problem:
    key, value = ".".join(location), item["input"]
    if item["type"] == "missing":
        return Problem(key, None, "is required and not set")
    if item["type"] == "model_type":
        return Problem(key, value, f"is a section, not a value: write its settings below [{key}]")
    if item["type"] != "extra_forbidden":
        advice = str(item["msg"]).removeprefix("Value error, ").replace("Input", "value", 1)
        return Problem(key, value, advice[:1].lower() + advice[1:])
    owner: type[Settings] = schema
    for part in location[:-1]:
        owner = _group(owner, part) or owner
    beside = difflib.get_close_matches(location[-1], owner.model_fields, n=1)
    if beside:
        advice = f"no such setting; did you mean {'.'.join((*location[:-1], beside[0]))}?"
    else:
        dotted = list(_dotted_names(schema))
        elsewhere = [name for name in dotted if name.rpartition(".")[2] == location[-1]]
        nearest = elsewhere or difflib.get_close_matches(key, dotted, n=1, cutoff=0.0)
        advice = f"no such setting; the nearest is {nearest[0]}"
    return Problem(key, value, advice)


def _dotted_names(schema: type[Settings], prefix: str = "") -> Iterator[str]:
    for name in schema.model_fields:
        group = _group(schema, name)
        if group:
            yield from _dotted_names(group, f"{prefix}{name}.")
        else:
            yield prefix + name


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
    return head + "".join(f"\n  {problem}" for problem in dict.fromkeys(map(str, found)))
