"""Attention kernels behind one signature, and the one rule of which key a query sees.

Letters: B batch, T query time, S key time, N query heads, K key/value heads, H head dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


# On Hopper GPUs cuDNN's way back gives wrong gradients for rows of some lengths, silently (seen: 255 tokens, head dim
# 256, compiled; pytorch issue 196678 has others). What is left for torch to choose from is right.
torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def visible(distance: Tensor, window: int | None, documents: tuple[Tensor, Tensor] | None) -> Tensor:
    """Say which keys are seen, by how far they are before the query, and the documents of query and key."""
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if documents is not None:
        seen = seen & (documents[0] == documents[1])
    return seen


@dataclass(frozen=True)
class Visibility:
    """Key j is visible to query i iff 0 <= i - j < window and both are of the same document.

    Positions and documents are (B or 1, T) for queries and (B or 1, S) for keys; window None means no limit, documents
    None means one document. `causal` promises that the rule comes down to the lower triangle, so kernels need no
    table and `table` is None. `block` and `sparse` promise that the queries are the keys, one position after the other,
    and ask for the table of blocks of so many queries, or for FlexAttention's.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int | None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    causal: bool = False
    block: int | None = None
    sparse: bool = False

    # The rule, made once for all layers of a kind: booleans (B or 1, 1, T, S), True where the key is visible; for
    # blocks what is added to scores, 0 or -inf: (B or 1, 1, blocks, 1, block, reach + block).
    table: "Tensor | BlockMask | None" = field(init=False)

    def __post_init__(self) -> None:
        form = self._rule_of_blocks if self.block is not None else self._block_mask if self.sparse else self.rule
        object.__setattr__(self, "table", None if self.causal else form())

    def rule(self) -> Tensor:
        """Work the table out."""
        return self._rule(self.query_positions, self.key_positions, self.query_documents, self.key_documents)[:, None]

    @property
    def reach(self) -> int:
        """How many keys before a block, in whole blocks, its first query may see."""
        assert self.block is not None
        if self.window is None or self.block >= self.query_positions.shape[1]:  # one block of all
            return 0
        return math.ceil((self.window - 1) / self.block) * self.block

    def _rule_of_blocks(self) -> Tensor:
        never = torch.iinfo(self.key_positions.dtype).max // 2  # a position after all others: nobody looks there
        queries, keys = self._cut(self.query_positions, never)
        documents = (None, None) if self.query_documents is None else self._cut(self.query_documents, -1)
        return torch.where(self._rule(queries, keys, *documents), 0.0, -math.inf)[:, None, :, None]

    def _cut(self, marks: Tensor, filling: int) -> tuple[Tensor, Tensor]:
        """(B,T) -> each block's own marks (B,blocks,block), and those of the keys before and in it."""
        assert self.block is not None
        padded = functional.pad(marks, (self.reach, -marks.shape[1] % self.block), value=filling)
        keys = padded.unfold(1, self.reach + self.block, self.block)
        return keys[..., self.reach :], keys

    def _block_mask(self) -> "BlockMask":
        from torch.nn.attention.flex_attention import create_block_mask

        window, documents = self.window, self.query_documents
        rows, length = self.query_positions.shape if documents is None else documents.shape

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            marks = None if documents is None else (documents[row, query], documents[row, key])
            return visible(query - key, window, marks)

        return create_block_mask(sees, rows, None, length, length, self.query_positions.device)

    def _rule(
        self, queries: Tensor, keys: Tensor, query_documents: Tensor | None, key_documents: Tensor | None
    ) -> Tensor:
        documents = None
        if query_documents is not None and key_documents is not None:
            documents = query_documents[..., :, None], key_documents[..., None, :]
        return visible(queries[..., :, None] - keys[..., None, :], self.window, documents)


# (query (B,N,T,H), key (B,K,S,H), value (B,K,S,H), visibility, scale, dropout) -> (B,N,T,H)
Kernel = Callable[[Tensor, Tensor, Tensor, Visibility, float, float], Tensor]


def reference(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float
) -> Tensor:
    """Attend in plain fp32 steps: scores, rule, softmax, weighted sum. Other kernels are tested against this one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bnth,bnsh->bnts", query.float(), key.float()) * scale
    scores = scores.masked_fill(~visibility.rule(), torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(dim=-1), dropout)
    return torch.einsum("bnts,bnsh->bnth", weights, value.float()).to(query.dtype)


def sdpa(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float) -> Tensor:
    """Attend with PyTorch's scaled_dot_product_attention; exact for Gemma 3, which has no soft-cap."""
    assert not visibility.sparse
    if query.shape[2] == 1 and isinstance(visibility.table, Tensor) and not query.requires_grad:
        return _one_query(query, key, value, visibility.table, scale)
    if query.is_cuda and not visibility.causal:  # no kernel there that takes a table knows groups
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visibility.table,  # type: ignore[arg-type]
        is_causal=visibility.causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _one_query(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """Decode: the heads of a group become queries of their one key head, so that no key is copied for each of them."""
    together = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    if not query.is_cuda:
        mixed = functional.scaled_dot_product_attention(together, key, value, attn_mask=table, scale=scale)
        return mixed.reshape(query.shape)
    # Two products and a softmax take half as long there as a kernel made for many queries.
    scores = torch.bmm(together.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
    scores = scores.view(*together.shape[:3], -1).mul(scale).masked_fill(~table, -math.inf)
    return (scores.softmax(dim=-1).to(value.dtype) @ value).reshape(query.shape)


# Queries that `folded` takes as one block where no window cuts them: more would be too many scores to hold.
WHOLE = 512


def block_of(length: int, window: int | None, device: torch.device) -> int | None:
    """Return the size of the blocks that `folded` cuts a sequence into, None where it leaves it to `sdpa`."""
    if window is not None and window < length and (device.type != "cuda" or length > WHOLE):
        return max(1, window // 2)
    return length if length <= WHOLE else None  # a GPU makes scores that nobody sees faster than it copies keys


def rows_in_order(kernel: str, positions: Tensor, window: int | None, documents: Tensor | None) -> Visibility:
    """Return what each token of whole rows sees of its row, in the form that a kernel takes best.

    Positions (B or 1, T) count on one by one.
    """
    length = positions.shape[1]
    block = block_of(length, window, positions.device) if kernel == "folded" else None
    lower = (window is None or length <= window) and documents is None and block is None
    sparse = kernel == "flex" and not lower
    return Visibility(positions, positions, window, documents, documents, lower, block, sparse)


def folded(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float) -> Tensor:
    """Attend block by block, each to itself and the keys its window reaches; the cost grows with T, not with T x T.

    Without a promise of blocks (long rows without a window, or keys from a cache) it is `sdpa`.
    """
    if visibility.block is None or not isinstance(visibility.table, Tensor):
        return sdpa(query, key, value, visibility, scale, dropout)
    block, reach = visibility.block, visibility.reach
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    blocks = math.ceil(length / block)
    # All query heads of a key head, and all queries of a block, make one matrix: (B,K,blocks, N/K x block, H).
    queries = functional.pad(query, (0, 0, 0, blocks * block - length))
    queries = queries.reshape(batch, groups, -1, blocks, block, size).transpose(2, 3).flatten(3, 4)
    keys, values = (_reached(x, block, reach).flatten(0, 2) for x in (key, value))
    # The rule is added by the product: softmax then reads and writes plain rows, which compiles to one loop.
    rule = visibility.table.to(query.dtype).expand(batch, groups, -1, heads // groups, -1, -1)
    rule = rule.flatten(3, 4).flatten(0, 2)
    scores = torch.baddbmm(rule, queries.flatten(0, 2), keys.transpose(1, 2), alpha=scale)
    weights = functional.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    mixed = (weights @ values).reshape(batch, groups, blocks, -1, block, size)
    return mixed.transpose(2, 3).reshape(batch, heads, -1, size)[:, :, :length]


def _reached(x: Tensor, block: int, reach: int) -> Tensor:
    """(B,K,T,H) -> for each block the keys before and in it, (B,K,blocks,reach + block,H)."""
    length = x.shape[2]
    padded = functional.pad(x, (0, 0, reach, -length % block))
    shifts = [padded[:, :, first : padded.shape[2] - reach + first] for first in range(0, reach + 1, block)]
    return torch.cat([shift.reshape(*x.shape[:2], -1, block, x.shape[3]) for shift in shifts], dim=3)


def flex(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, dropout: float) -> Tensor:
    """Attend with FlexAttention, which skips the blocks of keys that no query sees: for GPUs, and compiled blocks.

    Without `sparse` (nothing to skip, or keys from a cache) it is `sdpa`. It drops no weights, and knows no way back on
    a CPU.
    """
    if not visibility.sparse:
        return sdpa(query, key, value, visibility, scale, dropout)
    from torch.nn.attention.flex_attention import flex_attention

    assert not dropout
    options: dict[str, Any] = {"block_mask": visibility.table, "scale": scale, "enable_gqa": True}
    mixed: Tensor = flex_attention(query, key, value, **options)
    return mixed


KERNELS: dict[str, Kernel] = {"reference": reference, "sdpa": sdpa, "folded": folded, "flex": flex}
