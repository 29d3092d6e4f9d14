"""Log-probabilities of several continuations of one context, as multiple choice has them: the context is read once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemmule.compiler import uncompiled
from gemmule.data.batches import IGNORED
from gemmule.evaluate.log_probabilities import (
    LONGEST_ROW,
    ContinuationScore,
    default_runtime,
    score_continuations,
    target_scores,
)
from gemmule.model.cache import EMPTY, Cache
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime

Pair = tuple[Sequence[int], Sequence[int]]


class _Shared(NamedTuple):
    """A context, and the pairs (their numbers, and their continuations) that begin with it."""

    context: tuple[int, ...]
    numbers: list[int]
    continuations: list[Sequence[int]]

    @property
    def tokens(self) -> int:
        """The tokens of all pairs."""
        return len(self.numbers) * (len(self.context) + max(map(len, self.continuations)))


def score_choices(
    model: Gemma3, pairs: Sequence[Pair], batch_tokens: int, runtime: Runtime | None = None
) -> list[ContinuationScore]:
    """Score pairs as `score_continuations` does, and read a context once that several of them share.

    The model is to read each pair at once, as long as it is: max_position_embeddings is not looked at.
    """
    runtime = runtime or default_runtime(model)
    grouped: dict[tuple[int, ...], _Shared] = {}
    for number, (context, continuation) in enumerate(pairs):
        key = tuple(context)
        group = grouped.setdefault(key, _Shared(key, [], []))
        group.numbers.append(number)
        group.continuations.append(continuation)
    shared = [group for group in grouped.values() if _is_worth_it(group)]
    scores: dict[int, ContinuationScore] = {}
    was_training = model.training
    model.eval()
    for batch in _batches(sorted(shared, key=lambda group: -len(group.context)), batch_tokens):
        scores |= _score_batch(model, batch, runtime)
    model.train(was_training)
    left = [number for number in range(len(pairs)) if number not in scores]
    rest = score_continuations(model, [pairs[number] for number in left], batch_tokens, runtime)
    scores |= zip(left, rest, strict=True)
    return [scores[number] for number in range(len(pairs))]


def _is_worth_it(group: _Shared) -> bool:
    """Return whether to read the context once saves something, and each continuation has a token to be scored."""
    shortest, longest = (size(map(len, group.continuations)) for size in (min, max))
    return len(group.numbers) > 1 and shortest > 0 and 1 < len(group.context) <= LONGEST_ROW and longest <= LONGEST_ROW


def _batches(groups: Sequence[_Shared], batch_tokens: int) -> Iterator[list[_Shared]]:
    batch: list[_Shared] = []
    tokens = 0
    for group in groups:
        if batch and tokens + group.tokens > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(group)
        tokens += group.tokens
    if batch:
        yield batch


class _ContextCache(Cache):
    """A KV cache whose rows, contexts with left padding, can be repeated for several continuations of each."""

    def repeat(self, counts: Sequence[int]) -> None:
        """Repeat each row so many times; padding becomes slots that no token attends to."""
        self._documents.clear()
        index = torch.repeat_interleave(torch.tensor(counts, dtype=torch.long, device=self.next_positions.device))
        self.next_positions = self.next_positions.expand(len(counts))[index]
        for kind, positions in self._positions.items():
            self._positions[kind] = torch.where(positions < 0, EMPTY, positions).expand(len(counts), -1)[index]
        for layer, held in enumerate(self._layers):
            if held is not None:
                self._layers[layer] = held[0][index], held[1][index]


def _no_logits(hidden: Tensor, _vocabulary: Tensor) -> Tensor:
    return hidden[:, -1:]


@torch.inference_mode()
def _score_batch(model: Gemma3, batch: Sequence[_Shared], runtime: Runtime) -> dict[int, ContinuationScore]:
    """Read the contexts but for their last tokens into a KV cache, and then each continuation after its own context."""
    begins = np.array([len(group.context) - 1 for group in batch])
    width, counts = int(begins.max()), [len(group.numbers) for group in batch]
    contexts = np.zeros((len(batch), width), dtype=np.int64)
    for row, group in enumerate(batch):
        contexts[row, width - begins[row] :] = group.context[:-1]
    positions = np.arange(width) - (width - begins)[:, None]  # of left padding below 0
    rows = [(group.context[-1], *continuation) for group in batch for continuation in group.continuations]
    shape = len(rows), max(map(len, rows)) - 1
    tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
    places = np.repeat(begins, counts)[:, None] + np.arange(shape[1])

    def there(array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(runtime.device)

    cache = _ContextCache(model.config)
    with uncompiled(), runtime.autocast():
        documents = there(np.where(positions < 0, -1, 0))  # padding is a document of its own
        model(there(contexts), there(positions), documents, cache, output_head=_no_logits)
        cache.repeat(counts)
        scores = model(there(tokens), there(places), None, cache, output_head=target_scores(there(targets)))
    known = targets != IGNORED
    log_probabilities, likeliest = scores.cpu().numpy()
    sums = np.where(known, log_probabilities, 0).sum(axis=1, dtype=np.float64)
    greedy = ((likeliest > 0) | ~known).all(axis=1)
    numbers = [number for group in batch for number in group.numbers]
    return {n: ContinuationScore(float(sums[row]), bool(greedy[row])) for row, n in enumerate(numbers)}
