"""Attention kernels behind one signature, and the one rule of which key a query sees.

Letters: B batch, T query time, S key time, N query heads, K key/value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Visibility:
    """Key j is visible to query i iff 0 <= i - j < window and both are of the same document.

    Positions and documents are (B or 1, T) for queries and (B or 1, S) for keys; window None means no limit, documents
    None means one document. `causal` promises that the rule comes down to the lower triangle, so kernels need no
    table and `table` is None.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int | None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    causal: bool = False

    # The rule as booleans (B or 1, 1, T, S), True where the key is visible; made once for all layers of a kind.
    table: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", None if self.causal else self.rule())

    def rule(self) -> Tensor:
        """Work the table out."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.query_documents is not None and self.key_documents is not None:
            visible = visible & (self.query_documents[:, :, None] == self.key_documents[:, None, :])
        return visible[:, None]


# (query (B,N,T,H), key (B,K,S,H), value (B,K,S,H), visibility, scale, dropout) -> (B,N,T,H)
Kernel = Callable[[Tensor, Tensor, Tensor, Visibility, float, float], Tensor]


def reference(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float
) -> Tensor:
    """Attend in plain fp32 steps: scores, rule, softmax, weighted sum. Other kernels are tested against this one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bnth,bnsh->bnts", query.float(), key.float()) * scale
    table = visibility.rule() if visibility.table is None else visibility.table
    scores = scores.masked_fill(~table, torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum("bnts,bnsh->bnth", weights, value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float) -> Tensor:
    """Attend with PyTorch's scaled_dot_product_attention; exact for Gemma 3, which has no soft-cap."""
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visibility.table,
        is_causal=visibility.causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


KERNELS: dict[str, Kernel] = {"reference": reference, "sdpa": sdpa}
