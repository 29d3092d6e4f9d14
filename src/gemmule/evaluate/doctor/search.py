"""Does another reading of the weights predict text clearly better than the configured one?"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gemmule.errors import SourceError
from gemmule.evaluate.doctor.model import Answer, ModelUnderTest
from gemmule.evaluate.doctor.text import Documents, Losses, Text, read_texts, token_losses, unigram_loss
from gemmule.evaluate.doctor.variants import Reading, Variant, variants

MARGIN = 0.005  # nats per token that a variant must gain
SIGNIFICANCE = 5.0  # standard errors that the gain must be away from zero
_CHUNK = 32  # consecutive tokens whose losses are one observation, as neighbors depend on each other
_LENGTHS = (128, 256, 512, 1024, 2048)  # of pieces of text, in tokens
# Pieces of text, up to so many tokens of the start of each, that tell whether a variant is much worse.
_SCREENED_PIECES, _SCREENED_TOKENS = 10, 160
_MOST_FAULTS = 4

Progress = Callable[[str, int, int | None], None]


class Gain(NamedTuple):
    """By how much a variant predicts a text better: mean nats per token, and their standard error."""

    mean: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether the variant is better by the margin, and not by chance."""
        return self.mean >= max(MARGIN, SIGNIFICANCE * self.error)

    @property
    def is_clear_loss(self) -> bool:
        """Whether the variant is worse by so much that more text would not change it."""
        return self.mean <= -max(10 * MARGIN, SIGNIFICANCE * self.error)


class Tried(NamedTuple):
    """A variant, and what it gains over the reading that it was compared with."""

    variant: Variant
    gain: Gain


class Judged(NamedTuple):
    """How a model predicts a text that is cut into pieces, and which variants predict it better."""

    text: Text
    pieces: Documents
    loss: float
    unigram: float
    faults: tuple[Tried, ...] = ()
    tried: tuple[Tried, ...] = ()
    untestable: tuple[Variant, ...] = ()

    @property
    def longest(self) -> int:
        """The tokens of the longest piece."""
        return max(map(len, self.pieces))

    @property
    def beats_unigram(self) -> bool:
        """Whether the model predicts the text better than a unigram model."""
        return self.loss < self.unigram


def paired_gain(configured: Losses, variant: Losses) -> Gain:
    """Return how much lower a variant's losses are, with the standard error over chunks of consecutive tokens."""
    chunks = [
        (one - other)[start : start + _CHUNK]
        for one, other in zip(configured, variant, strict=True)
        for start in range(0, len(one), _CHUNK)
    ]
    sums, sizes = np.array([chunk.sum() for chunk in chunks]), np.array([len(chunk) for chunk in chunks])
    mean = float(sums.sum() / sizes.sum())
    if len(chunks) < 2 or not math.isfinite(mean):
        return Gain(mean if math.isfinite(mean) else -math.inf, math.inf)
    # The error of a ratio of sums, as chunks at the ends of pieces are shorter.
    deviations = sums - mean * sizes
    return Gain(mean, math.sqrt(float(deviations @ deviations) * len(chunks) / (len(chunks) - 1)) / sizes.sum())


def judge(test: ModelUnderTest, progress: Progress) -> list[Judged]:
    """Measure the model on each text, and search for faults on the one that it predicts best; that one comes first.

    Where the model predicts none better than a unigram model, faults are searched on each until some explain it.
    Raises SourceError where there is no text of two tokens.
    """
    texts = [text for text in read_texts(test) if text.pieces(_LENGTHS[-1])]
    if not texts:
        raise SourceError("--data: there is no text to predict")
    judged = []
    for number, text in enumerate(texts):
        progress(f"predicting {text.name}", number, len(texts))
        judged.append(_measure(test, text))
    judged.sort(key=lambda each: each.loss - each.unigram if math.isfinite(each.loss) else math.inf)
    for number, each in enumerate(judged):
        if math.isfinite(each.loss):
            searched = _search(test, each, progress)
            if searched.faults or searched.beats_unigram:
                return [searched, *judged[:number], *judged[number + 1 :]]
    return judged


def _measure(test: ModelUnderTest, text: Text) -> Judged:
    """Measure the loss on the longest pieces that the model predicts as well as shorter ones.

    So a small model that never saw long sequences is not judged by them.
    """
    longest = max(2, min(max(map(len, text.documents)), test.config.max_position_embeddings - 1))
    measured = []
    for length in sorted({min(length, longest) for length in _LENGTHS}):
        pieces = text.pieces(length)
        measured.append((_mean(_losses(test, pieces, _configured(test))), pieces))
    least = min((loss for loss, _ in measured if math.isfinite(loss)), default=math.inf)
    loss, pieces = next((each for each in reversed(measured) if each[0] <= least + MARGIN), measured[0])
    return Judged(text, pieces, loss, unigram_loss(pieces, test.config.vocab_size))


def _configured(test: ModelUnderTest) -> Reading:
    return Reading(test.config, test.tokenizer.adds_bos)


def _losses(test: ModelUnderTest, pieces: Documents, reading: Reading) -> Losses:
    return token_losses(test.model, test.tokenizer.bos_id, pieces, reading)


def _mean(losses: Losses) -> float:
    return float(np.concatenate(losses).mean())


def _search(test: ModelUnderTest, judged: Judged, progress: Progress) -> Judged:
    """Apply the best variant, again and again, while one is clearly better than what was applied so far.

    So a second fault is found beside the first, and what is only a side effect of one is not blamed. What does not
    lead to a model that beats a unigram model explains nothing.
    """
    reading = _configured(test)
    # What makes a model worse than a unigram model is plain on little text.
    pieces = judged.pieces if judged.beats_unigram else _screening(judged.pieces)
    configured = _losses(test, pieces, reading)
    every = list(variants(test.config, test.tokenizer.adds_bos, test.tokenizer.bos_id is not None))
    left = [each for each in every if each.tokens_needed <= judged.longest]
    faults: list[Tried] = []
    first: list[Tried] = []
    while len(faults) < _MOST_FAULTS:
        tried: list[Tried] = []
        best: tuple[Tried, Losses] | None = None
        for number, variant in enumerate(left):
            progress(f"trying {variant.names[0]}: {variant.value}", number, len(left))
            gain, losses = _try(test, pieces, variant, reading, configured)
            tried.append(Tried(variant, gain))
            if gain.is_clear and losses is not None and (best is None or gain.mean > best[0].gain.mean):
                best = tried[-1], losses
        first = first or tried
        if best is None:
            break
        faults.append(best[0])
        configured, reading = best[1], best[0].variant.change(reading)
        left = [each for each in left if not set(each.names) & set(best[0].variant.names)]
    explained = tuple(faults) if _mean(configured) < judged.unigram else ()
    return judged._replace(
        faults=explained,
        tried=tuple(first),
        untestable=tuple(each for each in every if each.tokens_needed > judged.longest),
    )


def _try(
    test: ModelUnderTest, pieces: Documents, variant: Variant, reading: Reading, configured: Losses
) -> tuple[Gain, Losses | None]:
    """Return what a variant gains; where the start of the text shows that it is much worse, no more is read."""
    changed = variant.change(reading)
    if variant.tokens_needed <= _SCREENED_TOKENS:
        starts = _screening(pieces)
        screened = [each[: len(start) - 1] for each, start in zip(configured, starts, strict=False)]
        gain = paired_gain(screened, _losses(test, starts, changed))
        if gain.is_clear_loss or not math.isfinite(gain.mean):
            return gain, None
    losses = _losses(test, pieces, changed)
    return paired_gain(configured, losses), losses


def _screening(pieces: Documents) -> Documents:
    return [piece[:_SCREENED_TOKENS] for piece in pieces[:_SCREENED_PIECES]]


def loss_answer(judged: list[Judged]) -> Answer:
    """Return whether some text is predicted better than by a unigram model, and by how much."""
    sentences = [_describe(each) for each in judged]
    if any(each.beats_unigram for each in judged):
        return "passed", "; ".join(sentences)
    advice = "the weights are noise, the config is wrong, or the text is not of the kind it was trained on (see --data)"
    return "failed", f"no better than a unigram model: {'; '.join(sentences)}; {advice}"


def _describe(judged: Judged) -> str:
    sentence = f"{judged.loss:.3f} nats per token of {judged.text.name}"
    if not math.isfinite(judged.loss):
        return sentence
    difference, word = abs(judged.loss - judged.unigram), "better" if judged.beats_unigram else "worse"
    return f"{sentence}, {difference:.3f} {word} than a unigram model ({judged.unigram:.3f})"


def variant_answer(name: str, judged: Judged) -> Answer:
    """Return whether a variant of the named key or tensors predicts the text clearly better."""
    for fault in judged.faults:
        if name in fault.variant.names:
            better = f"predicts {judged.text.name} better, by {fault.gain.mean:.4f} nats per token"
            errors = f" ({fault.gain.mean / fault.gain.error:.0f} standard errors)" if fault.gain.error else ""
            return "failed", f"{fault.variant.claim} {better}{errors}"
    if not judged.faults and not judged.beats_unigram:
        return "skipped", "not testable: the model predicts no text better than a unigram model"
    tried = [each for each in judged.tried if name in each.variant.names]
    untestable = [each.value for each in judged.untestable if name in each.names]
    limit = f"{' or '.join(untestable)}: not testable with this text, whose longest piece has {judged.longest} tokens"
    if not tried:
        return "skipped", limit if untestable else "no layer of the model uses it"
    closest = max(tried, key=lambda each: each.gain.mean)
    mean = closest.gain.mean
    difference = f"{abs(mean):.4f} nats per token {'worse' if mean <= 0 else 'better, not clearly'}"
    if (
        any(name in fault.variant.names or fault.variant is closest.variant for fault in judged.faults)
        or mean >= MARGIN
    ):
        return "passed", f"nothing better once {_names(judged)} is corrected"
    return "passed", f"closest variant {closest.variant.value}: {difference}" + (f"; {limit}" if untestable else "")


def _names(judged: Judged) -> str:
    return " and ".join(dict.fromkeys(name for fault in judged.faults for name in fault.variant.names))
