"""Texts read by a runner step by step, each in a row of its own, as an engine would have it read them."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gemmule.inference.kv_cache import KVCache, exact_size
from gemmule.inference.runners import Decoding, cache_dtype, make_runner
from gemmule.inference.step_batch import StepBatch
from gemmule.model.gemma3 import Gemma3
from tiny import greatest_difference, some_tokens

Counts = Mapping[int, int]  # how many tokens of which rows a step reads


class Reading:
    """Texts that a runner reads step by step, each in a row of its own."""

    def __init__(self, model: Gemma3, way: Decoding, texts: Sequence[Sequence[int]], longest: int = 0) -> None:
        """Begin the texts; others will have `longest` tokens at most."""
        self.texts, longest = [*texts], max(longest, *map(len, texts))
        size = exact_size(model.config, len(texts), longest, longest) if way == "compiled" else None
        dtype = cache_dtype(model, way)
        self.cache = KVCache(model.config, len(texts), longest, size, dtype, torch.device("cpu"))
        self.runner = make_runner(model, self.cache, way)
        self.logits: list[list[Tensor]] = [[] for _ in texts]
        for row, text in enumerate(texts):
            self._begin(row, text)

    def _begin(self, row: int, text: Sequence[int]) -> None:
        self.cache.begin(row, text, self.cache.need(len(text), len(text)), anew=True)

    def replace(self, row: int, text: Sequence[int]) -> Tensor:
        """Begin another text in a row; return the logits (T,V) of the one before."""
        before, self.logits[row], self.texts[row] = torch.stack(self.logits[row]), [], text
        self.cache.finish(row)
        self._begin(row, text)
        return before

    def left(self, row: int) -> int:
        """Return how many tokens of a row's text are not read yet."""
        return len(self.texts[row]) - self.cache.length(row)

    def batch(self, counts: Counts) -> StepBatch:
        """Make room for the next tokens of these rows; return the step that reads them, and wants all logits."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for row, count in counts.items():
            first = self.cache.length(row)
            piece = self.texts[row][first : first + count]
            assert self.cache.extend(row, piece) == first
            tokens += piece
            positions += range(first, first + count)
            rows += [row] * count
        return StepBatch(*(np.array(each, dtype=np.int64) for each in (tokens, positions, rows, range(len(rows)))))

    def step(self, counts: Counts) -> None:
        """Read the next tokens of these rows."""
        batch = self.batch(counts)
        with torch.inference_mode():
            logits = self.runner.run(batch)
        for row, own in zip(batch.rows.tolist(), logits.clone(), strict=True):
            self.logits[row].append(own)
        for row in counts:
            self.cache.settle(row)


def read(model: Gemma3, way: Decoding, texts: Sequence[Sequence[int]], plan: Sequence[Counts]) -> list[Tensor]:
    """Return the logits (T,V) of each text, read in the steps of a plan."""
    reading = Reading(model, way, texts)
    for counts in plan:
        reading.step(counts)
    return [torch.stack(logits) for logits in reading.logits]


def some_plan(lengths: Sequence[int], seed: int, most: int = 40) -> list[dict[int, int]]:
    """Draw steps that read texts of these lengths: some rows each, a token of each or pieces of any size."""
    draw, left, plan = random.Random(seed), dict(enumerate(lengths)), []
    while left:
        rows = draw.sample([*left], draw.randint(1, len(left)))
        pieces = draw.random() < 0.5
        plan.append({row: min(left[row], draw.randint(1, most) if pieces else 1) for row in rows})
        left = {row: rest for row, count in left.items() if (rest := count - plan[-1].get(row, 0))}
    return plan


def one_by_one(lengths: Sequence[int]) -> list[dict[int, int]]:
    """Read one text after the other, a token per step."""
    return [{row: 1} for row, length in enumerate(lengths) for _ in range(length)]


def some_texts(model: Gemma3, lengths: Sequence[int]) -> list[list[int]]:
    return [some_tokens(model.config, 1, length, seed=row)[0].tolist() for row, length in enumerate(lengths)]


def full_forward(model: Gemma3, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return what the model itself says to each whole text, (T,V)."""
    with torch.inference_mode():
        return [model(torch.tensor([text]))[0] for text in texts]


def greatest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(greatest_difference(one, other) for one, other in zip(some, others, strict=True))


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
