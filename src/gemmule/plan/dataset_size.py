"""Dataset size: the tokens of a recipe's data, as far as known without reading it."""

from typing import NamedTuple

from pydantic import ValidationError

from gemmule.data.dataset import REPORT_FILE, prepared_folder
from gemmule.data.discovery import find_files
from gemmule.data.report import CorpusReport
from gemmule.data.sources import LocalSource, Split, StorybookSource, parse_source
from gemmule.errors import GemmuleError
from gemmule.train.recipe import Recipe

# English with a vocabulary of several thousand tokens; a story of the storybook with 3,200.
BYTES_PER_TOKEN, TOKENS_PER_STORY = 4.0, 165.0


class DatasetSize(NamedTuple):
    """Tokens of the two splits, None where unknown, and the source of the numbers."""

    tokens: float | None
    validation_tokens: int | None
    source: str


def dataset_size(recipe: Recipe) -> DatasetSize:
    """Return the dataset size, from the report of prepared data or estimated from file sizes."""
    folder = prepared_folder(recipe.data)
    if folder is not None:
        try:
            report = CorpusReport.model_validate_json((folder / REPORT_FILE).read_bytes())
        except (OSError, ValidationError):
            return DatasetSize(None, None, f"{folder} has no report")
        return DatasetSize(report.train.tokens, report.validation.tokens, "counted when the data was prepared")
    sizes = [_tokens(source) for source in recipe.data.train]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return DatasetSize(None, None, "unknown before the data is read; `gemmule prepare` counts the tokens")
    held_out = recipe.data.holdout if recipe.data.validation is None else 0.0
    validation = [_tokens(source, "validation") for source in recipe.data.validation or ()]
    validation_tokens = sum(size or 0.0 for size in validation) or held_out * sum(known)
    is_storybook = [isinstance(parse_source(source), StorybookSource) for source in recipe.data.train]
    assumed = [f"{TOKENS_PER_STORY:g} tokens per story of the storybook"] * any(is_storybook)
    assumed += [f"{BYTES_PER_TOKEN:g} bytes per token"] * (not all(is_storybook))
    return DatasetSize(sum(known) * (1 - held_out), int(validation_tokens), f"estimated with {', '.join(assumed)}")


def _tokens(text: str, split: Split = "train") -> float | None:
    try:
        source = parse_source(text)
        if isinstance(source, StorybookSource):
            return TOKENS_PER_STORY * source.stories(split)
        files = find_files(source.path) if isinstance(source, LocalSource) else []
    except GemmuleError:
        return None
    sizes = [file.stat().st_size for file in files if file.suffix == ".txt"]  # other formats have to be read
    return sum(sizes) / BYTES_PER_TOKEN if sizes and len(sizes) == len(files) else None
