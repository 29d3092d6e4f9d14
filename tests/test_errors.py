import inspect

import pytest

from gemmule import errors
from gemmule.errors import GemmuleError, MissingExtra, UserError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_in_the_tree_and_drawn_with_a_sentence(kind: type[Exception]) -> None:
    assert issubclass(kind, GemmuleError)
    assert errors.__doc__ is not None
    assert kind.__doc__ is not None
    drawn = [line for line in errors.__doc__.splitlines() if kind.__name__ in line.split()]
    assert len(drawn) == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_exit_code_tells_whose_mistake_it_is(kind: type[GemmuleError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)


def test_drawing_shows_who_descends_from_whom() -> None:
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        name = next((word for word in line.split() if hasattr(errors, word)), None)
        if name is not None:
            depth = line.index(name) // 4
            assert len(getattr(errors, name).__mro__) - len(GemmuleError.__mro__) + 1 == depth, line


def test_missing_extra_names_purpose_library_and_command() -> None:
    message = str(MissingExtra("matplotlib", "plots", "drawing curves"))
    assert message == (
        "drawing curves needs the library matplotlib, which is not installed: pip install 'gemmule[plots]'"
    )
