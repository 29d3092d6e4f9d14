"""A prepared dataset: the folder with a tokenizer, token shards and the report of how they were made."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from gemmule.data.corpus import Corpus, open_corpus
from gemmule.data.report import CorpusReport
from gemmule.data.settings import DataSettings
from gemmule.errors import DatasetError, RecipeError
from gemmule.recipe import Problem
from gemmule.tokenizer import Tokenizer

DATASET_FILE = "dataset.json"
REPORT_FILE = "report.json"


class Dataset(NamedTuple):
    """A prepared dataset, open."""

    train: Corpus
    validation: Corpus
    tokenizer: Tokenizer
    report: CorpusReport
    floor_nats: float | None  # of all validation documents together, where their source knows their probability
    sources: tuple[int, ...]  # of each train shard, among the sources that the report names

    def mixture(self, weights: tuple[float, ...] | None) -> list[tuple[Corpus, float]]:
        """Return train corpora and weights: all as one, or by source; RecipeError if they do not fit."""
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
                advice = f"gives a share to {names[number]}, of which no document is left"
                raise RecipeError(str(Problem("data.weights", weights, advice)))
            mixture.append((Corpus(own), weight))
        return mixture


class Manifest(BaseModel):
    """What dataset.json says; it is there only when everything else is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    fingerprint: str
    train: tuple[str, ...]  # file names of shards
    train_sources: tuple[int, ...]  # of each of them, as the report numbers them
    validation: tuple[str, ...]
    floor_nats: float | None
    settings: dict[str, Any]


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
        problem = f"{error.title}: {error.errors()[0]['msg']}"
        raise DatasetError(f"{folder}: damaged, or of another version ({problem}); prepare it again") from None
    tokenizer = Tokenizer.load(folder)
    train, validation = (
        open_corpus(folder, names, tokenizer.fingerprint) for names in (manifest.train, manifest.validation)
    )
    return Dataset(train, validation, tokenizer, report, manifest.floor_nats, manifest.train_sources)
