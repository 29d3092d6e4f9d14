"""How well a model predicts a text, document by document."""

import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.data.batches import Batch
from gemmule.data.clean import clean_document
from gemmule.data.corpus import Corpus
from gemmule.data.dataset import open_dataset
from gemmule.data.encode import EncodedText, encode_texts
from gemmule.data.intermediate import StoredText
from gemmule.data.packing import WholeDocuments
from gemmule.data.report import counted, describe_tally
from gemmule.data.settings import DataSettings
from gemmule.data.shards import Tokens
from gemmule.data.sources import Split, read_sources
from gemmule.errors import DatasetError, RecipeError, SourceError
from gemmule.evaluate.log_probabilities import LONGEST_ROW, score_batches
from gemmule.model.gemma3 import Gemma3
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.train.validation import Score

log = logging.getLogger(__name__)

_TOKENS, _TOKENS_ON_CPU = 32_768, 8192  # of a batch, where nobody says otherwise: what the caches of a CPU hold
_SHORT = 512  # documents up to this length are packed into rows half as long again, of which less is padding
_PORTION = 1 << 18  # tokens of text that are packed into rows together

Progress = Callable[[str, int, int | None], None]
Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Window(NamedTuple):
    """How documents are laid before the model."""

    context: int | None = None  # sequence length; None: the longest document, up to 2048 tokens
    stride: int | None = None  # how far the window moves in longer documents; None: by its length, so they are cut
    batch_size: int | None = None  # rows per batch; None: as many as make 32,768 tokens, on a CPU 8,192

    def of(self, model: Gemma3) -> "Window":
        """Return the window with its context; RecipeError where the model cannot read it, or the stride leaves gaps."""
        furthest = model.config.max_position_embeddings
        context = self.context or min(LONGEST_ROW, furthest)
        if context > furthest:
            advice = f"the model reads at most {furthest} tokens (max_position_embeddings)"
            raise RecipeError(str(Problem("--context", context, advice)))
        if self.stride is not None and self.stride > context:
            advice = f"must be at most the context, {context}; else tokens are left out"
            raise RecipeError(str(Problem("--stride", self.stride, advice)))
        return self._replace(context=context)


WHOLE = Window()


class TextScores(NamedTuple):
    """What each document of a text costs a model; all arrays are (n,)."""

    nats: Numbers  # of all its tokens but the first, the end of the document included
    tokens: Numbers  # as many
    bytes: Numbers  # of UTF-8 text that they stand for
    end_nats: Numbers  # of the end-of-document token alone; NaN where there is none
    window: Window
    lossless: bool = True  # whether the tokenizer leaves the text as it is; where not, bytes mean nothing
    dropped: int = 0  # documents that cleaning dropped

    def figures(self, kept: Mask | None = None) -> dict[str, Any]:
        """Return the means over the documents, or over those that are kept.

        loss in nats per token, bits_per_byte (None where the tokenizer changes the text), perplexity, and the tokens,
        bytes and documents that they are means of; `ends` has the number and the mean nats of the ends of documents,
        `without_ends` the means of all other tokens.
        """
        nats, tokens, size, end_nats = (part if kept is None else part[kept] for part in self[:4])
        count = int(np.isfinite(end_nats).sum())
        nats_of_ends = float(np.nansum(end_nats))
        rest = self._score(nats.sum() - nats_of_ends, tokens.sum() - count, size.sum())
        return {
            **self._score(nats.sum(), tokens.sum(), size.sum()).figures(),
            "tokens": int(tokens.sum()),
            "bytes": int(size.sum()),
            "documents": len(nats),
            "ends": {"count": count, "loss": nats_of_ends / count if count else None},
            "without_ends": {**rest.figures(), "tokens": rest.tokens} if rest.tokens else None,
        }

    def items(self) -> list[dict[str, Any]]:
        """Return the figures of each document."""
        rows = zip(*(part.tolist() for part in self[:4]), strict=True)
        return [
            {
                "nats": nats,
                "tokens": int(tokens),
                "bytes": int(size),
                "end_nats": end_nats if math.isfinite(end_nats) else None,
            }
            for nats, tokens, size, end_nats in rows
        ]

    def _score(self, nats: float, tokens: float, size: float) -> Score:
        return Score(float(nats), int(tokens), int(size) if self.lossless and size else None)


def score_text(
    model: Gemma3,
    tokenizer: Tokenizer,
    settings: DataSettings,
    documents: int | None = None,
    window: Window = WHOLE,
    progress: Progress = lambda *_: None,
    each_text: Callable[[str], None] | None = None,
) -> TextScores:
    """Score the documents of `settings.train` (all, or the first so many), each on its own.

    Documents are cleaned as for training, and what is dropped is counted and reported. Some hundred thousand tokens are
    in memory at a time, and four numbers per document; a CPU computes in fp32. `each_text` is called with the text of
    each document.

    Raises SourceError where there is nothing to predict, RecipeError where the model cannot read the window.
    """
    tally: Counter[str] = Counter()
    texts = islice(clean_texts(settings, tally), documents)
    scores = _score_texts(model, tokenizer, texts, window, progress, each_text)
    dropped = describe_tally(tally)
    if not len(scores.nats):
        raise SourceError(f"{', '.join(settings.train)}: there is no text to predict ({dropped or 'none there'})")
    if dropped:
        log.info(f"of {counted(tally['read'], 'document')}, {dropped}")
    return scores._replace(dropped=tally["read"] - len(scores.nats))


def score_dataset(
    model: Gemma3,
    tokenizer: Tokenizer,
    folder: Path,
    documents: int | None = None,
    window: Window = WHOLE,
    progress: Progress = lambda *_: None,
    each_text: Callable[[str], None] | None = None,
) -> TextScores:
    """Score the validation documents of a prepared dataset (all, or the first so many), as `score_text` does.

    Those of another tokenizer than the model's are decoded; DatasetError where that does not restore the text.
    """
    dataset = open_dataset(folder)
    corpus = dataset.validation
    texts = islice(_decoded(corpus, dataset.tokenizer), documents)
    if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        if not dataset.lossless:
            advice = f"name the text that it was made from ({dataset.report.validation.source})"
            raise DatasetError(
                f"{folder}: was prepared with a tokenizer that changes the text, not the model's; {advice}"
            )
        return _score_texts(model, tokenizer, texts, window, progress, each_text)
    if each_text:
        for stored in texts:
            each_text(stored.text)
    table = _Table(model, tokenizer, window)
    table.add(corpus, documents, progress)
    if not dataset.lossless:
        _say_changed("documents")
    return table.scores(dataset.lossless)


def _score_texts(
    model: Gemma3,
    tokenizer: Tokenizer,
    texts: Iterable[StoredText],
    window: Window,
    progress: Progress,
    each_text: Callable[[str], None] | None,
) -> TextScores:
    def watched() -> Iterator[StoredText]:
        for stored in texts:
            if each_text:
                each_text(stored.text)
            yield stored

    table, changed = _Table(model, tokenizer, window), 0
    for portion in _portions(encode_texts(watched(), tokenizer)):
        table.add(EncodedDocuments(portion), None, lambda label, batch, _: progress(label, batch, None))
        changed += sum(not document.restored for document in portion)
    if changed:
        _say_changed(f"{changed:,} of {counted(table.documents, 'document')}")
    return table.scores(not changed)


class _Table:
    """The scores of the documents so far, a column each."""

    def __init__(self, model: Gemma3, tokenizer: Tokenizer, window: Window) -> None:
        self._model, self._tokenizer, self._window = model, tokenizer, window.of(model)
        self._columns = tuple(array("d") for _ in range(4))
        self._batches = 0

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._columns[0])

    def add(self, corpus: Corpus, documents: int | None, progress: Progress) -> None:
        """Score the documents of a corpus, or its first ones; progress counts batches on from those before."""
        context, stride, batch_size = self._window
        assert context is not None
        longest = max(1, min(context, int(corpus.lengths[:documents].max()) - 1))
        furthest = self._model.config.max_position_embeddings
        row_length = min(longest * 3 // 2, furthest) if longest <= _SHORT else longest
        on_cpu = self._model.embedding.weight.device.type == "cpu"
        rows = WholeDocuments(
            corpus,
            longest,
            batch_size or max(1, (_TOKENS_ON_CPU if on_cpu else _TOKENS) // row_length),
            self._tokenizer.pad_id,
            limit_documents=documents,
            stride=stride and min(stride, longest),
            row_length=row_length,
        )

        def watched() -> Iterator[Batch]:
            for number, batch in enumerate(rows):
                progress("predicting", self._batches + number, len(rows))
                yield batch

        nats, end_nats = np.zeros(rows.documents), np.full(rows.documents, math.nan)
        for number, scores in enumerate(score_batches(self._model, watched())):
            pieces = rows.pieces(number)
            ends = np.cumsum([piece.stop - piece.first for piece in pieces])
            sums = np.add.reduceat(-scores.log_probabilities.astype(np.float64), ends - np.diff(ends, prepend=0))
            for piece, own, end in zip(pieces, sums.tolist(), ends.tolist(), strict=True):
                nats[piece.document] += own
                last = int(corpus.lengths[piece.document]) - 1
                if piece.stop == last and corpus.read(piece.document, last, last + 1)[0] == self._tokenizer.eos_id:
                    end_nats[piece.document] = -scores.log_probabilities[end - 1]
        self._batches += len(rows)
        numbers = range(rows.documents)
        tokens, sizes = corpus.lengths[: rows.documents] - 1, [corpus.text_bytes(number) for number in numbers]
        for column, more in zip(self._columns, (nats, tokens, sizes, end_nats), strict=True):
            column.extend(np.asarray(more, dtype=np.float64).tolist())

    def scores(self, lossless: bool) -> TextScores:
        """Return the scores of all documents."""
        nats, tokens, sizes, end_nats = (np.array(column) for column in self._columns)
        return TextScores(nats, tokens, sizes, end_nats, self._window, lossless)


def _say_changed(which: str) -> None:
    log.info(
        f"no bits per byte: the tokenizer changes {which}, so that its tokens stand for less than the text "
        "(unknown words, capitals, accents ...)"
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

    def read_mask(self, document: int, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return that all tokens of a document are scored."""
        return np.ones(min(stop, int(self.lengths[document])) - start, dtype=np.bool_)

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


def _decoded(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[StoredText]:
    """Yield the documents of a corpus as text."""
    for number in range(corpus.documents):
        text = tokenizer.decode(corpus.read(number, 0, int(corpus.lengths[number])).tolist())
        yield StoredText(text, len(text.encode()))


def clean_texts(settings: DataSettings, tally: Counter[str], split: Split = "validation") -> Iterator[StoredText]:
    """Yield the documents of `settings.train`, cleaned as for training; what is dropped is counted in the tally."""
    for document in read_sources(settings.train, settings, split):
        if clean := clean_document(document, settings, tally):
            yield StoredText(clean.text, len(clean.text.encode()))
