"""Gemma 3 once more, as plainly as it can be said: the definition that `gemma3.py` is tested against.

One text, no batch, no cache, no kernels, all in fp32, far too slow to use. Letters: T tokens, D hidden size, N query
heads, K key/value heads, H head dim, V vocabulary. Every weight matrix is (out, in). Source: arXiv 2503.19786.
"""

import math

import torch
from torch import Tensor

from gemmule.model.config import Gemma3Config


def reference_logits(state: dict[str, Tensor], config: Gemma3Config, tokens: list[int]) -> Tensor:
    """Return the logits (T,V) of one text under the weights of `Gemma3.state_dict()`, in fp32."""
    w = {name: tensor.float() for name, tensor in state.items()}
    x = w["embedding.weight"][tokens] * math.sqrt(config.hidden_size)
    for layer in range(config.num_hidden_layers):
        block = {name.removeprefix(f"blocks.{layer}."): w[name] for name in w if name.startswith(f"blocks.{layer}.")}
        is_global = (layer + 1) % config.sliding_window_pattern == 0
        mixed = _attention(_norm(x, block["pre_attention_norm.weight"], config), block, config, is_global)
        x = x + _norm(mixed, block["post_attention_norm.weight"], config)
        fed = _mlp(_norm(x, block["pre_mlp_norm.weight"], config), block)
        x = x + _norm(fed, block["post_mlp_norm.weight"], config)
    head = w["embedding.weight"] if config.tie_word_embeddings else w["head.weight"]
    return _norm(x, w["norm.weight"], config) @ head.T


def _norm(x: Tensor, weight: Tensor, config: Gemma3Config) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + config.rms_norm_eps) * (1 + weight)


def _mlp(x: Tensor, block: dict[str, Tensor]) -> Tensor:
    gate, up = x @ block["mlp.gate.weight"].T, x @ block["mlp.up.weight"].T
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gelu * up) @ block["mlp.down.weight"].T


def _attention(x: Tensor, block: dict[str, Tensor], config: Gemma3Config, is_global: bool) -> Tensor:
    T, H = len(x), config.head_dim
    shared = config.num_attention_heads // config.num_key_value_heads  # query heads that read one key/value head
    window = math.inf if is_global else config.sliding_window
    mixed = torch.zeros(T, config.num_attention_heads * H, dtype=torch.float32)
    for n in range(config.num_attention_heads):
        mine, theirs = slice(n * H, (n + 1) * H), slice(n // shared * H, (n // shared + 1) * H)
        query = _norm(x @ block["attention.query.weight"][mine].T, block["attention.query_norm.weight"], config)
        key = _norm(x @ block["attention.key.weight"][theirs].T, block["attention.key_norm.weight"], config)
        value = x @ block["attention.value.weight"][theirs].T
        query, key = _rotate(query, config, is_global), _rotate(key, config, is_global)
        for i in range(T):
            visible = [j for j in range(T) if 0 <= i - j < window]
            scores = key[visible] @ query[i] / math.sqrt(config.query_pre_attn_scalar)
            mixed[i, mine] = scores.softmax(dim=0) @ value[visible]
    return mixed @ block["attention.output.weight"].T


def _rotate(x: Tensor, config: Gemma3Config, is_global: bool) -> Tensor:
    base = config.rope_theta if is_global else config.rope_local_base_freq
    factor = config.rope_scaling_factor if is_global else 1.0
    half = config.head_dim // 2
    # Entry i is turned with entry i + H/2, not with its neighbour.
    angles = torch.outer(torch.arange(len(x)) / factor, base ** (-torch.arange(half) / half))
    cos, sin, first, second = angles.cos(), angles.sin(), x[:, :half], x[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)
