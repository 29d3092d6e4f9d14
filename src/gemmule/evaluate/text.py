"""How well a model predicts a text, document by document."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gemmule.compiler import uncompiled
from gemmule.data.batches import Batch, WholeDocuments
from gemmule.data.clean import clean_document
from gemmule.data.corpus import Corpus
from gemmule.data.dataset import open_dataset
from gemmule.data.encode import EncodedText, encode_texts
from gemmule.data.intermediate import StoredText
from gemmule.data.report import counted, describe_tally
from gemmule.data.settings import DataSettings
from gemmule.data.shards import Tokens
from gemmule.data.sources import read_sources
from gemmule.errors import DatasetError, RecipeError, SourceError
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime, choose_precision
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.train.loss import summed_loss
from gemmule.train.validation import Score, score

log = logging.getLogger(__name__)

_LONGEST_ROW = 2048  # tokens, where nobody says otherwise: attention takes time with the square
_TOKENS = 32_768  # of a batch, where nobody says otherwise
_PORTION = 1 << 18  # tokens of text that are packed into rows together
_CHUNK = 512  # tokens of a longer row that are read at once, so that memory does not grow with the square

Progress = Callable[[str, int, int | None], None]


def score_text(
    model: Gemma3,
    tokenizer: Tokenizer,
    settings: DataSettings,
    documents: int | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Score the documents of `settings.train` (all, or the first so many), each on its own.

    Documents are cleaned as for training, and what is dropped is counted and reported. Some hundred thousand tokens are
    in memory at a time; a CPU computes in the dtype of the weights. Documents longer than `context` (by default the
    longest one, up to 2048) are cut into pieces. A batch has `batch_size` rows, by default as many as make 32,768
    tokens.

    Returns loss in nats per token, bits_per_byte (None where the tokenizer changes the text), perplexity, the tokens,
    bytes and documents they are means of, and how many documents were dropped. Raises SourceError where there is
    nothing to predict, RecipeError where the model cannot read `context` tokens.
    """
    tally: Counter[str] = Counter()
    texts = islice(clean_texts(settings, tally), documents)
    total, changed = _Total(), 0

    def count(batch: int) -> None:
        progress("predicting", batch, None)

    for portion in _portions(encode_texts(texts, tokenizer)):
        rows = _rows(model, tokenizer, EncodedDocuments(portion), None, context, batch_size)
        total = total.plus(rows, _score(model, rows, count, total.batches))
        changed += sum(not document.restored for document in portion)
    dropped = describe_tally(tally)
    if not total.documents:
        raise SourceError(f"{', '.join(settings.train)}: there is no text to predict ({dropped or 'none there'})")
    if dropped:
        log.info(f"of {counted(tally['read'], 'document')}, {dropped}")
    return {**_figures(total, changed), "dropped": tally["read"] - total.documents}


def score_dataset(
    model: Gemma3,
    tokenizer: Tokenizer,
    folder: Path,
    documents: int | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Score the validation documents of a prepared dataset (all, or the first so many), as `score_text` does.

    Raises DatasetError where it is of another tokenizer than the model's.
    """
    dataset = open_dataset(folder)
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        advice = f"name the text that it was made from ({dataset.report.validation.source})"
        raise DatasetError(f"{folder}: was prepared with another tokenizer than the model's; {advice}")
    rows = _rows(model, tokenizer, dataset.validation, documents, context, batch_size)
    nats = _score(model, rows, lambda batch: progress("predicting", batch, len(rows.batches)), 0)
    return _figures(_Total().plus(rows, nats), 0 if dataset.lossless else None)


class _Rows(NamedTuple):
    """Documents packed into rows of a sequence length."""

    batches: WholeDocuments
    length: int


class _Total(NamedTuple):
    """Sums over the documents scored so far."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    batches: int = 0

    def plus(self, rows: _Rows, nats: float) -> "_Total":
        """Return the sums with more documents, whose tokens cost so many nats."""
        scored = rows.batches
        return _Total(
            self.nats + nats,
            self.tokens + scored.targets,
            self.bytes + scored.bytes,
            self.documents + scored.documents,
            self.batches + len(scored),
        )


class EncodedDocuments(Corpus):
    """A corpus of documents in memory."""

    def __init__(self, documents: Sequence[EncodedText]) -> None:
        self.shards = ()
        self.documents = len(documents)
        self.lengths = np.array([len(document.ids) for document in documents], dtype=np.int32)
        self.tokens = int(self.lengths.sum())
        self.bytes = sum(document.predicted_bytes for document in documents)
        self._encoded = documents

    def read(self, document: int, start: int, stop: int) -> Tokens:
        """Return tokens start to stop of a document."""
        return np.array(self._encoded[document].ids[start:stop], dtype=np.uint32)

    def text_bytes(self, document: int) -> int:
        """Return the UTF-8 bytes that a document's tokens after its first stand for."""
        return self._encoded[document].predicted_bytes

    def first_bytes(self, documents: int) -> int:
        """Return the sum of `text_bytes` over the first so many documents."""
        return sum(document.predicted_bytes for document in self._encoded[:documents])


def _portions(documents: Iterator[EncodedText]) -> Iterator[list[EncodedText]]:
    """Yield documents in lists of about a number of tokens that fills several batches."""
    portion: list[EncodedText] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += len(document.ids)
        if size >= _PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _rows(
    model: Gemma3,
    tokenizer: Tokenizer,
    corpus: Corpus,
    documents: int | None,
    context: int | None,
    batch_size: int | None,
) -> _Rows:
    furthest = model.config.max_position_embeddings
    if context is not None and context > furthest:
        advice = f"the model reads at most {furthest} tokens (max_position_embeddings)"
        raise RecipeError(str(Problem("--context", context, advice)))
    length = max(1, min(context or min(_LONGEST_ROW, furthest), int(corpus.lengths[:documents].max()) - 1))
    size = batch_size or max(1, _TOKENS // length)
    return _Rows(WholeDocuments(corpus, length, size, tokenizer.pad_id, limit_documents=documents), length)


def _score(model: Gemma3, rows: _Rows, progress: Callable[[int], None], before: int) -> float:
    """Return the nats of all targets; progress counts on from the batches before."""

    def watched() -> Iterator[Batch]:
        for number, batch in enumerate(rows.batches):
            progress(before + number)
            yield batch

    device = model.embedding.weight.device
    runtime = Runtime(device, "fp32" if device.type == "cpu" else choose_precision("auto", device))
    measure = score if rows.length <= _LONGEST_ROW else _score_in_chunks
    return measure(model, watched(), None, runtime).nats


def _figures(total: _Total, changed: int | None) -> dict[str, Any]:
    """Return the means; `changed` is how many documents the tokenizer changes, None where that is not known."""
    if changed != 0:
        count = "documents" if changed is None else f"{changed:,} of {counted(total.documents, 'document')}"
        log.info(
            f"no bits per byte: the tokenizer changes {count}, so that its tokens stand for less than the text "
            "(unknown words, capitals, accents ...)"
        )
    result = Score(total.nats, total.tokens, total.bytes if changed == 0 else None)
    return {**result.figures(), "tokens": total.tokens, "bytes": total.bytes, "documents": total.documents}


@torch.no_grad()
def _score_in_chunks(model: Gemma3, batches: Iterator[Batch], text_bytes: int | None, runtime: Runtime) -> Score:
    """Score rows that are too long to be read at once, through a cache, which gives the same."""
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for whole in batches:
        batch, cache = whole.to(runtime.device), Cache(model.config)
        assert batch.documents is not None
        for start in range(0, batch.tokens.shape[1], _CHUNK):
            inputs, targets, documents = (
                part[:, start : start + _CHUNK].contiguous() for part in (batch.tokens, batch.targets, batch.documents)
            )
            with uncompiled(), runtime.autocast():
                loss = model(inputs, documents=documents, cache=cache, output_head=summed_loss(targets))
            nats += loss.item()
        tokens += batch.num_targets
    model.train(was_training)
    return Score(nats, tokens, text_bytes)


def clean_texts(settings: DataSettings, tally: Counter[str]) -> Iterator[StoredText]:
    """Yield the documents of `settings.train`, cleaned as for training; what is dropped is counted in the tally."""
    for document in read_sources(settings.train, settings, "validation"):
        if clean := clean_document(document, settings, tally):
            yield StoredText(clean.text, len(clean.text.encode()))
