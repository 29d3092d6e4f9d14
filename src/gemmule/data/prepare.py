"""The preparation pipeline: from sources to a prepared dataset, in parallel and resumable stages.

    sources -> work units -> clean (parallel) -> deduplicate and split -> tokenizer -> tokenize (parallel) -> dataset

Finished work is cached in the folder `.NAME.partial` beside the dataset, which appears by an atomic rename.
"""

import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import compress, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from gemmule.data.clean import clean_unit
from gemmule.data.dataset import DATASET_FILE, REPORT_FILE, Dataset, Manifest, open_dataset, prepared_folder
from gemmule.data.deduplicate import label_documents
from gemmule.data.documents import ReadStats, ReadWarnings
from gemmule.data.encode import EncodingTask, encode_unit
from gemmule.data.engines import ENGINES, Engine, available_cores, end_worker_that_imports_a_script
from gemmule.data.holdout import working_share
from gemmule.data.intermediate import IntermediateShard
from gemmule.data.labels import DROPPED, Label, Labels, in_split, split_texts
from gemmule.data.plain_text import Separator
from gemmule.data.plot import plot_report
from gemmule.data.rendering import ROWS_SUFFIX, check_tokenizer
from gemmule.data.report import CorpusReport, LossMaskReport, SourceReport, SplitReport, add_loss_masks, counted
from gemmule.data.settings import DataSettings
from gemmule.data.sources import UNIT, Split, WorkUnit, plan_units
from gemmule.data.stage_cache import cache_key, commit, committed, open_stage
from gemmule.data.vocabulary import ChosenTokenizer, Vocabulary
from gemmule.errors import OutputError, SourceError
from gemmule.files import (
    as_output_error,
    atomic_replace,
    atomic_write,
    create_temporary_folder,
    directory_lock,
    partial_folder,
)
from gemmule.tokenizer import Tokenizer, TokenizerSettings
from gemmule.tokenizer.chat import CHAT_TEMPLATE
from gemmule.tokenizer.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from gemmule.tokenizer.training import train_tokenizer

PLOT_FILE = "report.png"

STAGED = "encode/dataset"  # where the dataset is written, below the work folder
_VERSION = 3  # of the stage cache; unfinished work of another version is not resumed
_SAMPLE = 128 << 20  # bytes: the largest sample of text that the tokenizer is trained on

log = logging.getLogger(__name__)

# Called with (stage, amount done, total if known).
Progress = Callable[[str, int, int | None], None]

# Settings of the cleaning stage; the others matter in later stages, or in training.
_CLEANING_SETTINGS = {
    "kind", "separator", "column", "min_characters", "max_characters", "keep_matching", "drop_matching", "quality",
}  # fmt: skip


def prepare_dataset(
    settings: DataSettings,
    vocabulary: Vocabulary,
    out: Path,
    progress: Progress | None = None,
    *,
    workers: int | None = 1,
    engine: str = "local",
) -> Dataset:
    """Read, clean, deduplicate and tokenize text into a dataset; the folder `out` appears atomically at the end.

    The tokenizer is given, or trained as its settings say; a function chooses these by the bytes of training text.

    Deterministic: the result does not depend on the number of workers (processes; None: all cores, or fewer for little
    text), the engine, or interruptions; the same call resumes from the stage cache. Memory: a few MiB of text per
    worker, the sample that the tokenizer is trained on, and about 40 bytes per document. Raises SourceError,
    TokenizerError or OutputError.
    """
    end_worker_that_imports_a_script()
    work = partial_folder(out)
    _check_output(settings, out, work)
    with as_output_error(out):
        create_temporary_folder(work)
        with directory_lock(work):
            try:
                preparation = Preparation(settings, work, progress or (lambda *_: None), workers, ENGINES[engine])
                staged = preparation.run(vocabulary)
                atomic_replace(staged, out, last=DATASET_FILE)
            finally:
                if (out / DATASET_FILE).is_file() or not any(work.glob("clean/*.json")):
                    shutil.rmtree(work, ignore_errors=True)  # complete, or nothing worth keeping
    return open_dataset(out, verify=False)


def _check_output(settings: DataSettings, out: Path, work: Path) -> None:
    """Raise OutputError where the output folder is not empty."""
    if folder := prepared_folder(settings):
        raise SourceError(f'{folder}: is a prepared dataset already; use it in a recipe by data.train = "FOLDER"')
    found = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if DATASET_FILE in found:
        shutil.rmtree(work, ignore_errors=True)  # left by a process killed after the last step
    elif out.is_dir():
        found -= {work.name, *_roll_back(work / STAGED, out)}
    if found or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: is not empty; name a new or empty folder for the dataset")


def _roll_back(staged: Path, out: Path) -> list[str]:
    """Undo an interrupted move into an output folder that cannot be renamed; return the names of its files."""
    try:
        manifest = Manifest.model_validate_json((staged / DATASET_FILE).read_bytes())
    except (OSError, ValidationError):
        return []  # the staged dataset was incomplete, so nothing was moved
    shards = [*manifest.train, *manifest.validation]
    rows = [str(Path(name).with_suffix(ROWS_SUFFIX)) for name in shards]
    names = [*shards, *rows, REPORT_FILE, PLOT_FILE, TOKENIZER_FILE, CONFIG_FILE]
    moved = [name for name in names if (out / name).is_file() and not (staged / name).exists()]
    for name in moved:
        (out / name).rename(staged / name)
    return moved


class Cleaned(NamedTuple):
    """The result of the cleaning stage."""

    tallies: dict[Split, Counter[str]]
    documents: list[int]  # per work unit
    validation: int  # documents of the validation units, which come first


class Preparation:
    """The stages, each with its cache folder."""

    def __init__(
        self,
        settings: DataSettings,
        work: Path,
        progress: Progress,
        workers: int | None,
        engine: Engine,
    ) -> None:
        self.settings, self.progress, self.workers, self.engine = settings, progress, workers, engine
        self.work = work
        self.clean, self.label, self.encode = work / "clean", work / "label", work / "encode"
        self.staged = work / STAGED

    def run(self, vocabulary: Vocabulary) -> Path:
        """Run the stages that are not cached; return the folder of the staged dataset."""
        settings = self.settings
        units = [*plan_units(settings, "validation"), *plan_units(settings, "train")]
        workers = self.workers or _default_workers(units)
        cleaning = settings.model_dump(include=_CLEANING_SETTINGS)
        clean_key = cache_key(_VERSION, units, cleaning, settings.near_duplicates is not None)
        holdout = settings.holdout if settings.validation is None else None
        label_key = cache_key(clean_key, holdout, settings.near_duplicates)
        chosen = ChosenTokenizer.of(vocabulary) if isinstance(vocabulary, Tokenizer | TokenizerSettings) else None
        if settings.kind != "text":
            check_tokenizer(chosen and chosen.given, settings.kind)
        if chosen and (self.staged / DATASET_FILE).is_file() and open_stage(self.encode, chosen.key(label_key)):
            return self.staged
        reused = all([open_stage(self.clean, clean_key), open_stage(self.label, label_key)])
        cleaned = self._clean(units, workers)
        labels = self._label(units)
        self._check_not_empty(units, labels, cleaned)
        if not isinstance(vocabulary, Tokenizer | TokenizerSettings):
            chosen = ChosenTokenizer.of(vocabulary(self._train_bytes(units, labels, cleaned)))._replace(at_most=True)
        assert chosen is not None
        reused &= open_stage(self.encode, chosen.key(label_key))
        if not reused:
            log.info(f"{self.work}: stages cached for other settings or sources are redone")
        tokenizer = self._tokenizer(units, labels, cleaned, chosen)
        counts = self._encode(units, cleaned.documents, tokenizer.fingerprint, workers)
        self._write_dataset(units, cleaned, labels, counts, tokenizer)
        return self.staged

    def _clean(self, units: Sequence[WorkUnit], workers: int) -> Cleaned:
        """Clean all work units in parallel; SourceError where a file is not UTF-8 text."""
        done, total = 0, sum(unit.size for unit in units)

        def on_result(result: dict[str, Any]) -> None:
            nonlocal done
            done += result["bytes"]
            self.progress("cleaning (bytes)", min(done, total), total)

        self.progress("cleaning (bytes)", 0, total)
        results = self.engine(partial(clean_unit, settings=self.settings, folder=self.clean), units, workers, on_result)
        tallies: dict[Split, Counter[str]] = {"train": Counter(), "validation": Counter()}
        for unit, result in zip(units, results, strict=True):
            tallies[unit.split].update(result["tally"])
        warnings = ReadWarnings(Separator.of(self.settings.separator).text)
        read = [
            (source_range.origin, ReadStats(*stats))
            for unit, result in zip(units, results, strict=True)
            for source_range, stats in zip(unit.ranges, result["stats"], strict=True)
        ]
        for origin, group in groupby(read, itemgetter(0)):
            warnings.add(origin, reduce(ReadStats.merge, (stats for _, stats in group)))
        for message in warnings.messages():
            log.info(message)
        documents = [result["documents"] for result in results]
        validating = (unit.split == "validation" for unit in units)
        return Cleaned(tallies, documents, sum(compress(documents, validating)))

    def _label(self, units: Sequence[WorkUnit]) -> Labels:
        """Deduplicate and split all documents; return their labels."""
        manifest, file = self.label / "labels.json", self.label / "labels.npy"
        if committed(manifest) is None:
            self.progress("deduplicating", 0, None)
            shards = {unit: IntermediateShard(self.clean, unit.name) for unit in units}
            validation = [shard for unit, shard in shards.items() if unit.split == "validation"]
            train = [shard for unit, shard in shards.items() if unit.split == "train"]
            np.save(file, label_documents(validation, train, self.settings))
            commit(manifest, {"documents": 0}, [file])
        return np.load(file)

    def _check_not_empty(self, units: Sequence[WorkUnit], labels: Labels, cleaned: Cleaned) -> None:
        settings = self.settings
        tallies = _tallies(labels, cleaned)
        validation, train = labels[: cleaned.validation], labels[cleaned.validation :]
        wanted: tuple[tuple[Split, Sequence[str] | None, Any], ...] = (
            ("validation", settings.validation, validation == Label.VALIDATION),
            ("train", settings.train, np.isin(train, (Label.TRAIN, Label.VALIDATION, Label.DIVIDED))),
        )
        for split, sources, left in wanted:
            if sources and not left.any():
                found = ", ".join(f"{count} {reason}" for reason, count in tallies[split].items() if count)
                raise SourceError(
                    f"data.{split} = {', '.join(sources)}: no document is left to use ({found or 'none there'})"
                )
        if settings.validation is None:
            self._check_held_out(units, labels)

    def _check_held_out(self, units: Sequence[WorkUnit], labels: Labels) -> None:
        """Report where documents are divided; SourceError where either split would be empty."""
        share = f"data.holdout = {self.settings.holdout:g}"
        left = int((labels <= Label.VALIDATION).sum()) + (divided := int((labels == Label.DIVIDED).sum()))
        if divided:
            ends = f"{'its end' if left == 1 else f'the ends of {divided} long ones'}"
            log.info(
                f"{share}: {counted(left, 'document')}, too few to hold out whole ones, so {ends} will be held out"
            )
        elif not in_split(labels, "train").any() or not in_split(labels, "validation").any():
            shards = [IntermediateShard(self.clean, unit.name) for unit in units]
            size = sum(int(shard.sizes().sum()) for shard in shards)
            works = working_share(shards, labels, self.settings.holdout, divide=self.settings.kind == "text")
            advice = (
                "set data.validation, add text, or set data.separator to the separator between the documents of a file"
            )
            raise SourceError(
                f"{share}: does not divide {counted(left, 'document')} of {size:,} bytes into a train "
                f"and a validation split; {f'use data.holdout = {works:g}, ' if works else ''}{advice}"
            )

    def _tokenizer(
        self, units: Sequence[WorkUnit], labels: Labels, cleaned: Cleaned, chosen: ChosenTokenizer
    ) -> Tokenizer:
        """Copy the given tokenizer, or train one on a sample of the train documents."""
        self.staged.mkdir(exist_ok=True)
        manifest = self.encode / "tokenizer.json"
        if committed(manifest) is None:
            given = chosen.given
            if given is None:
                self.progress("training the tokenizer", 0, None)
                sample = self._sample(units, labels, cleaned)
                given = train_tokenizer(sample, chosen.vocab_size, at_most=chosen.at_most)
            elif self.settings.kind != "text" and given.chat_template is None:
                given = given.with_chat_template(CHAT_TEMPLATE)  # which a model that learns from them is to bring
            given.save(self.staged)
            commit(manifest, {"fingerprint": given.fingerprint}, sorted(self.staged.glob("tokenizer*.json")))
        return Tokenizer.load(self.staged)

    def _labeled(
        self, units: Sequence[WorkUnit], labels: Labels, cleaned: Cleaned
    ) -> Iterator[tuple[IntermediateShard, Labels]]:
        """Yield the documents of each work unit with their labels."""
        for unit, start, count in zip(units, _starts(cleaned.documents), cleaned.documents, strict=True):
            yield IntermediateShard(self.clean, unit.name), labels[start : start + count]

    def _train_bytes(self, units: Sequence[WorkUnit], labels: Labels, cleaned: Cleaned) -> int:
        """Count the bytes of the train documents; those of a divided one in whole."""
        stored = self._labeled(units, labels, cleaned)
        return sum(int(shard.sizes()[in_split(own, "train")].sum()) for shard, own in stored)

    def _sample(self, units: Sequence[WorkUnit], labels: Labels, cleaned: Cleaned) -> Iterator[str]:
        """Yield evenly spaced train documents, about `_SAMPLE` bytes in all."""
        share = min(1.0, _SAMPLE / max(1, self._train_bytes(units, labels, cleaned)))
        number = 0
        for shard, own in self._labeled(units, labels, cleaned):
            train = in_split(own, "train")
            numbers = np.arange(number, number + int(train.sum()))
            number += len(numbers)
            taken = train.copy()
            taken[train] = np.floor(numbers * share) > np.floor((numbers - 1) * share)
            texts = split_texts(shard, own, "train", self.settings.holdout, taken)
            yield from (document.text for document in texts)

    def _encode(
        self, units: Sequence[WorkUnit], documents: Sequence[int], fingerprint: str, workers: int
    ) -> list[dict[str, Any]]:
        """Tokenize all work units in parallel into token shards."""
        stage, done = "tokenizing (documents)", 0
        tasks = [EncodingTask(unit, start) for unit, start in zip(units, _starts(documents), strict=True)]
        self.progress(stage, 0, sum(documents))

        def on_result(counts: dict[str, Any]) -> None:
            nonlocal done
            done += sum(split["documents"] for split in counts.values())
            self.progress(stage, done, sum(documents))

        function = partial(
            encode_unit,
            clean=self.clean,
            labels=self.label / "labels.npy",
            share=self.settings.holdout,
            folder=self.encode,
            fingerprint=fingerprint,
            kind=self.settings.kind,
        )
        return self.engine(function, tasks, workers, on_result)

    def _write_dataset(
        self,
        units: Sequence[WorkUnit],
        cleaned: Cleaned,
        labels: Labels,
        counts: list[dict[str, Any]],
        tokenizer: Tokenizer,
    ) -> None:
        """Write the report and, last, the manifest dataset.json, which marks the folder as complete."""
        settings, tallies = self.settings, _tallies(labels, cleaned)
        shards = {split: [count[split] for count in counts if split in count] for split in tallies}
        divided = int((labels == Label.DIVIDED).sum())
        named: dict[Split, Sequence[str]] = {
            "train": settings.train,
            "validation": settings.validation
            or (f"held out of train: the ends of {counted(divided, 'document')}" if divided else "held out of train",),
        }
        report = CorpusReport(
            **{split: _report(", ".join(named[split]), shards[split], tallies[split]) for split in tallies},
            sources=_sources(settings.train, units, counts),
        )
        manifest = Manifest(
            version=2,
            fingerprint=tokenizer.fingerprint,
            train=tuple(shard["name"] for shard in shards["train"]),
            train_sources=tuple(unit.source for unit, count in zip(units, counts, strict=True) if "train" in count),
            validation=tuple(shard["name"] for shard in shards["validation"]),
            floor_nats=self._entropy_floor(units, labels),
            settings=settings.model_dump(exclude=set(settings.unused())),
            **({"lossless": False} if self._report_lossy(shards) else {}),
        )
        plot_report(report, self.staged / PLOT_FILE)
        (self.staged / REPORT_FILE).write_text(
            report.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8"
        )
        with atomic_write(self.staged / DATASET_FILE) as temporary:
            temporary.write_text(manifest.model_dump_json(indent=2, exclude_unset=True) + "\n", encoding="utf-8")

    def _report_lossy(self, shards: Mapping[Split, Sequence[dict[str, Any]]]) -> bool:
        """Return whether tokenization is lossy, and report it."""
        both = [shard for split in shards.values() for shard in split]
        changed, documents = (sum(shard[count] for shard in both) for count in ("changed", "documents"))
        if changed:
            log.info(
                f"the tokenizer changes {changed:,} of {counted(documents, 'document')}: decoding does not restore the "
                "text, so bits per byte are meaningless"
            )
        return bool(changed)

    def _entropy_floor(self, units: Sequence[WorkUnit], labels: Labels) -> float | None:
        """Return -log p in nats of all validation documents together, or None where a probability is unknown."""
        nats = -np.concatenate([IntermediateShard(self.clean, unit.name).log_probabilities() for unit in units])
        nats = nats[in_split(labels, "validation")]
        return None if np.isnan(nats).any() else math.fsum(nats)


def _default_workers(units: Sequence[WorkUnit]) -> int:
    """Return the workers for the best throughput: a process takes as long to start as megabytes of text to clean."""
    return min(available_cores(), max(1, math.ceil(sum(unit.size for unit in units) / UNIT)))


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(counts).tolist()][:-1]


def _tallies(labels: Labels, cleaned: Cleaned) -> dict[Split, Counter[str]]:
    """Add the counts of the labels to those of cleaning."""
    tallies = {split: tally.copy() for split, tally in cleaned.tallies.items()}
    by_split: dict[Split, Labels] = {"validation": labels[: cleaned.validation], "train": labels[cleaned.validation :]}
    for split, own in by_split.items():
        counts = np.bincount(own, minlength=len(Label)).tolist()
        tallies[split].update({name: counts[label] for label, name in DROPPED.items()})
    tallies["train"]["held_out"] = int((by_split["train"] == Label.VALIDATION).sum())
    tallies["validation"]["read"] += int(in_split(by_split["train"], "validation").sum())
    return tallies


def _report(source: str, shards: Sequence[dict[str, Any]], tally: Counter[str]) -> SplitReport:
    lengths = np.zeros(max(len(shard["lengths"]) for shard in shards), np.int64)
    for shard in shards:
        lengths[: len(shard["lengths"])] += shard["lengths"]
    masks = [LossMaskReport(**shard["loss_mask"]) for shard in shards if "loss_mask" in shard]
    return SplitReport(
        source=source,
        kept=sum(shard["documents"] for shard in shards),
        bytes=sum(shard["bytes"] for shard in shards),
        tokens=sum(shard["tokens"] for shard in shards),
        longest=max(shard["longest"] for shard in shards),
        lengths=tuple(lengths.tolist()),
        loss_mask=add_loss_masks(masks) if masks else None,
        **tally,
    )


def _sources(
    names: Sequence[str], units: Sequence[WorkUnit], counts: Sequence[dict[str, Any]]
) -> tuple[SourceReport, ...]:
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
