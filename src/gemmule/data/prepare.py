"""From sources to a prepared dataset, in stages that many processes share and that a killed preparation takes up again.

    SOURCEs -> units -> clean (each apart) -> choose (all together) -> tokenizer -> encode (each apart) -> dataset

What is finished lies in the folder `.NAME.partial` beside the dataset until that is whole.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import compress, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmule.data.choose import Fate, Fates, choose_documents
from gemmule.data.clean import clean_unit
from gemmule.data.dataset import DATASET_FILE, REPORT_FILE, Dataset, Manifest, open_dataset, prepared_folder
from gemmule.data.encode import Assignment, encode_unit
from gemmule.data.engines import ENGINES, Engine
from gemmule.data.parts import Part
from gemmule.data.picture import draw_report
from gemmule.data.readers import Misread, check_encoding
from gemmule.data.report import CorpusReport, SourceReport, SplitReport
from gemmule.data.settings import DataSettings
from gemmule.data.sources import Split, Unit, plan_units
from gemmule.data.work import claim_stage, finish, finished, key_of
from gemmule.errors import OutputError, SourceError
from gemmule.files import aside_of, explained, held, put_in_place, written_aside
from gemmule.tokenizer import Tokenizer, TokenizerSettings
from gemmule.tokenizer.training import train_tokenizer

PICTURE_FILE = "report.png"

_VERSION = 1  # of what is made from a unit; unfinished work of another one is not taken up
_SAMPLE = 128 << 20  # bytes of text that the tokenizer is trained on at most

# Told of (what is being done, how much is done, of how much if known).
Progress = Callable[[str, int, int | None], None]

# Settings that decide which documents are clean; the others come in later, or in training.
_OF_CLEANING = {
    "separator", "column", "min_characters", "max_characters", "keep_matching", "drop_matching", "quality",
}  # fmt: skip


def prepare_dataset(
    settings: DataSettings,
    tokenizer_settings: TokenizerSettings,
    out: Path,
    progress: Progress | None = None,
    *,
    workers: int = 1,
    engine: str = "local",
    say: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Read, clean, tokenize and write; the folder `out` appears when all of it is done.

    The result does not depend on the number of workers, the engine, or how often it was stopped on the way: the same
    call goes on from what is finished. Memory holds a portion of the text for each worker, the sample that the
    tokenizer is trained on, and some 40 bytes a document. Raises SourceError, TokenizerError or OutputError.
    """
    work = aside_of(out)
    _check_place(settings, out, work)
    with explained(out):
        work.mkdir(parents=True, exist_ok=True)
        with held(work):
            try:
                preparation = Preparation(settings, work, progress or (lambda *_: None), workers, ENGINES[engine], say)
                made = preparation.run(tokenizer_settings)
                for stage in (preparation.clean, preparation.choose):
                    shutil.rmtree(stage, ignore_errors=True)
                put_in_place(made, out)
                shutil.rmtree(work)
            finally:
                if not any(work.glob("clean/*.json")):
                    shutil.rmtree(work, ignore_errors=True)  # nothing that is worth keeping
    return open_dataset(out)


def _check_place(settings: DataSettings, out: Path, work: Path) -> None:
    if prepared_folder(settings):
        raise SourceError(f'{settings.train[0]}: is prepared already; a recipe uses it by data.train = "FOLDER"')
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if (out / DATASET_FILE).is_file():
            shutil.rmtree(work, ignore_errors=True)  # what a kill left that came after the last step
        raise OutputError(f"{out}: holds something already; name a new or empty folder for the dataset")


class Cleaned(NamedTuple):
    """The first stage's result."""

    tallies: dict[Split, Counter[str]]
    documents: list[int]  # of each unit
    validation: int  # documents of the units of that split, which come first


class Preparation:
    """The stages, each of which finds in its folder what is finished already."""

    def __init__(
        self,
        settings: DataSettings,
        work: Path,
        tell: Progress,
        workers: int,
        engine: Engine,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.tell, self.workers, self.engine, self.say = settings, tell, workers, engine, say
        self.work = work
        self.clean, self.choose, self.encode = work / "clean", work / "choose", work / "encode"
        self.made = self.encode / "dataset"

    def run(self, tokenizer_settings: TokenizerSettings) -> Path:
        """Do what is not done yet; return the folder that is the dataset."""
        settings = self.settings
        given = Tokenizer.load(Path(tokenizer_settings.path).expanduser()) if tokenizer_settings.path else None
        units = [*plan_units(settings, "validation"), *plan_units(settings, "train")]
        chosen = settings.model_dump(include=_OF_CLEANING)
        clean_key = key_of(_VERSION, units, chosen, settings.near_duplicates is not None)
        holdout = settings.holdout if settings.validation is None else None
        choose_key = key_of(clean_key, holdout, settings.near_duplicates)
        encode_key = key_of(choose_key, given.fingerprint if given else tokenizer_settings.vocab_size)
        if (self.made / DATASET_FILE).is_file() and claim_stage(self.encode, encode_key):
            return self.made
        kept = [
            claim_stage(stage, key)
            for stage, key in ((self.clean, clean_key), (self.choose, choose_key), (self.encode, encode_key))
        ]
        if not all(kept):
            self.say(f"{self.work}: made from other settings or sources in part, which is done anew")
        cleaned = self._clean(units)
        fates = self._choose(units)
        self._check_something_left(fates, cleaned)
        tokenizer = self._tokenizer(units, fates, cleaned, given, tokenizer_settings.vocab_size)
        counts = self._encode(units, cleaned.documents, tokenizer.fingerprint)
        self._conclude(units, cleaned, fates, counts, tokenizer)
        return self.made

    def _clean(self, units: Sequence[Unit]) -> Cleaned:
        """Clean each unit; SourceError where a file turns out not to be text."""
        done, total = 0, sum(unit.size for unit in units)

        def told(result: dict[str, Any]) -> None:
            nonlocal done
            done += result["bytes"]
            self.tell("cleaning (bytes)", min(done, total), total)

        self.tell("cleaning (bytes)", 0, total)
        results = self.engine(partial(clean_unit, settings=self.settings, folder=self.clean), units, self.workers, told)
        tallies: dict[Split, Counter[str]] = {"train": Counter(), "validation": Counter()}
        for unit, result in zip(units, results, strict=True):
            tallies[unit.split].update(result["tally"])
        spans = [
            (span.place, Misread(*found))
            for unit, result in zip(units, results, strict=True)
            for span, found in zip(unit.spans, result["misread"], strict=True)
        ]
        for place, group in groupby(spans, lambda pair: pair[0]):
            found = Misread()
            for _, more in group:
                found = found.joined(more)
            check_encoding(place, found)
        documents = [result["documents"] for result in results]
        ours = (unit.split == "validation" for unit in units)
        return Cleaned(tallies, documents, sum(compress(documents, ours)))

    def _choose(self, units: Sequence[Unit]) -> Fates:
        """Decide the fate of each document."""
        note, file = self.choose / "fates.json", self.choose / "fates.npy"
        if finished(note) is None:
            self.tell("choosing documents", 0, None)
            parts = {unit: Part(self.clean, unit.name) for unit in units}
            validation = [part for unit, part in parts.items() if unit.split == "validation"]
            train = [part for unit, part in parts.items() if unit.split == "train"]
            np.save(file, choose_documents(validation, train, self.settings))
            finish(note, {"documents": 0}, [file])
        return np.load(file)

    def _check_something_left(self, fates: Fates, cleaned: Cleaned) -> None:
        settings = self.settings
        train, validation = (int((fates == fate).sum()) for fate in (Fate.TRAIN, Fate.VALIDATION))
        tallies = _tallies(fates, cleaned)
        if settings.validation is None and train and not validation:
            raise SourceError(
                f"data.holdout = {settings.holdout}: none of the {train} documents falls into that share; "
                "set a larger one, or data.validation"
            )
        wanted: tuple[tuple[Split, Sequence[str], int], ...] = (
            ("validation", settings.validation or settings.train, validation if settings.validation else 1),
            ("train", settings.train, train),
        )
        for split, sources, left in wanted:
            if not left:
                found = ", ".join(f"{count} {reason}" for reason, count in tallies[split].items() if count)
                raise SourceError(
                    f"data.{split} = {', '.join(sources)}: no document is left to use ({found or 'none there'})"
                )

    def _tokenizer(
        self, units: Sequence[Unit], fates: Fates, cleaned: Cleaned, given: Tokenizer | None, vocab_size: int
    ) -> Tokenizer:
        """Take over the tokenizer that is given, or train one on a sample of the train documents."""
        self.made.mkdir(exist_ok=True)
        note = self.encode / "tokenizer.json"
        if finished(note) is None:
            if given is None:
                self.tell("training the tokenizer", 0, None)
                given = train_tokenizer(self._sample(units, fates, cleaned), vocab_size)
            given.save(self.made)
            finish(note, {"fingerprint": given.fingerprint}, sorted(self.made.glob("tokenizer*.json")))
        return Tokenizer.load(self.made)

    def _sample(self, units: Sequence[Unit], fates: Fates, cleaned: Cleaned) -> Iterator[str]:
        """Yield train documents that are spread evenly, about `_SAMPLE` bytes in all."""
        wanted = [
            (part := Part(self.clean, unit.name), fates[start : start + count] == Fate.TRAIN)
            for unit, start, count in zip(units, _starts(cleaned.documents), cleaned.documents, strict=True)
        ]
        size = sum(int(part.sizes()[train].sum()) for part, train in wanted)
        share = min(1.0, _SAMPLE / max(1, size))
        number = 0
        for part, train in wanted:
            places = np.arange(number, number + int(train.sum()))
            number += len(places)
            taken = train.copy()
            taken[train] = np.floor(places * share) > np.floor((places - 1) * share)
            yield from (document.text for document in part.texts(taken))

    def _encode(self, units: Sequence[Unit], documents: Sequence[int], fingerprint: str) -> list[dict[str, Any]]:
        """Encode each unit into its shards."""
        label, done = "encoding (documents)", 0
        given = [Assignment(unit, start) for unit, start in zip(units, _starts(documents), strict=True)]
        self.tell(label, 0, sum(documents))

        def told(counts: dict[str, Any]) -> None:
            nonlocal done
            done += sum(split["documents"] for split in counts.values())
            self.tell(label, done, sum(documents))

        function = partial(
            encode_unit,
            clean=self.clean,
            fates=self.choose / "fates.npy",
            folder=self.encode,
            fingerprint=fingerprint,
        )
        return self.engine(function, given, self.workers, told)

    def _conclude(
        self, units: Sequence[Unit], cleaned: Cleaned, fates: Fates, counts: list[dict[str, Any]], tokenizer: Tokenizer
    ) -> None:
        """Write the report and, last, what makes the folder a dataset."""
        settings, tallies = self.settings, _tallies(fates, cleaned)
        shards = {split: [count[split] for count in counts if split in count] for split in tallies}
        named: dict[Split, Sequence[str]] = {
            "train": settings.train,
            "validation": settings.validation or ("held out of train",),
        }
        report = CorpusReport(
            **{split: _report(", ".join(named[split]), shards[split], tallies[split]) for split in tallies},
            sources=_sources(settings.train, units, counts),
        )
        manifest = Manifest(
            fingerprint=tokenizer.fingerprint,
            train=tuple(shard["name"] for shard in shards["train"]),
            train_sources=tuple(unit.source for unit, count in zip(units, counts, strict=True) if "train" in count),
            validation=tuple(shard["name"] for shard in shards["validation"]),
            floor_nats=self._floor(units, fates),
            settings=settings.model_dump(),
        )
        draw_report(report, self.made / PICTURE_FILE)
        (self.made / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with written_aside(self.made / DATASET_FILE) as aside:
            aside.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _floor(self, units: Sequence[Unit], fates: Fates) -> float | None:
        """Return the surprise in nats of all validation documents, or None where one's probability is not known."""
        chances = np.concatenate([Part(self.clean, unit.name).log_probabilities() for unit in units])
        chances = chances[fates == Fate.VALIDATION]
        return None if np.isnan(chances).any() else -math.fsum(chances)


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts).tolist()][:-1]


def _tallies(fates: Fates, cleaned: Cleaned) -> dict[Split, Counter[str]]:
    """Add the fates of the documents to what was counted before."""
    tallies = {split: tally.copy() for split, tally in cleaned.tallies.items()}
    parts: dict[Split, Fates] = {"validation": fates[: cleaned.validation], "train": fates[cleaned.validation :]}
    for split, part in parts.items():
        counts = np.bincount(part, minlength=len(Fate)).tolist()
        tallies[split].update({fate.name.lower(): counts[fate] for fate in Fate if fate > Fate.VALIDATION})
    tallies["train"]["held_out"] = int((parts["train"] == Fate.VALIDATION).sum())
    tallies["validation"]["read"] += tallies["train"]["held_out"]
    return tallies


def _report(source: str, shards: Sequence[dict[str, Any]], tally: Counter[str]) -> SplitReport:
    lengths = np.zeros(max(len(shard["lengths"]) for shard in shards), np.int64)
    for shard in shards:
        lengths[: len(shard["lengths"])] += shard["lengths"]
    return SplitReport(
        source=source,
        kept=sum(shard["documents"] for shard in shards),
        bytes=sum(shard["bytes"] for shard in shards),
        tokens=sum(shard["tokens"] for shard in shards),
        longest=max(shard["longest"] for shard in shards),
        lengths=tuple(lengths.tolist()),
        **tally,
    )


def _sources(names: Sequence[str], units: Sequence[Unit], counts: Sequence[dict[str, Any]]) -> tuple[SourceReport, ...]:
    reports = []
    for number, name in enumerate(names):
        own = [
            count["train"]
            for unit, count in zip(units, counts, strict=True)
            if "train" in count and unit.source == number
        ]
        sums = {key: sum(shard[key] for shard in own) for key in ("documents", "bytes", "tokens")}
        reports.append(SourceReport(source=name, **sums))
    return tuple(reports)
