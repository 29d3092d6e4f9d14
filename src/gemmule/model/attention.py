"""Attention masks, and the attention kernels behind one signature.

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


# On Hopper GPUs cuDNN's backward pass gives wrong gradients for some sequence lengths, silently (seen: 255 tokens, head
# dim 256, compiled; pytorch issue 196678 has others). The kernels that are left for torch to choose from are right.
torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def attends(query: Tensor, key: Tensor, window: int | None, documents: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return which keys a query attends to, from positions and documents of query and key, which are broadcast.

    Of all pairs, nothing larger than booleans is allocated.
    """
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if documents is not None:
        seen = seen & (documents[0] == documents[1])
    return seen


@dataclass(frozen=True)
class AttentionMask:
    """The attention mask of causal, sliding-window and document attention.

    Query i attends to key j iff 0 <= i - j < window and both are of the same document. Positions and documents are
    (B or 1, T) for queries and (B or 1, S) for keys; window None means global attention, documents None one document.
    `causal` promises that the mask is the lower triangle, so kernels need no values and `values` is None. `block` and
    `sparse` promise that queries and keys are the same consecutive positions, and ask for the values of blocks of so
    many queries (block-local attention), or for FlexAttention's block mask.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int | None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    causal: bool = False
    block: int | None = None
    sparse: bool = False

    # Computed once for all layers of a kind: booleans (B or 1, 1, T, S), True where a query attends; for blocks the
    # bias added to scores, 0 or -inf: (B or 1, 1, blocks, 1, block, keys_before + block).
    values: "Tensor | BlockMask | None" = field(init=False)

    def __post_init__(self) -> None:
        form = self._block_bias if self.block is not None else self._flex_mask if self.sparse else self.dense
        object.__setattr__(self, "values", None if self.causal else form())

    def dense(self) -> Tensor:
        """Return the dense mask (B or 1, 1, T, S), True where a query attends."""
        return self._attends(self.query_positions, self.key_positions, self.query_documents, self.key_documents)[
            :, None
        ]

    @property
    def keys_before(self) -> int:
        """Number of keys before a block, in whole blocks, that its first query may attend to."""
        assert self.block is not None
        if self.window is None or self.block >= self.query_positions.shape[1]:  # one block of all
            return 0
        return math.ceil((self.window - 1) / self.block) * self.block

    def _block_bias(self) -> Tensor:
        never = torch.iinfo(self.key_positions.dtype).max // 2  # padding is after every query
        queries, keys = self._in_blocks(self.query_positions, never)
        documents = (None, None) if self.query_documents is None else self._in_blocks(self.query_documents, -1)
        zero = torch.zeros((), dtype=torch.float32, device=keys.device)
        return torch.where(self._attends(queries, keys, *documents), zero, -math.inf)[:, None, :, None]

    def _in_blocks(self, values: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        """(B,T) -> the values of each block (B,blocks,block), and of the keys before and in it."""
        assert self.block is not None
        padded = functional.pad(values, (self.keys_before, -values.shape[1] % self.block), value=padding)
        keys = padded.unfold(1, self.keys_before + self.block, self.block)
        return keys[..., self.keys_before :], keys

    def _flex_mask(self) -> "BlockMask":
        from torch.nn.attention.flex_attention import create_block_mask

        window, documents = self.window, self.query_documents
        rows, length = self.query_positions.shape if documents is None else documents.shape

        def mask_mod(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            pair = None if documents is None else (documents[row, query], documents[row, key])
            return attends(query, key, window, pair)

        return create_block_mask(mask_mod, rows, None, length, length, self.query_positions.device)

    def _attends(
        self, queries: Tensor, keys: Tensor, query_documents: Tensor | None, key_documents: Tensor | None
    ) -> Tensor:
        documents = None
        if query_documents is not None and key_documents is not None:
            documents = query_documents[..., :, None], key_documents[..., None, :]
        return attends(queries[..., :, None], keys[..., None, :], self.window, documents)


# (query (B,N,T,H), key (B,K,S,H), value (B,K,S,H), mask, scale, dropout) -> (B,N,T,H)
Kernel = Callable[[Tensor, Tensor, Tensor, AttentionMask, float, float], Tensor]


def reference(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """Attend in plain fp32 steps: scores, mask, softmax, weighted sum. Other kernels are tested against this one."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    weights = functional.dropout(attention_weights(attention_scores(query, key, scale), mask), dropout)
    return torch.einsum("bnts,bnsh->bnth", weights, value.float()).to(query.dtype)


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the scores (B,N,T,S) of all pairs in fp32, before the mask."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("bnth,bnsh->bnts", query.float(), key.float()) * scale


def attention_weights(scores: Tensor, mask: AttentionMask) -> Tensor:
    """Return the softmax of scores (B,N,T,S) over the keys that each query attends to; 0 for all others."""
    return scores.masked_fill(~mask.dense(), torch.finfo(scores.dtype).min).softmax(dim=-1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """Attend with PyTorch's scaled_dot_product_attention; exact for Gemma 3, which has no soft-cap."""
    assert not mask.sparse
    if query.shape[2] == 1 and isinstance(mask.values, Tensor) and not query.requires_grad:
        return _one_query(query, key, value, mask.values, scale)
    if query.is_cuda and not mask.causal:  # no kernel there that takes a mask supports grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.values,  # type: ignore[arg-type]
        is_causal=mask.causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _one_query(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Decode: the heads of a group become queries of their one key head, so that no key is copied for each of them."""
    together = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    if not query.is_cuda:
        mixed = functional.scaled_dot_product_attention(together, key, value, attn_mask=attn_mask, scale=scale)
        return mixed.reshape(query.shape)
    # Two matmuls and a softmax take half as long there as a kernel made for many queries.
    scores = torch.bmm(together.flatten(0, 1), key.flatten(0, 1).mT, out_dtype=torch.float32)
    scores = scores.view(*together.shape[:3], -1).mul(scale).masked_fill(~attn_mask, -math.inf)
    return (scores.softmax(dim=-1).to(value.dtype) @ value).reshape(query.shape)


# The longest sequence without a window that is one block: longer ones would have too many scores to hold.
LARGEST_BLOCK = 512


def block_size_for(length: int, window: int | None, device: torch.device) -> int | None:
    """Return the block size of block-local attention over a sequence, None where `sdpa` takes it."""
    if window is not None and window < length and (device.type != "cuda" or length > LARGEST_BLOCK):
        return max(1, window // 2)
    return length if length <= LARGEST_BLOCK else None  # a GPU computes masked scores faster than it copies keys


def packed_mask(kernel: str, positions: Tensor, window: int | None, documents: Tensor | None) -> AttentionMask:
    """Return the mask of packed rows in the form that a kernel takes best; positions (B or 1, T) are consecutive."""
    length = positions.shape[1]
    block = block_size_for(length, window, positions.device) if kernel == "block-local" else None
    lower = (window is None or length <= window) and documents is None and block is None
    sparse = kernel == "flex" and not lower
    return AttentionMask(positions, positions, window, documents, documents, lower, block, sparse)


def block_local(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """Attend in blocks, each to itself and the keys before it in the window; the cost grows with T, not with T x T.

    A mask without blocks (long rows without a window, or keys from a cache) goes to `sdpa`.
    """
    if mask.block is None or not isinstance(mask.values, Tensor):
        return sdpa(query, key, value, mask, scale, dropout)
    block, before = mask.block, mask.keys_before
    (batch, heads, length, size), groups = query.shape, key.shape[1]
    blocks = math.ceil(length / block)
    # All query heads of a key head, and all queries of a block, make one matrix: (B,K,blocks, N/K x block, H).
    queries = functional.pad(query, (0, 0, 0, blocks * block - length))
    queries = queries.reshape(batch, groups, -1, blocks, block, size).transpose(2, 3).flatten(3, 4)
    keys, values = (_with_keys_before(x, block, before).flatten(0, 2) for x in (key, value))
    # The bias is added by the matmul: softmax then reads and writes plain rows, which compiles to one loop.
    bias = mask.values.to(query.dtype).expand(batch, groups, -1, heads // groups, -1, -1)
    bias = bias.flatten(3, 4).flatten(0, 2)
    scores: Tensor = _Scores.apply(bias, queries.flatten(0, 2), keys, scale)  # type: ignore[no-untyped-call]
    weights = functional.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    mixed = (weights @ values).reshape(batch, groups, blocks, -1, block, size)
    return mixed.transpose(2, 3).reshape(batch, heads, -1, size)[:, :, :length]


class _Scores(torch.autograd.Function):
    """bias + scale queries keys^T, for queries (M,Q,H) and keys (M,S,H), where no gradient comes out transposed.

    torch's own gradient of the keys is a transposed matrix. What follows, a norm's backward pass, is then compiled
    to reductions over transposed tiles, which is slower, and which compilers have got wrong (`compiler.py`).
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Return the scores (M,Q,S)."""
        ctx.save_for_backward(queries, keys)
        ctx.scale = scale
        return torch.baddbmm(bias, queries, keys.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        """Return the gradients of queries and keys; the bias has none."""
        queries, keys = ctx.saved_tensors
        (gradient,) = gradients
        return None, torch.bmm(gradient, keys) * ctx.scale, torch.bmm(gradient.mT, queries) * ctx.scale, None


def _with_keys_before(x: Tensor, block: int, before: int) -> Tensor:
    """(B,K,T,H) -> for each block the keys before and in it, (B,K,blocks,before + block,H)."""
    length = x.shape[2]
    padded = functional.pad(x, (0, 0, before, -length % block))
    shifts = [padded[:, :, first : padded.shape[2] - before + first] for first in range(0, before + 1, block)]
    return torch.cat([shift.reshape(*x.shape[:2], -1, block, x.shape[3]) for shift in shifts], dim=3)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    """Attend with FlexAttention, which skips blocks that are masked out entirely: for GPUs, and compiled blocks.

    Without `sparse` (nothing to skip, or keys from a cache) it is `sdpa`. It has no dropout, and no backward pass on
    a CPU.
    """
    if not mask.sparse:
        return sdpa(query, key, value, mask, scale, dropout)
    from torch.nn.attention.flex_attention import flex_attention

    assert not dropout
    options: dict[str, Any] = {"block_mask": mask.values, "scale": scale, "enable_gqa": True}
    mixed: Tensor = flex_attention(query, key, value, **options)
    return mixed


KERNELS: dict[str, Kernel] = {"reference": reference, "sdpa": sdpa, "block-local": block_local, "flex": flex}
