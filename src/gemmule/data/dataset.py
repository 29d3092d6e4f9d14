"""A prepared dataset: a folder with a tokenizer, token shards and the report of their preparation."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from gemmule.data.corpus import Corpus, open_corpus
from gemmule.data.report import CorpusReport
from gemmule.data.settings import DataSettings
from gemmule.data.shards import verify_shard
from gemmule.errors import DatasetError, RecipeError
from gemmule.reading import local_path, path_kind
from gemmule.run_folder import RunFolder
from gemmule.settings import Problem, Settings, read_recipe
from gemmule.tokenizer import Tokenizer

DATASET_FILE = "dataset.json"
REPORT_FILE = "report.json"


class Dataset(NamedTuple):
    """An open prepared dataset."""

    train: Corpus
    validation: Corpus
    tokenizer: Tokenizer
    report: CorpusReport
    floor_nats: float | None  # -log p of all validation documents together, where it is known
    sources: tuple[int, ...]  # per train shard, the index of its source in the report
    lossless: bool = True  # whether decoding restores the text; where not, bits per byte are meaningless
    kind: str = "text"  # what its rows are, as data.kind says

    @property
    def identity(self) -> str:
        """The SHA-256 of the tokenizer's fingerprint and the checksums of all shards."""
        checksums = [shard.header.checksum for split in (self.train, self.validation) for shard in split.shards]
        return hashlib.sha256(self.tokenizer.fingerprint.encode() + b"".join(checksums)).hexdigest()

    def mixture(self, weights: tuple[float, ...] | None) -> list[tuple[Corpus, float]]:
        """Return train corpora and their weights: one of all shards, or one per source; RecipeError on a mismatch."""
        if weights is None:
            return [(self.train, 1.0)]
        names = [source.source for source in self.report.sources]
        if len(weights) != len(names):
            advice = f"must have one number for each of the dataset's {len(names)} sources ({', '.join(names)})"
            raise RecipeError(str(Problem("data.weights", weights, advice)))
        shards = list(zip(self.train.shards, self.sources, strict=True))
        mixture = []
        for number, weight in enumerate(weights):
            own = [shard for shard, source in shards if source == number]
            if not own:
                advice = f"has a weight for {names[number]}, of which no document is left"
                raise RecipeError(str(Problem("data.weights", weights, advice)))
            mixture.append((Corpus(own), weight))
        return mixture


class Manifest(BaseModel):
    """The contents of dataset.json, which is written last and marks a dataset as complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    fingerprint: str
    train: tuple[str, ...]  # file names of shards
    train_sources: tuple[int, ...]  # per train shard, the index of its source in the report
    validation: tuple[str, ...]
    floor_nats: float | None
    settings: dict[str, Any]
    lossless: bool = True  # written where it is false


def prepared_folder(settings: DataSettings) -> Path | None:
    """Return the prepared dataset that `data.train` names, None where it names text."""
    folder = local_path(settings.train[0])
    return folder if len(settings.train) == 1 and path_kind(folder / DATASET_FILE) else None


def run_data_settings(run: RunFolder) -> DataSettings:
    """Return the data settings of a run's recipe, whatever its other settings are."""

    class Run(Settings, extra="ignore"):
        """The part of a recipe that is read."""

        data: DataSettings

    return read_recipe(run.recipe, Run).data


def run_dataset(run: RunFolder) -> Dataset | None:
    """Open the dataset that a run is trained on, its own or the prepared one that its recipe names; None without.

    Checksums are not verified.
    """
    own = path_kind(run.data / DATASET_FILE) is not None
    folder = run.data if own else prepared_folder(run_data_settings(run))
    return open_dataset(folder, verify=False) if folder else None


def open_dataset(folder: Path, *, verify: bool = True) -> Dataset:
    """Open a prepared dataset; raises DatasetError where the folder is not one, or is damaged.

    With `verify`, the checksum and the token ids of every shard are checked, else only its header.
    """
    try:
        manifest = Manifest.model_validate_json((folder / DATASET_FILE).read_bytes())
        report = CorpusReport.model_validate_json((folder / REPORT_FILE).read_bytes())
    except OSError as error:
        raise DatasetError(f"{error.filename}: cannot be read ({error.strerror}); gemmule prepare makes it") from None
    except ValidationError as error:
        problem = f"{error.title}: {error.errors()[0]['msg']}"
        raise DatasetError(f"{folder}: damaged, or of another version ({problem}); prepare it again") from None
    tokenizer = Tokenizer.load(folder)
    train, validation = (
        open_corpus(folder, names, tokenizer.fingerprint) for names in (manifest.train, manifest.validation)
    )
    if verify:
        for shard in (*train.shards, *validation.shards):
            verify_shard(shard, tokenizer.vocab_size)
    sources, floor = manifest.train_sources, manifest.floor_nats
    kind = str(manifest.settings.get("kind", "text"))
    return Dataset(train, validation, tokenizer, report, floor, sources, manifest.lossless, kind)
