"""Memorization: how much of generated text occurs in the training text, beside as much held-out text as a yardstick.

New text of the same kind shares spans of words with the training text, too: a model that copies no more than that has
memorized nothing that this finds. Generated texts are the model's own distribution (temperature 1), so that a perfect
model has the figures of held-out text.
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from gemmule.data.corpus import Corpus
from gemmule.data.dataset import Dataset, run_dataset
from gemmule.data.report import counted
from gemmule.errors import DatasetError
from gemmule.evaluate.intervals import FEWEST, Difference, paired_difference
from gemmule.evaluate.overlap import (
    NGRAM,
    SHORTEST,
    Copied,
    CopiedSpans,
    Spans,
    TrainingText,
    Vocabulary,
    search,
    words_of,
)
from gemmule.evaluate.results import keep
from gemmule.evaluate.stories import Progress, Suite, tell_suite
from gemmule.model.gemma3 import Gemma3
from gemmule.run_folder import RunFolder
from gemmule.tokenizer import Tokenizer
from gemmule.train.opening import load_with_path

_TEXTS = 20  # that are generated
_LONGEST = 250  # tokens of one


class CopiedText(NamedTuple):
    """How much of several texts occurs in the training text."""

    words: int
    ngrams: int  # spans of 8 words
    copied_ngrams: int  # those that occur there
    longest_span: int  # words of the longest span that occurs there, 0 for below 5
    span: str  # that span, in lower case and without punctuation

    @property
    def share(self) -> float | None:
        """The share of the 8-grams that occurs in the training text; None where there is none."""
        return self.copied_ngrams / self.ngrams if self.ngrams else None


class Memorization(NamedTuple):
    """What generated texts and held-out texts of the same lengths have in common with the training text."""

    texts: int  # that were generated
    generated: CopiedText
    held_out: CopiedText
    difference: Difference | None  # of the shares, generated - held out; None where a side has no 8-gram
    searched: float  # the share of the training documents that was searched

    @property
    def more_than_held_out(self) -> bool | None:
        """Whether the share of generated text is the larger one, as far as its interval tells; None without one."""
        if self.difference is None or self.difference.interval is None:
            return None
        return self.difference.significant and self.difference.difference > 0

    def figures(self) -> dict[str, Any]:
        """Return the figures as evaluation.json has them (docs/evaluate.md)."""
        return {
            "texts": self.texts,
            "ngram": NGRAM,
            "searched": self.searched,
            "generated": {"share": self.generated.share, **self.generated._asdict()},
            "held_out": {"share": self.held_out.share, **self.held_out._asdict()},
            "difference": self.difference and self.difference._asdict(),
            "more_than_held_out": self.more_than_held_out,
        }

    def __str__(self) -> str:
        if not self.texts:
            return "memorization: not measured, for the tokenizer begins no text with bos, from which to generate one"
        texts = counted(self.texts, "generated text")
        if self.generated.share is None:
            return f"memorization: not measured, for {texts} without {NGRAM} words in a row have nothing to compare"
        yardstick = "held-out text is too short to compare with"
        if self.held_out.share is not None:
            yardstick = f"{self.held_out.share:.1%} of those in held-out text"
        searched = "" if self.searched == 1 else f" (its first {self.searched:.0%} were searched)"
        return (
            f"memorization: {self.generated.share:.1%} of the {NGRAM}-grams in {texts} occur in the training text"
            f"{searched} ({yardstick}); the longest copied span has {_words(self.generated.longest_span)} words "
            f"({_words(self.held_out.longest_span)} in held-out text){self._verdict()}"
        )

    def _verdict(self) -> str:
        if self.difference is None:
            return ""
        if self.difference.interval is None:
            return (
                f"; whether that is more than in held-out text is not known: it needs {FEWEST} texts of {NGRAM} words"
            )
        if not self.more_than_held_out:
            return "; the share is not above that of held-out text"
        low, high = (100 * bound for bound in self.difference.interval)
        return f"; the share is {low:.1f} to {high:.1f} percentage points above that of held-out text"


def _words(count: int) -> str:
    return str(count) if count else f"fewer than {SHORTEST}"


def memorization_of_run(run: RunFolder, progress: Progress = lambda *_: None, device: str = "auto") -> Memorization:
    """Measure the memorization of a run's final model, and keep it in the run's evaluation.json.

    DatasetError where the training data is not at hand, ModelError where the model is not.
    """
    dataset = training_data(run)
    model, tokenizer, _ = load_with_path(run.model, device)
    comparison = Comparison(generate_texts(model, tokenizer, run, progress), dataset)
    found = comparison.search(progress)
    keep(run, {"kind": "memorization", "model": run.model.name}, {"memorization": found.figures()})
    return found


def training_data(run: RunFolder) -> Dataset:
    """Open the dataset that a run is trained on; DatasetError, in one sentence, where it is not at hand."""
    dataset = run_dataset(run)
    if dataset is None:
        raise DatasetError(
            f"memorization: not measured, for the training data of {run.path} is not at hand (neither {run.data} nor a "
            "prepared dataset that its recipe names)"
        )
    return dataset


def generate_texts(
    model: Gemma3, tokenizer: Tokenizer, run: RunFolder, progress: Progress = lambda *_: None
) -> list[str]:
    """Generate 20 texts from their beginning on, each up to 250 tokens or the sequence length of training.

    None where the tokenizer begins no text with bos.
    """
    if not tokenizer.encode(""):
        return []
    limit = min(_LONGEST, run.trained_context() or _LONGEST)
    suite = Suite(prompts=("",), count=_TEXTS, max_new_tokens=limit)
    stories = tell_suite(model, tokenizer, suite, lambda _, done, total: progress("generating texts", done, total))
    return [story.text for story in stories]


class Comparison:
    """Generated texts, and as much held-out text, to be looked for in the training text."""

    def __init__(self, texts: Sequence[str], dataset: Dataset, vocabulary: Vocabulary | None = None) -> None:
        """Choose the held-out text; `vocabulary` is that of other spans that are looked for in the same search."""
        self._training = TrainingText(dataset.train, dataset.tokenizer)
        self._vocabulary = vocabulary or Vocabulary()
        held_out = _held_out_texts([len(words_of(text)) for text in texts], dataset)
        self.texts = [*texts, *(text for _, text in held_out)]  # the generated ones first
        owners = [*range(len(texts)), *(index for index, _ in held_out)]
        self._owners = np.array(owners, dtype=np.int64)  # the index of the generated text, of held-out texts as well
        self._generated = len(texts)
        self._spans = CopiedSpans(self.texts, self._vocabulary)

    def search(self, progress: Progress = lambda *_: None, *others: Spans) -> Memorization:
        """Search the training text in one pass, for other spans as well, and return what was found."""
        search(self._training.read(progress), self._vocabulary, self._spans, *others)
        found = self._spans.found()
        parts = [slice(0, self._generated), slice(self._generated, None)]
        counts = np.array([[each.copied_ngrams, each.ngrams] for each in found], dtype=np.float64).reshape(-1, 2)
        sums = np.zeros((2, self._generated, 2))  # of each generated text, and of the held-out text beside it
        for part, own in zip(parts, sums, strict=True):
            np.add.at(own, self._owners[part], counts[part])
        sums = sums[:, (sums[:, :, 1] > 0).all(axis=0)]
        difference = None
        if sums.shape[1]:
            (ours, our_sizes), (theirs, their_sizes) = (own.T for own in sums)
            difference = paired_difference((ours, theirs), (our_sizes, their_sizes))
        generated, held_out = (self._sum(found[part], self.texts[part]) for part in parts)
        return Memorization(self._generated, generated, held_out, difference, self._training.share)

    def copied(self) -> list[Copied]:
        """Return what was found of each generated text."""
        return self._spans.found()[: self._generated]

    def _sum(self, found: Sequence[Copied], texts: Sequence[str]) -> CopiedText:
        words = [words_of(text) for text in texts]
        best = max(range(len(found)), key=lambda number: found[number].longest, default=None)
        span = "" if best is None else words[best][found[best].start :][: found[best].longest]
        return CopiedText(
            sum(map(len, words)),
            sum(each.ngrams for each in found),
            sum(each.copied_ngrams for each in found),
            max((each.longest for each in found), default=0),
            " ".join(span),
        )


def _held_out_texts(lengths: Sequence[int], dataset: Dataset) -> list[tuple[int, str]]:
    """Return texts of so many words of validation documents, each with the index of its length.

    The documents are from all over the split, since those of one source lie together, one for each text where all are
    long enough. One that is too short is followed by another, as a text apart; what is left of long ones is used last.
    Where the whole split has fewer words, all texts are shorter in proportion.
    """
    corpus, needed = dataset.validation, sum(lengths)
    step = max(1, corpus.documents // max(1, len(lengths)))
    documents, total = deque[list[str]](), 0
    for number in chain.from_iterable(range(first, corpus.documents, step) for first in range(step)):
        documents.append(words_of(_text(corpus, dataset.tokenizer, number)))
        total += len(documents[-1])
        if total >= needed and len(documents) >= len(lengths):
            break
    found = []
    for index, length in enumerate(lengths):
        left = length * min(total, needed) // max(1, needed)
        while left:
            words = documents.popleft()
            found.append((index, " ".join(words[:left])))
            if len(words) > left:
                documents.append(words[left:])
            left -= min(left, len(words))
    return found


def _text(corpus: Corpus, tokenizer: Tokenizer, document: int) -> str:
    return tokenizer.decode(corpus.read(document, 0, int(corpus.lengths[document])).tolist())
