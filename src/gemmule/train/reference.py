"""The reference of preference optimization: its log-probabilities are computed once, and stored with the data."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gemmule.compiler import uncompiled
from gemmule.data.corpus import Corpus
from gemmule.data.dataset import Dataset
from gemmule.data.packing import Piece, rows_of_pieces
from gemmule.errors import DatasetError
from gemmule.files import as_output_error, atomic_write
from gemmule.formats.adapter import weights_sha256
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime
from gemmule.train.log_probabilities import target_log_probabilities

log = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 2**14

LogProbabilities = npt.NDArray[np.float32]  # of the reply of each document, in nats


class Reference(NamedTuple):
    """What a reference gives for the documents of a dataset."""

    fingerprint: str
    train: LogProbabilities
    validation: LogProbabilities


def open_reference(
    model: Gemma3 | None,
    dataset: Dataset,
    folder: Path,
    runtime: Runtime,
    on_progress: Callable[[str, int, int | None], None],
) -> Reference:
    """Return the log-probabilities that a model gives to a dataset, from its folder or computed; None on other ranks.

    They are of the precision that the run trains in, so that the first step finds the policy equal to the reference.
    """
    own = None if model is None else f"{weights_sha256(model)[:16]}-{runtime.precision}"
    fingerprint = runtime.world.broadcast(own)
    assert fingerprint is not None
    train, validation = (
        stored_or_computed(reference_file(folder, fingerprint, split), corpus, model, runtime, on_progress)
        for split, corpus in (("train", dataset.train), ("validation", dataset.validation))
    )
    return Reference(fingerprint, train, validation)


def reference_file(folder: Path, fingerprint: str, split: str) -> Path:
    """Return the file in a dataset's folder with the log-probabilities of a reference for a split."""
    return folder / f"reference-{fingerprint}-{split}.npy"


def stored_or_computed(
    file: Path,
    corpus: Corpus,
    model: Gemma3 | None,
    runtime: Runtime,
    on_progress: Callable[[str, int, int | None], None],
) -> LogProbabilities:
    """Read log-probabilities from a file, or compute and write them; every rank calls it, the main one computes."""
    world = runtime.world
    if model is not None and not file.exists():
        log.info(f"the log-probabilities of the reference are computed once, and kept in {file}")
        found = log_probabilities(model, corpus, runtime, on_progress)
        with as_output_error(file), atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, found)
    world.barrier()
    try:
        stored: LogProbabilities = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{file}: cannot be read ({error}); remove it, and a run computes it anew") from None
    if stored.shape != (corpus.documents,) or stored.dtype != np.float32 or not np.isfinite(stored).all():
        raise DatasetError(f"{file}: does not fit the data; remove it, and a run computes it anew")
    return stored


@torch.no_grad()
def log_probabilities(
    model: Gemma3, corpus: Corpus, runtime: Runtime, on_progress: Callable[[str, int, int | None], None]
) -> LogProbabilities:
    """Return the summed log-probability in nats of the trained tokens of each document, which it sees alone."""
    found, done = np.zeros(corpus.documents, np.float32), 0
    model = model.to(runtime.device).eval()
    for documents in _similar_lengths(corpus):
        pieces = [[Piece(number, 0, 0, int(corpus.lengths[number]) - 1)] for number in documents.tolist()]
        rows = rows_of_pieces(corpus, pieces, int(corpus.lengths[documents].max()) - 1, pad_id=0)
        batch = rows.to(runtime.device)  # without its documents: no token attends to the padding, which is after it
        with uncompiled(), runtime.autocast():
            logs = model(batch.tokens, output_head=target_log_probabilities(batch.targets))
        found[documents] = logs.sum(dim=1).cpu().numpy()
        done += len(documents)
        on_progress("scoring by the reference (replies)", done, corpus.documents)
    return found


def _similar_lengths(corpus: Corpus) -> Iterator[npt.NDArray[np.int64]]:
    """Yield documents in groups of similar length, each of about so many tokens with its padding."""
    order, group = np.argsort(corpus.lengths, kind="stable"), 0
    for number in range(len(order)):
        if (number + 1 - group) * int(corpus.lengths[order[number]]) > _TOKENS_AT_ONCE and number > group:
            yield order[group:number]
            group = number
    yield order[group:]
