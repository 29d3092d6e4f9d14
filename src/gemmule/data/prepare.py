"""From sources to a prepared dataset: a folder with a tokenizer, token shards and the report of what was done."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from gemmule.data.clean import KeySet, clean_documents
from gemmule.data.corpus import Corpus, CorpusWriter, open_corpus
from gemmule.data.readers import Document
from gemmule.data.report import CorpusReport, SplitReport
from gemmule.data.settings import DataSettings
from gemmule.data.sources import Split, read_sources, text_size
from gemmule.data.spool import Spool, Spooled
from gemmule.errors import DatasetError, OutputError, SourceError
from gemmule.files import folder_written_aside
from gemmule.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

DATASET_FILE = "dataset.json"
REPORT_FILE = "report.json"

_SAMPLE = 128 << 20  # bytes of text that the tokenizer is trained on at most
_PORTION = 1 << 20  # bytes of text that are encoded together

# Told of (what is being done, how much is done, of how much if known).
Progress = Callable[[str, int, int | None], None]


class Dataset(NamedTuple):
    """A prepared dataset, open."""

    train: Corpus
    validation: Corpus
    tokenizer: Tokenizer
    report: CorpusReport
    floor_nats: float | None  # of all validation documents together, where their source knows their probability


class Manifest(BaseModel):
    """What dataset.json says; it is there only when everything else is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    fingerprint: str
    train: tuple[str, ...]  # file names of shards
    validation: tuple[str, ...]
    floor_nats: float | None
    settings: dict[str, Any]


class _Gathered(NamedTuple):
    """The cleaned documents of one split and the count of the cleaning."""

    source: str  # as the report names it
    spool: Spool
    tally: Counter[str]


def prepare_dataset(
    settings: DataSettings, tokenizer_settings: TokenizerSettings, out: Path, progress: Progress | None = None
) -> Dataset:
    """Read, clean, tokenize and write; the folder `out` appears when all of it is done.

    Memory holds a portion of the text, the sample that the tokenizer is trained on, and some 50 bytes a document.
    Raises SourceError, TokenizerError or OutputError.
    """
    if prepared_folder(settings):
        raise SourceError(f'{settings.train[0]}: is prepared already; a recipe uses it by data.train = "FOLDER"')
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"{out}: holds something already; name a new or empty folder for the dataset")
    tell = progress or (lambda *_: None)
    with folder_written_aside(out) as folder:
        gathered = _gather(settings, folder, tell)
        tokenizer = _choose_tokenizer(tokenizer_settings, gathered["train"].spool, tell)
        tokenizer.save(folder)
        shards: dict[Split, list[str]] = {}
        reports: dict[Split, SplitReport] = {}
        for split, part in gathered.items():
            shards[split], reports[split] = _write_split(split, part, tokenizer, folder, tell)
        manifest = Manifest(
            fingerprint=tokenizer.fingerprint,
            train=tuple(shards["train"]),
            validation=tuple(shards["validation"]),
            floor_nats=_floor(gathered["validation"].spool),
            settings=settings.model_dump(),
        )
        for part in gathered.values():
            part.spool.remove()
        (folder / REPORT_FILE).write_text(CorpusReport(**reports).model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / DATASET_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return open_dataset(out)


def prepared_folder(settings: DataSettings) -> Path | None:
    """Return the folder that the settings train on where `prepare_dataset` made it, else None."""
    folder = Path(settings.train[0])
    return folder if len(settings.train) == 1 and (folder / DATASET_FILE).is_file() else None


def open_dataset(folder: Path) -> Dataset:
    """Open a folder that `prepare_dataset` made; raises DatasetError where it is not one, or damaged."""
    try:
        manifest = Manifest.model_validate_json((folder / DATASET_FILE).read_bytes())
        report = CorpusReport.model_validate_json((folder / REPORT_FILE).read_bytes())
    except OSError as error:
        raise DatasetError(f"{error.filename}: cannot be read ({error.strerror}); gemmule prepare makes it") from None
    except ValidationError as error:
        raise DatasetError(f"{folder}: damaged ({error.title}: {error.errors()[0]['msg']}); prepare it again") from None
    tokenizer = Tokenizer.load(folder)
    train, validation = (
        open_corpus(folder, names, tokenizer.fingerprint) for names in (manifest.train, manifest.validation)
    )
    return Dataset(train, validation, tokenizer, report, manifest.floor_nats)


def _gather(settings: DataSettings, folder: Path, tell: Progress) -> dict[Split, _Gathered]:
    """Read and clean both splits into spools: validation first, so that train can do without its documents."""
    tallies: dict[Split, Counter[str]] = {"train": Counter(), "validation": Counter()}
    withheld = KeySet()
    with Spool(folder / "train.spool") as train, Spool(folder / "validation.spool") as validation:
        if settings.validation is not None:
            documents = _watch(settings.validation, settings, "validation", tell)
            for document in clean_documents(documents, tallies["validation"], withheld, KeySet()):
                validation.append(document.text, document.log_probability)
        held_out_below = 0 if settings.validation is not None else settings.holdout * 2.0**64
        documents = _watch(settings.train, settings, "train", tell)
        for document in clean_documents(documents, tallies["train"], KeySet(), withheld):
            held_out = document.key < held_out_below
            tallies["train"]["held_out"] += held_out
            (validation if held_out else train).append(document.text, document.log_probability)
    if settings.validation is None:
        tallies["validation"]["read"] = tallies["train"]["held_out"]
    _check_something_left("train", settings.train, train, tallies["train"])
    if settings.validation is None and not validation.documents:
        raise SourceError(
            f"data.holdout = {settings.holdout}: none of the {train.documents} documents falls into that share; "
            "set a larger one, or data.validation"
        )
    _check_something_left("validation", settings.validation or settings.train, validation, tallies["validation"])
    return {
        "train": _Gathered(", ".join(settings.train), train, tallies["train"]),
        "validation": _Gathered(
            ", ".join(settings.validation or ("held out of train",)), validation, tallies["validation"]
        ),
    }


def _check_something_left(split: Split, sources: Sequence[str], spool: Spool, tally: Counter[str]) -> None:
    if not spool.documents:
        found = ", ".join(f"{count} {reason}" for reason, count in tally.items() if count)
        raise SourceError(f"data.{split} = {', '.join(sources)}: no document is left to use ({found or 'none there'})")


def _watch(sources: Sequence[str], settings: DataSettings, split: Split, tell: Progress) -> Iterator[Document]:
    """Yield the documents of the sources, telling of each mebibyte."""
    label, sizes, done, told = f"reading {split} (bytes)", [text_size(source) for source in sources], 0, 0
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    tell(label, 0, total)
    for document in read_sources(sources, settings, split):
        done += len(document.text)
        if done - told >= 1 << 20:
            told = done
            tell(label, done, total)
        yield document


def _choose_tokenizer(settings: TokenizerSettings, train: Spool, tell: Progress) -> Tokenizer:
    if settings.path is not None:
        return Tokenizer.load(Path(settings.path).expanduser())
    tell("training the tokenizer", 0, None)
    return train_tokenizer(train.sample(_SAMPLE), settings.vocab_size)


def _write_split(
    split: Split, part: _Gathered, tokenizer: Tokenizer, folder: Path, tell: Progress
) -> tuple[list[str], SplitReport]:
    """Encode a spool into shards; return their names and the report."""
    label, spool = f"encoding {split} (documents)", part.spool
    sizes = tokenizer.token_bytes()
    done = longest = 0
    with CorpusWriter(folder, split, tokenizer.fingerprint, tokenizer.vocab_size) as writer:
        for portion in _portions(spool):
            rows = tokenizer.encode_documents([document.text for document in portion])
            for document, ids in zip(portion, rows, strict=True):
                writer.append(ids, document.size - sizes[ids[0]])
                longest = max(longest, len(ids))
            done += len(portion)
            tell(label, done, spool.documents)
    report = SplitReport(
        source=part.source, kept=spool.documents, bytes=spool.bytes, tokens=writer.tokens, longest=longest, **part.tally
    )
    return writer.names, report


def _portions(documents: Iterable[Spooled]) -> Iterator[list[Spooled]]:
    portion: list[Spooled] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += document.size
        if size >= _PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _floor(validation: Spool) -> float | None:
    """Return the surprise in nats of all documents together, or None where one's probability is not known."""
    chances = [document.log_probability for document in validation]
    known = [chance for chance in chances if chance is not None]
    return -math.fsum(known) if len(known) == len(chances) else None
