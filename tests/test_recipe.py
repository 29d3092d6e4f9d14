import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from gemmule.errors import OutputError, RecipeError
from gemmule.settings import Problem, Settings, check_recipe, read_recipe, write_recipe


class Oven(Settings):
    degrees: int = 180
    fan: bool = False
    mode: Literal["Grill", "bake"] = "bake"


class Dough(Settings):
    flour: Annotated[float, Field(gt=0)]
    water: float = 300.0
    spices: list[str] = Field(default_factory=list)
    name: str = "bread"
    note: str | None = None

    def problems(self) -> Iterator[Problem]:
        if self.water > self.flour:
            yield Problem("water", self.water, f"must be at most flour ({self.flour:g})")


class Baking(Settings):
    minutes: int = 40
    dough: Dough
    oven: Oven = Oven()

    def problems(self) -> Iterator[Problem]:
        if self.minutes > 60 and self.oven.degrees > 200:
            yield Problem("minutes", self.minutes, "too long at this heat")


GOOD: dict[str, Any] = {"dough": {"flour": 500.0}}


def complaint(table: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(table, Baking, "bread.toml")
    return str(caught.value)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "bread.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_recipe_becomes_nested_settings_with_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[dough]\nflour = 500\nspices = ["salt"]\n[oven]\nfan = true\n')
    settings = read_recipe(path, Baking)
    assert settings == Baking(dough=Dough(flour=500.0, spices=["salt"]), oven=Oven(fan=True))
    assert settings.oven.degrees == 180


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Oven().degrees = 200  # type: ignore[misc]


def test_replace_changes_a_copy_and_checks_it() -> None:
    oven = Oven()
    assert oven.replace(degrees=200).degrees == 200
    assert oven.degrees == 180
    with pytest.raises(ValidationError):
        oven.replace(degrees="hot")
    with pytest.raises(ValidationError):
        oven.replace(degres=200)


def test_replace_leaves_open_what_was_not_set() -> None:
    oven = Oven()
    assert oven.replace().model_fields_set == set()
    assert oven.replace(degrees=200).model_fields_set == {"degrees"}


def test_unknown_key_names_the_nearest() -> None:
    assert complaint(GOOD | {"oven": {"degres": 200}}) == (
        "recipe bread.toml\n  oven.degres = 200: no such setting; did you mean oven.degrees?"
    )


def test_key_in_the_wrong_section_names_the_right_one() -> None:
    assert "minutes" in Baking.model_fields
    assert complaint(GOOD | {"oven": {"water": 1.0}}).endswith("no such setting; did you mean dough.water?")
    assert complaint(GOOD | {"fan": True}).endswith("fan = true: no such setting; did you mean oven.fan?")


def test_unknown_section_names_something_that_exists() -> None:
    message = complaint(GOOD | {"ovn": {"degrees": 200}})
    assert message.endswith('ovn = {"degrees": 200}: no such section; did you mean oven?')


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"oven": {"degrees": "hot"}}, 'oven.degrees = "hot": must be a whole number'),
        ({"oven": {"degrees": 180.5}}, "oven.degrees = 180.5: must be a whole number"),
        ({"oven": {"degrees": True}}, "oven.degrees = true: must be a whole number"),
        ({"oven": {"degrees": "200"}}, 'oven.degrees = "200": must be a whole number'),
        ({"oven": {"fan": 1}}, "oven.fan = 1: must be true or false"),
        ({"oven": {"mode": "fry"}}, 'oven.mode = "fry": must be "Grill" or "bake"'),
        ({"oven": 7}, "oven = 7: is a section, not a value: write its settings below [oven]"),
        ({"dough": {"flour": -1.0}}, "dough.flour = -1.0: must be a number above 0"),
        ({"dough": {"flour": 500, "spices": ["salt", 3]}}, 'dough.spices = ["salt", 3]: must be a list of texts'),
        ({"dough": {"flour": 500, "note": 3}}, 'dough.note = 3: must be text, or none; write "3"'),
    ],
)
def test_wrong_value_is_shown_with_its_key_and_what_would_work(table: dict[str, Any], line: str) -> None:
    message = complaint(GOOD | table)
    assert message.splitlines()[0].startswith("recipe bread.toml")
    assert f"  {line}" in message.splitlines()


def test_missing_setting_is_named() -> None:
    assert complaint({"dough": {}}) == "recipe bread.toml\n  dough.flour: is required and not set"
    assert complaint({}) == "recipe bread.toml\n  dough.flour: is required and not set"


def test_whole_numbers_are_numbers() -> None:
    assert check_recipe({"dough": {"flour": 500}}, Baking, "x").dough.flour == 500.0


def test_all_problems_are_reported_together() -> None:
    table = {
        "minutes": 90,
        "dough": {"flour": 100.0, "water": 200.0, "spice": []},
        "oven": {"degrees": 250, "fan": "yes"},
    }
    message = complaint(table)
    assert message.splitlines()[0] == "recipe bread.toml: 4 problems"
    assert set(message.splitlines()[1:]) == {
        "  dough.spice = []: no such setting; did you mean dough.spices?",
        "  dough.water = 200.0: must be at most flour (100)",
        '  oven.fan = "yes": must be true or false',
        "  minutes = 90: too long at this heat",
    }


def test_default_in_place_of_a_faulty_value_is_not_blamed() -> None:
    assert complaint({"dough": {"flour": 100.0, "water": "much"}}) == (
        'recipe bread.toml\n  dough.water = "much": must be a number'
    )


def test_impossible_combination_carries_its_full_key() -> None:
    assert complaint({"dough": {"flour": 100.0}}) == (
        "recipe bread.toml\n  dough.water = 300.0: must be at most flour (100)"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("minutes=50", {"minutes": 50}),
        ("oven.degrees=200", {"oven": {"degrees": 200}}),
        ("oven.fan=true", {"oven": {"fan": True}}),
        ("oven.mode=Grill", {"oven": {"mode": "Grill"}}),
        ("dough.flour=5e2", {"dough": {"flour": 500.0}}),
        ('dough.spices=["salt", "caraway"]', {"dough": {"flour": 400.0, "spices": ["salt", "caraway"]}}),
        ("dough.name=rye bread", {"dough": {"flour": 400.0, "name": "rye bread"}}),
        ('dough.name="500"', {"dough": {"flour": 400.0, "name": "500"}}),
        ("dough.name=hf:roneneldan/TinyStories", {"dough": {"flour": 400.0, "name": "hf:roneneldan/TinyStories"}}),
        ("dough.flour=inf", {"dough": {"flour": float("inf")}}),
        ("dough.name=a=b", {"dough": {"flour": 400.0, "name": "a=b"}}),
        ("dough.name=../data/train.txt", {"dough": {"flour": 400.0, "name": "../data/train.txt"}}),
    ],
)
def test_override_is_typed_like_the_recipe(tmp_path: Path, override: str, expected: dict[str, Any]) -> None:
    path = write(tmp_path, "[dough]\nflour = 400\n")
    settings = read_recipe(path, Baking, [override])
    assert settings == Baking.model_validate({"dough": {"flour": 400.0}} | expected)


def test_later_override_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "minutes = 1\n[dough]\nflour = 400\n")
    assert read_recipe(path, Baking, ["minutes=2", "minutes=3"]).minutes == 3


def test_wrong_override_is_reported_like_a_wrong_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "[dough]\nflour = 400\n")
    with pytest.raises(RecipeError, match=r"oven\.degres = 1: no such setting; did you mean oven\.degrees\?"):
        read_recipe(path, Baking, ["oven.degres=1"])
    with pytest.raises(RecipeError, match=r'oven\.degrees = "hot": must be a whole number'):
        read_recipe(path, Baking, ["oven.degrees=hot"])


@pytest.mark.parametrize("override", ["minutes", "=5", "oven.=5", ".degrees=5", ""])
def test_malformed_override_shows_how_to_write_one(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "[dough]\nflour = 400\n")
    with pytest.raises(RecipeError, match=re.escape(f"--set {override}: write it as section.key=value")):
        read_recipe(path, Baking, [override])


def test_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "minutes = 4\n[dough]\nflour = 400\n")
    with pytest.raises(RecipeError, match=r"--set minutes\.x=1: minutes is a value, not a section"):
        read_recipe(path, Baking, ["minutes.x=1"])


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml: no such file"):
        read_recipe(tmp_path / "nowhere.toml", Baking)


def test_recipe_below_a_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    with pytest.raises(RecipeError, match=r"bread\.toml/x\.toml: cannot be read: Not a directory"):
        read_recipe(path / "x.toml", Baking)


def test_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder; name a \.toml file"):
        read_recipe(tmp_path, Baking)


def test_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b'[dough]\nname = "caf\xe9"\n')
    with pytest.raises(RecipeError, match=r"bread\.toml: not UTF-8 text \(.* at byte 19\)"):
        read_recipe(path, Baking)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_recipe_in_utf16_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    mark = {"utf-16": "", "utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}[encoding]
    path = write(tmp_path, (mark + "[dough]\nflour = 1\n").encode(encoding))
    with pytest.raises(RecipeError, match=r"bread\.toml: not UTF-8 text but UTF-16; save it as UTF-8"):
        read_recipe(path, Baking)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_ends_of_lines_change_nothing(tmp_path: Path, mark: bytes, end: bytes) -> None:
    lines = ["minutes = 3", "[dough]", "name = 'Brötchen'", "flour = 500", ""]
    path = write(tmp_path, mark + end.join(line.encode() for line in lines))
    assert read_recipe(path, Baking) == Baking(minutes=3, dough=Dough(flour=500.0, name="Brötchen"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "[" * 900 + "]" * 900, "nested too deeply|no such setting"),
        (".".join("a" * 3000) + " = 1", "nested too deeply"),
        ("minutes = " + "9" * 5000, "not valid TOML"),
        ("minutes = 0x" + "f" * 5000, "holds a number of thousands of digits"),
        (
            "minutes = 1979-05-27T07:32:00Z\n[dough]\nflour = 1",
            'minutes = "1979-05-27 07:32:00.00:00": must be a whole',
        ),
        ('"caf\\u00e9" = 1\n[dough]\nflour = 1', "café = 1: no such setting"),
    ],
)
def test_strange_toml_is_answered_with_a_sentence(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe(write(tmp_path, content), Baking)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE])
def test_recipe_that_cannot_be_read_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(RecipeError, match=rf"bread\.toml: cannot be read: {re.escape(os.strerror(number))}"):
        read_recipe(tmp_path / "bread.toml", Baking)


def test_recipe_behind_a_loop_of_links_or_a_long_name_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    for path in (loop, tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match="cannot be read: "):
            read_recipe(path, Baking)


@pytest.mark.parametrize("override", ["dough.name=caf\udce9", 'dough.name="caf\udce9"', "dough.spices=['caf\udce9']"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "[dough]\nflour = 400\n")
    with pytest.raises(RecipeError, match="bytes that are not UTF-8; rename the file") as caught:
        read_recipe(path, Baking, [override])
    assert r"caf\udce9" in str(caught.value)


def test_names_of_recipes_and_settings_that_are_not_utf8_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "caf\udce9.toml", Baking)
    with pytest.raises(RecipeError, match=r"caf\\udce9 = 1: holds bytes that are not UTF-8"):
        read_recipe(write(tmp_path, "[dough]\nflour = 1\nwater = 1"), Baking, ["caf\udce9=1"])


def test_recipe_that_is_not_toml_shows_where(tmp_path: Path) -> None:
    path = write(tmp_path, "[dough]\nflour = \n")
    with pytest.raises(RecipeError, match=r"bread\.toml: not valid TOML: .*line 2"):
        read_recipe(path, Baking)


text = st.text(st.characters(exclude_categories=["Cs"]))
doughs = st.builds(
    Dough,
    flour=st.floats(min_value=0, exclude_min=True),
    water=st.floats(max_value=0.0, allow_nan=False),
    spices=st.lists(text),
    name=text,
    note=st.none() | text.filter(lambda value: value.lower() not in ("none", "null")),  # these unset it
)
ovens = st.builds(
    Oven, degrees=st.integers(-(2**62), 2**62), fan=st.booleans(), mode=st.sampled_from(["Grill", "bake"])
)


@given(st.builds(Baking, minutes=st.integers(0, 60), dough=doughs, oven=ovens))
def test_saved_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, settings: Baking) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    write_recipe(settings, path, "resolved")
    assert read_recipe(path, Baking) == settings


def test_saved_recipe_begins_with_its_note(tmp_path: Path) -> None:
    path = tmp_path / "saved.toml"
    write_recipe(Baking(dough=Dough(flour=500.0)), path, "The recipe of this run.")
    assert path.read_text().startswith("# The recipe of this run.\n")


def test_given_only_leaves_defaults_open(tmp_path: Path) -> None:
    path = tmp_path / "saved.toml"
    settings = Baking(dough=Dough(flour=500.0), oven=Oven(fan=True))
    write_recipe(settings, path, "given", given_only=True)
    assert path.read_text() == "# given\n\n[dough]\nflour = 500.0\n\n[oven]\nfan = true\n"
    assert read_recipe(path, Baking) == settings


def test_recipe_that_cannot_be_written_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nowhere/saved\.toml: cannot be written: No such file"):
        write_recipe(Baking(dough=Dough(flour=1.0)), tmp_path / "nowhere" / "saved.toml", "x")
