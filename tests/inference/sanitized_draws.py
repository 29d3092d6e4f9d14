"""Runs sample.c, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, over whatever could lead it astray.

    LD_PRELOAD=LIBASAN:LIBSTDC++ ASAN_OPTIONS=detect_leaks=0 XDG_CACHE_HOME=EMPTY python sanitized_draws.py

The process dies with a report at the first access out of bounds and at the first undefined operation; it prints how
many rows were drawn. `test_sanitized.py` starts it.
"""

import itertools
import math
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from sanitized_steps import SANITIZE
from torch import Tensor

from gemmule.inference.native import library, sampler
from gemmule.inference.sampling import Query, Row, SamplingSettings

HOSTILE = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e-40, 0.3, 1.0, 2.5, 1e300]
VALUES = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, -0.0]


class ExactSampler(sampler.NativeSampler):
    """Has no byte of memory more than C asks for, so that each access beyond is seen."""

    def _memory(self, logits: Tensor) -> tuple[int, int]:
        self._workspace = torch.empty(0, dtype=torch.uint8)
        return super()._memory(logits)


def logits_of(source: random.Random, rows: int, vocabulary: int) -> Tensor:
    made = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(source.randrange(10**6)))
    made *= source.choice([0, 1, 3, 1e3, 1e38])
    return made.round() if source.random() < 0.3 else made


def all_sizes() -> int:
    """Settings and exclusions as they are given, over odd vocabularies."""
    source, count = random.Random(0), 0
    for vocabulary, rows in itertools.product((*range(1, 70), 127, 128, 129, 1000, 4096, 5003), (1, 3, 64)):
        torch.set_num_threads(1 + count % 3)
        native = ExactSampler()
        settings = SamplingSettings(
            temperature=source.choice([0, 0.7, 1, 1e-40, 1e6]),
            top_k=source.choice([0, 1, 3, 70, vocabulary - 1, vocabulary]),
            top_p=source.choice([1, 0.9, 1e-9]),
            min_p=source.choice([0, 0.1, 0.99]),
            repetition_penalty=source.choice([1, 1.2]),
            frequency_penalty=source.choice([0, 0.4]),
            logit_bias=tuple((token, 3.0) for token in range(0, vocabulary, 7)) if source.random() < 0.5 else (),
        )
        allowed = torch.tensor([source.randrange(-(2**31), 2**31) for _ in range((vocabulary + 31) // 32)])
        given = [
            Row(
                settings,
                [source.randrange(vocabulary) for _ in range(9)],
                [source.randrange(vocabulary) for _ in range(9)],
                uniform=source.choice([0, source.random(), 1 - 2**-53]),
                excluded=[source.randrange(vocabulary)] if source.random() < 0.3 else (),
                allowed=allowed.to(torch.int32) if source.random() < 0.3 else None,
            )
            for _ in range(rows)
        ]
        logits = logits_of(source, rows, vocabulary)
        drawn = native.draw_rows(logits, given)
        assert (drawn < vocabulary).all()
        count += rows
        native.log_probabilities(logits, [Query(row, row % vocabulary, row % 25) for row in range(rows)])
    return count


def hostile_settings() -> int:
    """Of numbers that the settings refuse, too: C must not depend on that."""
    source, native, count = random.Random(1), ExactSampler(), 0
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for _ in range(6000):
        given: dict[str, Any] = {name: source.choice(HOSTILE) for name in names if source.random() < 0.5}
        given["top_k"] = source.choice([0, 0, 1, 7, -1, -(2**62), 2**62, 10**30])
        given["logit_bias"] = ((source.randrange(100), source.choice(HOSTILE)),)
        settings = SamplingSettings.model_construct(**given)
        row = Row(settings, range(0, 100, 3), range(0, 100, 5), uniform=source.choice(HOSTILE))
        drawn = native.draw_rows(logits_of(source, 1, 100), [row]).item()
        assert -2 <= drawn < 100, given
        count += 1
    return count


def hostile_logits() -> int:
    source, native, count = random.Random(2), ExactSampler(), 0
    for vocabulary, value, share in itertools.product((1, 2, 63, 64, 65, 1000), VALUES, (0.02, 0.5, 1)):
        for settings in ({}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1, "presence_penalty": 1}):
            logits = logits_of(source, 2, vocabulary)
            logits[torch.rand(2, vocabulary) < share] = value
            rows = [Row(SamplingSettings(**settings), [0], [0], uniform=source.random()) for _ in range(2)]
            native.draw_rows(logits, rows)
            native.log_probabilities(logits, [Query(0, 0, 20), Query(1, vocabulary - 1, vocabulary)])
            count += 2
    return count


def hostile_tokens() -> int:
    native, count = ExactSampler(), 0
    for token in (-(2**31), -1, 100, 101, 2**31 - 1):
        bias = SamplingSettings.model_construct(logit_bias=((5, 1.0), (token, 1.0)))
        for row in (
            Row(bias),
            Row(SamplingSettings(repetition_penalty=2), [token]),
            Row(SamplingSettings(presence_penalty=2), [3], [token]),
            Row(SamplingSettings(), excluded=[token]),
        ):
            try:
                native.draw_rows(torch.zeros(1, 100), [row])
            except IndexError:
                count += 1
        for query in (Query(0, token, 3), Query(token, 0, 3), Query(2**62, 0), Query(0, 2**62)):
            try:
                native.log_probabilities(torch.zeros(1, 100), [query])
            except IndexError:
                count += 1
    native.log_probabilities(torch.zeros(1, 100), [Query(0, 0, -5), Query(0, 0, 2**62)])
    return count


if __name__ == "__main__":
    library.FLAGS = (*library.FLAGS, *SANITIZE)
    for scenario in (all_sizes, hostile_settings, hostile_logits, hostile_tokens):
        sys.stdout.write(f"{scenario.__name__} {scenario()}\n")
