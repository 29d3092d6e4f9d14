"""What one step of generation computes: some tokens of every sequence."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class StepBatch(NamedTuple):
    """Tokens (T,), their positions and the rows of the KV cache that they belong to.

    Those of a row are together, in ascending order; `outputs` are the indices of the tokens whose logits are wanted.
    """

    tokens: Ints
    positions: Ints
    rows: Ints
    outputs: Ints
