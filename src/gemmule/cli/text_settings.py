"""Settings for reading the text that a command scores: those of the model's run by default."""

from pathlib import Path
from typing import TYPE_CHECKING

from gemmule.run_folder import RunFolder, run_of

if TYPE_CHECKING:
    from gemmule.data.settings import DataSettings


def text_settings(
    model: Path, data: str | None, separator: str | None, column: str | None
) -> "tuple[DataSettings, RunFolder | None]":
    """Return the data settings of a text, and the run folder that the model belongs to, if any.

    What is not given is taken from the run; without `data` so is all. RecipeError where there is neither.
    """
    from gemmule.data.dataset import run_data_settings
    from gemmule.data.settings import DataSettings
    from gemmule.errors import RecipeError
    from gemmule.settings import check_recipe

    run = run_of(model)
    own = run_data_settings(run) if run else None
    if data is None:
        if own is None:
            raise RecipeError(
                f"--data: name the text to score; {model} is not a run with validation documents of its own"
            )
        return own, run
    base = {} if own is None else own.model_dump(exclude_unset=True)
    given = {name: value for name, value in (("separator", separator), ("column", column)) if value is not None}
    table = base | given | {"train": data, "validation": None, "weights": None}
    return check_recipe(table, DataSettings, "of the options"), run
