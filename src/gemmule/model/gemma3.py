"""Gemma 3, the text model, from embedding to logits: read it from top to bottom.

Letters in shapes: B batch, T query time, S key time, D hidden size, N query heads, K key/value heads, H head dim,
F MLP width, V vocabulary. Reference: Gemma 3 technical report (arXiv 2503.19786); names of numbers as in `config.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemmule.model.attention import KERNELS, AttentionMask, packed_mask
from gemmule.model.cache import Cache
from gemmule.model.config import Gemma3Config, Kind

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, 1, T, H)
OutputHead = Callable[
    [Tensor, Tensor], Tensor
]  # (hidden states (B,T,D), vocabulary matrix (V,D)) -> what the caller wants


def all_logits(hidden: Tensor, vocabulary: Tensor) -> Tensor:
    """Read out the logits of every position, (B,T,V) float32."""
    return functional.linear(hidden, vocabulary).float()


def last_logits(hidden: Tensor, vocabulary: Tensor) -> Tensor:
    """Read out the logits of the last position alone, (B,1,V) float32."""
    return all_logits(hidden[:, -1:], vocabulary)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension and scale by 1 + weight, all in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.get_default_dtype()))  # as nn.Linear
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., size)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, base: float, factor: float) -> Rotary:
    """Return cosines and sines for positions (B or 1, T); in fp32, because bf16 cannot count beyond 256."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None, :, None] / factor * base**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (i, i + H/2) of x (B,heads,T,H) by its position's angle."""
    cos, sin = rotary
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: Gemma3Config, layer: int, kernel: str) -> None:
        super().__init__()
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        self.head_dim = size
        self.scale = config.query_pre_attn_scalar**-0.5
        self.dropout = config.attention_dropout
        self.kernel = KERNELS[kernel]
        self.query = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.key = nn.Linear(config.hidden_size, groups * size, bias=False)
        self.value = nn.Linear(config.hidden_size, groups * size, bias=False)
        self.output = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.query_norm = RMSNorm(size, config.rms_norm_eps)
        self.key_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, mask: AttentionMask, cache: Cache | None) -> Tensor:
        """Mix x (B,T,D) over the tokens that each one sees."""
        query = rotate(self.query_norm(self._heads(self.query(x))), rotary)
        key = rotate(self.key_norm(self._heads(self.key(x))), rotary)
        value = self._heads(self.value(x))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        mixed = self.kernel(query, key, value, mask, self.scale, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B,T,heads*H) -> (B,heads,T,H)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """The gated feed-forward layer: down(gelu(gate) * up), with the tanh form of gelu."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x (B,T,D) alone."""
        return self.down(functional.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each between a norm before and a norm after, added to the residual stream."""

    def __init__(self, config: Gemma3Config, layer: int, kernel: str) -> None:
        super().__init__()
        self.pre_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer, kernel)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary, mask: AttentionMask, cache: Cache | None = None) -> Tensor:
        """Return the residual stream (B,T,D) after this layer."""
        mixed = self.attention(self.pre_attention_norm(x), rotary, mask, cache)
        x = x + self.dropout(self.post_attention_norm(mixed))
        return x + self.dropout(self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))))


class Gemma3(nn.Module):
    """A decoder-only transformer: local layers have sliding-window attention, every n-th layer is global."""

    def __init__(self, config: Gemma3Config, kernel: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.kernel = kernel
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, kernel) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        output_head: OutputHead = all_logits,
    ) -> Tensor:
        """Predict the token after each of tokens (B,T); by default the logits (B,T,V).

        Positions (B or 1, T) continue from the cache by default. Tokens attend to their own document (B,T).
        """
        masks, rotary = self._masks_and_rotary(tokens, positions, documents, cache)
        # The scale is rounded to the weights' dtype, as Google's models were trained with; the head is not scaled.
        dtype = self.embedding.weight.dtype
        scale = torch.full((), math.sqrt(self.config.hidden_size), dtype=dtype, device=tokens.device)
        x = self.dropout(self.embedding(tokens) * scale)
        for block, kind in zip(self.blocks, self.config.layer_kinds, strict=True):
            x = block(x, rotary[kind], masks[kind], cache)
        return output_head(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)

    def _masks_and_rotary(
        self, tokens: Tensor, positions: Tensor | None, documents: Tensor | None, cache: Cache | None
    ) -> tuple[dict[Kind, AttentionMask], dict[Kind, Rotary]]:
        """Return the attention mask and the rotary embedding of each kind of layer."""
        config, kinds = self.config, sorted(set(self.config.layer_kinds))
        length = tokens.shape[1]
        in_order = positions is None and cache is None
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + length, device=tokens.device)[None]
        if cache is not None:
            masks = cache.extend(positions, documents)
        elif in_order:
            kernel = self.kernel if self.training or self.kernel != "flex" else "sdpa"  # only training is compiled
            masks = {kind: packed_mask(kernel, positions, config.window(kind), documents) for kind in kinds}
        else:
            masks = {
                kind: AttentionMask(positions, positions, config.window(kind), documents, documents) for kind in kinds
            }
        rotary = {kind: rotary_tables(positions, config.head_dim, *config.rope(kind)) for kind in kinds}
        return masks, rotary
