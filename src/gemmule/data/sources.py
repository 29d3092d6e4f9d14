"""Where text comes from: a SOURCE, as the user writes it, becomes a stream of documents."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from gemmule.data.readers import COMPRESSIONS, FORMATS, Document, format_of, read_file, text_of
from gemmule.data.settings import DataSettings
from gemmule.errors import MissingExtra, SourceError

Split = Literal["train", "validation"]

# Stories of different seeds are different draws, so train and validation never need to agree on who takes which.
_STORY_SEEDS: dict[Split, int] = {"train": 1, "validation": 2}
_STORY_COUNTS: dict[Split, int] = {"train": 40_000, "validation": 1_000}


def read_sources(sources: Sequence[str], settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of several SOURCEs, one after the other."""
    return chain.from_iterable(read_source(source, settings, split) for source in sources)


def read_source(source: str, settings: DataSettings, split: Split) -> Iterator[Document]:
    """Yield the documents of a SOURCE in a fixed order; raises SourceError where it cannot be read."""
    kind, colon, rest = source.partition(":")
    if kind in SOURCES and (colon or not Path(source).exists()):
        yield from SOURCES[kind](rest, settings, split)
    else:
        for file in find_files(source):
            yield from read_file(file, settings)


def text_size(source: str) -> int | None:
    """Return how many bytes of text a SOURCE has, where its files tell without being read."""
    if source.partition(":")[0] in SOURCES:
        return None
    files = find_files(source)
    return sum(file.stat().st_size for file in files) if all(file.suffix == ".txt" for file in files) else None


def find_files(source: str) -> list[Path]:
    """Return the files that a file name, folder or glob stands for, sorted; folders are searched to their depths."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if format_of(file) in FORMATS and file.is_file()]
        if not files:
            raise SourceError(f"{source}: this folder holds no {_known_formats()}")
        return files
    if path.exists() or not set(source) & set("*?["):
        files = [path]
    else:
        files = sorted(file for file in _glob(path) if file.is_file())
        if not files:
            raise SourceError(f"{source}: no file matches")
    for file in files:
        _check_file(file)
    return files


def _glob(pattern: Path) -> Iterator[Path]:
    try:
        yield from Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
    except ValueError as error:
        raise SourceError(f"{pattern}: {error}") from None


def _check_file(file: Path) -> None:
    if not file.exists():
        raise SourceError(f"{file}: no such file or folder; a SOURCE may also be a glob, hf:owner/name or storybook")
    if format_of(file) not in FORMATS:
        raise SourceError(f"{file}: not a kind of file that is read; use {_known_formats()}")
    if not file.stat().st_size:
        raise SourceError(f"{file}: the file is empty")


def _known_formats() -> str:
    return f"{', '.join(FORMATS)}, or such a file compressed as {' or '.join(COMPRESSIONS)}"


def _read_storybook(rest: str, _settings: DataSettings, split: Split) -> Iterator[Document]:
    """Tell `count` stories from number `start` on; train and validation use seeds of their own."""
    from gemmule.data.storybook import stories

    parts = rest.split(":") if rest else []
    if len(parts) > 2 or not all(part.isdecimal() for part in parts) or parts[:1] == ["0"]:
        raise SourceError(f"storybook:{rest}: write it as storybook, storybook:COUNT or storybook:COUNT:START")
    count, start = [*map(int, parts), *(_STORY_COUNTS[split], 0)[len(parts) :]]
    for story in stories(count, _STORY_SEEDS[split], start):
        yield Document(story.text, story.log_probability)


def _read_hub(rest: str, settings: DataSettings, split: Split) -> Iterator[Document]:
    """Stream a dataset of the Hugging Face Hub, or read one file of its repository."""
    name, *parts = rest.split(":")
    if name.count("/") > 1:
        yield from read_file(_download(name), settings)
        return
    if len(parts) > 2 or not name:
        raise SourceError(f"hf:{rest}: write it as hf:owner/name, hf:owner/name:SPLIT:COLUMN or hf:owner/name/FILE")
    wanted, column = [*parts, *(split, settings.column)[len(parts) :]]
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "sources", f"hf:{rest}") from None
    try:
        for row in datasets.load_dataset(name, split=wanted, streaming=True):
            yield text_of(row, column, f"hf:{rest}")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"hf:{rest}: cannot be read ({error})") from error


def _download(name: str) -> Path:
    owner, repository, file = name.split("/", maxsplit=2)
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "sources", f"hf:{name}") from None
    try:
        local = huggingface_hub.hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise SourceError(f"hf:{name}: cannot be fetched ({error})") from error
    path = Path(local)
    _check_file(path)
    return path


SOURCES: dict[str, Callable[[str, DataSettings, Split], Iterator[Document]]] = {
    "hf": _read_hub,
    "storybook": _read_storybook,
}
