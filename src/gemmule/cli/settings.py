"""`gemmule settings [KEY]`: list the settings of a recipe."""

from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gemmule.fields import Setting

_PAGE = """\
# Settings

<!-- Made by `make docs` from the code; a test compares the two. -->

Every setting that a recipe can have, by section. In TOML it stands below its section, on the
command line after `--set`:

    [train]
    context = 512

    gemmule train recipes/story.toml --set train.context=512

`gemmule settings` prints the same, and `gemmule settings train` one section. Settings whose type
ends with "or none" can be unset: `--set train.minutes=none`, also in TOML as `minutes = "none"`; a
file of that name is `./none`. A run folder's `recipe.toml` has every setting that was in force.
[Preparing text](data.md) says more about `data`.
"""


def settings(
    key: Annotated[str, typer.Argument(help="A section or a prefix of a key, such as train or model.num.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md instead.")] = False,
) -> None:
    """List the settings of a recipe: values, default, meaning.

    Examples:

        gemmule settings train

        gemmule settings optimizer.learning_rate
    """
    from gemmule.errors import RecipeError
    from gemmule.fields import section_of, settings_of
    from gemmule.synonyms import suggest
    from gemmule.train.recipe import Recipe

    found = [setting for setting in settings_of(Recipe) if setting.key.startswith(key)]
    if not found:
        raise RecipeError(f"{key}: {suggest(Recipe, key.split('.'))}")
    about = {name: cleandoc(section_of(Recipe, name).__doc__ or "") for name in Recipe.model_fields}
    for line in _page(found, about) if markdown else _lines(found):
        typer.echo(line)


def _lines(found: Iterable["Setting"]) -> Iterator[str]:
    for setting in found:
        yield f"{setting.key}   {setting.kind}; default: {setting.default}".replace("; default: required", "; required")
        yield f"    {setting.meaning}"


def _page(found: Iterable["Setting"], about: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of docs/settings.md; `about` says what each section is."""
    yield _PAGE.rstrip()
    for section, members in groupby(found, lambda setting: setting.key.rpartition(".")[0]):
        paragraphs = "\n\n".join(fill(text, 100, break_on_hyphens=False) for text in about[section].split("\n\n"))
        yield f"\n## {section}\n\n{paragraphs}\n\n| setting | values | default | meaning |\n|---|---|---|---|"
        for setting in members:
            default = setting.default if setting.default in ("required", "none") else f"`{setting.default}`"
            cells = (f"`{setting.key}`", setting.kind, default, setting.meaning)
            yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
