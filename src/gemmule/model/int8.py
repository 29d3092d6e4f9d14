"""Rounding of a matrix to int8, with one scale per row."""

import torch
from torch import Tensor

_CHUNK = 4096  # rows that are rounded at once, so that an embedding table needs no fp32 copy of itself


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a finite matrix (rows, columns) to int8; return it and its fp32 scales (rows,).

    Each row's largest magnitude becomes 127.
    """
    held = weight.detach()
    scales = (held.abs().amax(dim=1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    data = torch.empty_like(held, dtype=torch.int8)
    for first in range(0, len(held), _CHUNK):
        rows = slice(first, first + _CHUNK)
        data[rows] = (held[rows].float() / scales[rows, None]).round()
    return data, scales
