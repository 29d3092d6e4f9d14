"""The scaling law by which vocabularies, shapes and lengths are compared: held-out loss by parameters and text.

    loss = floor + a N^-alpha + b D^-beta + c V^-gamma,   D = U + U r (1 - exp(-(epochs - 1) / r))

in bits per byte, N parameters outside the embedding, V the size of the vocabulary, U bytes of text, D the bytes of new
text that training is worth: each further epoch over the same text adds less (Hoffmann et al., arXiv 2203.15556;
Muennighoff et al., arXiv 2305.16264). Bytes and not tokens, so that vocabularies can be compared.

docs/scaling.md says which of the constants were fitted to which runs, and which are assumed. The floor depends on the
text, and nothing that is chosen depends on it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """A measured run."""

    corpus: str
    parameters: float  # outside the embedding
    vocab_size: int
    seen: float  # bytes of training, repeated ones counted
    unique: float  # bytes of the training text
    bits_per_byte: float  # of held-out text, at the best validation


class Law(NamedTuple):
    """The constants of the law."""

    alpha: float
    beta: float
    gamma: float
    r: float
    a: float
    b: float
    c: float

    def loss(self, parameters: float, vocab_size: int, seen: float, unique: float) -> float:
        """Return the bits per byte above the floor of the text, after training on so many bytes of it."""
        worth = worth_of(seen, unique, self.r)
        return self.a * parameters**-self.alpha + self.b * worth**-self.beta + self.c * vocab_size**-self.gamma


# Provisional: a, b, c and gamma by hand from ten runs in docs/log.md, the others assumed. `fit` will replace them by
# those of benchmarks/results/scaling_runs.json once the sweep of benchmarks/scaling_runs.py has been run.
LAW = Law(alpha=0.3, beta=0.3, gamma=0.4, r=8.0, a=22.7, b=54.6, c=1.98)


def worth_of(seen: float, unique: float, r: float) -> float:
    """Return how many bytes of new text those of training are worth."""
    repeated = max(0.0, seen / unique - 1)
    return min(seen, unique) + unique * r * (1 - math.exp(-repeated / r))


# Exponents and decay of repetition among which the fit searches.
_ALPHAS = _BETAS = tuple(round(0.05 * step, 2) for step in range(2, 15))
_GAMMAS = (0.2, 0.3, 0.4, 0.5, 0.6)
_RS = (2.0, 4.0, 8.0, 16.0, 32.0)


class Fit(NamedTuple):
    """A law with how well it describes the runs."""

    law: Law
    floors: dict[str, float]  # of each corpus
    error: float  # root mean square, in bits per byte


def fit(runs: Sequence[Run]) -> Fit:
    """Fit the law to runs by least squares; ValueError where there are fewer runs than constants."""
    corpora = sorted({run.corpus for run in runs})
    if len(runs) < len(corpora) + 7:
        raise ValueError(f"{len(runs)} runs cannot determine a law of {len(corpora) + 7} constants")
    target = np.array([run.bits_per_byte for run in runs])
    floors = np.array([[run.corpus == corpus for corpus in corpora] for run in runs], dtype=float)
    sizes, vocabularies = (np.array([getattr(run, name) for run in runs]) for name in ("parameters", "vocab_size"))
    best: Fit | None = None
    for r in _RS:
        worth = np.array([worth_of(run.seen, run.unique, r) for run in runs])
        for alpha, beta, gamma in itertools.product(_ALPHAS, _BETAS, _GAMMAS):
            table = np.column_stack([sizes**-alpha, worth**-beta, vocabularies**-gamma, floors])
            found = np.linalg.lstsq(table, target, rcond=None)[0]
            error = float(np.sqrt(np.mean((table @ found - target) ** 2)))
            if min(found[:3]) >= 0 and (best is None or error < best.error):
                a, b, c, *rest = map(float, found)
                best = Fit(Law(alpha, beta, gamma, r, a, b, c), dict(zip(corpora, rest, strict=True)), error)
    if best is None:
        raise ValueError("no law of this form fits the runs: more parameters, text or vocabulary made them worse")
    return best
