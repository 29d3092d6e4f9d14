"""The texts that a model is judged by: their tokens, the loss of each, and the loss of a unigram model."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gemmule.data.dataset import open_dataset, prepared_folder
from gemmule.evaluate.doctor.model import ModelUnderTest
from gemmule.evaluate.doctor.variants import Reading, applied
from gemmule.evaluate.text import clean_texts
from gemmule.model.gemma3 import Gemma3
from gemmule.storybook import stories
from gemmule.tokenizer import Tokenizer
from gemmule.train.loss import rows_at_once

_MOST_TOKENS, _FEWEST_TOKENS = 8192, 512
_OPERATIONS = 4e11  # of a forward pass over a text: some seconds on two cores
_BATCH_TOKENS = 4096
_STORIES_SEED = 7_000_003  # beyond the seeds of storybook:N, so that no training set holds these stories
_SEPARATE_DOCUMENTS = 400  # of a source, more than the tokens suffice for

Documents = list[list[int]]
Losses = list[npt.NDArray[np.float64]]


class Text(NamedTuple):
    """A text as token ids, document by document, without bos and eos."""

    name: str
    documents: Documents

    def pieces(self, length: int) -> Documents:
        """Cut documents into pieces of at most `length` tokens, of which each has at least two."""
        cut = [ids[start : start + length] for ids in self.documents for start in range(0, len(ids), length)]
        return [piece for piece in cut if len(piece) > 1]


def read_texts(test: ModelUnderTest) -> list[Text]:
    """Return the text that was given, or else the built-in texts and the validation documents of the dataset."""
    given = prepared_folder(test.data) if test.data is not None else test.dataset
    if given is not None:
        found = [Text(f"the validation documents of {given}", _limited(_validation_documents(test, given), test))]
        if test.data is not None:
            return found
    elif test.data is not None:
        documents = (text.text for text in clean_texts(test.data, Counter()))
        return [_encoded(", ".join(test.data.train), documents, test)]
    else:
        found = []
    english = files("gemmule.evaluate.doctor").joinpath("text.txt").read_text(encoding="utf-8")
    return [
        _encoded("the built-in English text", [english.strip()], test),
        _encoded("the built-in stories", (story.text for story in stories(_SEPARATE_DOCUMENTS, _STORIES_SEED)), test),
        *found,
    ]


def _encoded(name: str, texts: Iterable[str], test: ModelUnderTest) -> Text:
    encoded = (test.tokenizer.encode(text) for text in islice(texts, _SEPARATE_DOCUMENTS))
    return Text(name, _limited((_without_specials(ids, test.tokenizer) for ids in encoded), test))


def _validation_documents(test: ModelUnderTest, folder: Path) -> Iterator[list[int]]:
    corpus = open_dataset(folder, verify=False).validation
    for number in range(min(corpus.documents, _SEPARATE_DOCUMENTS)):
        yield _without_specials(corpus.read(number, 0, int(corpus.lengths[number])).tolist(), test.tokenizer)


def _without_specials(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return [token for token in ids if token not in (tokenizer.bos_id, tokenizer.eos_id)]


def _limited(documents: Iterable[list[int]], test: ModelUnderTest) -> Documents:
    """Take as many tokens as a forward pass of some seconds reads."""
    size = sum(parameter.numel() for parameter in test.model.parameters())
    left = int(min(_MOST_TOKENS, max(_FEWEST_TOKENS, _OPERATIONS / (2 * size))))
    taken: Documents = []
    for document in documents:
        if left < 2:
            break
        taken.append(document[:left])
        left -= len(taken[-1])
    return taken


def unigram_loss(pieces: Documents, vocab_size: int) -> float:
    """Return the nats per token of a unigram model that is fitted to the text, leaving out the token it predicts.

    Frequencies are smoothed as by Witten and Bell: with N tokens of T kinds, a token that occurs c times has
    probability (c - 1 + T / V) / (N - 1 + T).
    """
    counts = Counter(token for piece in pieces for token in piece)
    total, kinds = counts.total(), len(counts)
    predicted = [token for piece in pieces for token in piece[1:]]
    nats = (-math.log((counts[token] - 1 + kinds / vocab_size) / (total - 1 + kinds)) for token in predicted)
    return sum(nats) / len(predicted)


@torch.no_grad()
def token_losses(model: Gemma3, bos: int | None, pieces: Documents, reading: Reading) -> Losses:
    """Return the loss in nats of every token of each piece but its first, under a reading of the model."""
    device = model.embedding.weight.device
    prefix = [bos] if reading.bos and bos is not None else []
    order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))
    found: Losses = [np.empty(0)] * len(pieces)
    with applied(model, reading):
        for batch in _batches(order, lambda number: len(pieces[number])):
            length = len(pieces[batch[-1]])
            # Padding comes last, where a causal model's earlier predictions do not depend on it.
            rows = [prefix + pieces[number] + [0] * (length - len(pieces[number])) for number in batch]
            tokens = torch.tensor(rows, dtype=torch.long, device=device)
            losses = model(tokens[:, :-1], output_head=_losses_of(tokens[:, 1:]))[:, len(prefix) :]
            for row, number in zip(losses.double().cpu().numpy(), batch, strict=True):
                found[number] = row[: len(pieces[number]) - 1]
    return found


def _batches(order: list[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * size(number) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _losses_of(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a output_head of the loss of each target (B,T), which never holds the logits of all."""

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        rows = rows_at_once(len(vocabulary), hidden.device)
        parts = zip(torch.split(hidden.flatten(0, 1), rows), torch.split(targets.flatten(), rows), strict=True)
        losses = [
            functional.cross_entropy((states @ vocabulary.T).float(), wanted, reduction="none")
            for states, wanted in parts
        ]
        return torch.cat(losses).view(targets.shape)

    return read
