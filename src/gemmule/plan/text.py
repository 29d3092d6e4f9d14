"""How much text a recipe trains on, as far as it can be known without reading it."""

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from gemmule.data.dataset import REPORT_FILE, prepared_folder
from gemmule.data.report import CorpusReport
from gemmule.data.sources import SOURCES, find_files
from gemmule.errors import GemmuleError
from gemmule.train.run import Recipe

# English by a vocabulary of some thousands; a story of the storybook by 3,200 ids.
BYTES_A_TOKEN, STORY_TOKENS, STORIES = 4.0, 165.0, {"train": 40_000, "validation": 1_000}


class Text(NamedTuple):
    """The tokens of the two splits, None where they cannot be known yet, and how they are known."""

    tokens: float | None
    validation_tokens: int | None
    how: str


def text_of(recipe: Recipe) -> Text:
    """Find out how many tokens there are: from the report of prepared data, or guessed from sizes of files."""
    folder = prepared_folder(recipe.data)
    if folder is not None:
        try:
            report = CorpusReport.model_validate_json((folder / REPORT_FILE).read_bytes())
        except (OSError, ValidationError):
            return Text(None, None, f"{folder} has no report")
        return Text(report.train.tokens, report.validation.tokens, "counted when the data was prepared")
    sizes = [_tokens(source) for source in recipe.data.train]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return Text(None, None, "not known before it is read; gemmule prepare counts")
    held_out = recipe.data.holdout if recipe.data.validation is None else 0.0
    validation = [_tokens(source, "validation") for source in recipe.data.validation or ()]
    tested = sum(size or 0.0 for size in validation) or held_out * sum(known)
    return Text(
        sum(known) * (1 - held_out),
        int(tested),
        f"assumed: {BYTES_A_TOKEN:g} bytes a token, {STORY_TOKENS:g} tokens a story",
    )


def _tokens(source: str, split: str = "train") -> float | None:
    kind, _, rest = source.partition(":")
    if kind == "storybook" and not Path(source).exists():
        count = rest.partition(":")[0]
        return STORY_TOKENS * int(count) if count.isdigit() else STORY_TOKENS * STORIES[split]
    try:
        files = [] if kind in SOURCES else find_files(source)
    except GemmuleError:
        return None
    sizes = [file.stat().st_size for file in files if file.suffix == ".txt"]  # what others hold, only reading tells
    return sum(sizes) / BYTES_A_TOKEN if sizes and len(sizes) == len(files) else None
