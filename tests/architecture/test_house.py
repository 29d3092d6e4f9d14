"""Rules of the house that no linter knows."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from gemmule.cli.main import COMMANDS
from gemmule.errors import RecipeError
from gemmule.inference.runners import Decoding
from gemmule.inference.sampling import RULES, SamplingSettings
from gemmule.model.attention import KERNELS
from gemmule.model.config import SIZES, Gemma3Config
from gemmule.settings import Settings, check_recipe
from gemmule.train.optim import OPTIMIZERS, OptimizerSettings
from gemmule.train.recipe import Recipe
from gemmule.train.schedule import SCHEDULES, ScheduleSettings
from gemmule.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "gemmule").rglob("*.py"))
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "KERNELS": KERNELS,
    "RULES": RULES,
    "SCHEDULES": SCHEDULES,
    "OPTIMIZERS": OPTIMIZERS,
    "COMMANDS": COMMANDS,
}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("name", REGISTRIES)
def test_registry_holds_documented_functions_under_their_own_names(name: str) -> None:
    assert REGISTRIES[name]
    for key, entry in REGISTRIES[name].items():
        assert inspect.isfunction(entry), key
        name = key.replace("-", "_")
        assert entry.__name__ in (name, f"{name}_")  # Python keeps the word import for itself
        assert entry.__doc__, key


def test_every_command_has_its_own_file_and_examples() -> None:
    for name, command in COMMANDS.items():
        assert command.__module__ == f"gemmule.cli.{command.__name__}"
        assert command.__doc__ is not None
        assert f"gemmule {name} " in command.__doc__, "an example"


@pytest.mark.parametrize(
    ("settings", "field", "registry"),
    [
        (OptimizerSettings, "name", OPTIMIZERS),
        (ScheduleSettings, "name", SCHEDULES),
        (TrainSettings, "attention", KERNELS),
        (Gemma3Config, "size", SIZES),
    ],
)
def test_recipes_can_choose_what_is_registered_when_they_are_read(
    settings: type[Settings], field: str, registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"steps": 1} if settings is TrainSettings else {}
    for name in registry:
        assert name in re.split(r"[ ,:()]+", settings.model_fields[field].description or "")
        check_recipe(given | {field: name}, settings, "x")
    with pytest.raises(RecipeError, match=f"there are .*{', '.join(registry)}$"):
        check_recipe(given | {field: "mine"}, settings, "x")
    monkeypatch.setitem(registry, "mine", next(iter(registry.values())))
    check_recipe(given | {field: "mine"}, settings, "x")


def test_choices_are_those_of_the_code() -> None:
    assert set(SamplingSettings.model_fields) == set(RULES)
    assert get_type_hints(COMMANDS["generate"])["decoding"] == Decoding


def subclasses(kind: type[Settings]) -> Iterator[type[Settings]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_group_of_settings_is_frozen_strict_and_typed() -> None:
    for path in SOURCES:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if parts[-1] != "__main__":
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
    groups = [group for group in subclasses(Settings) if group.__module__.startswith("gemmule.")]
    assert {Recipe, Gemma3Config, SamplingSettings} <= set(groups)
    for group in groups:
        assert group.__doc__ or group.__name__.startswith("_"), group
        assert group.model_config["frozen"], group
        assert group.model_config["strict"], group
        assert group.model_config["extra"] == "forbid", group
        for name, field in group.model_fields.items():
            assert field.annotation is not Any, (group, name)
            assert "." not in name


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in functions(path)
        if node.end_lineno is not None
    }
    assert max(lengths.values()) <= 80, max(lengths, key=lengths.__getitem__)
    assert sorted(lengths.values())[len(lengths) // 2] <= 12


def test_no_module_is_longer_than_a_chapter() -> None:
    assert {path.name for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > 450} == set()


def test_nothing_is_left_for_later() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        for mark in ("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented"):
            assert mark not in text, (path, mark)


def test_tests_have_unique_names_and_stand_in_no_package() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names
