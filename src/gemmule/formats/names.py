"""Tensor names: one table for Gemmule, Hugging Face and GGUF, used in both directions."""

from collections.abc import Iterator, Mapping

# Gemmule, Hugging Face, GGUF (which stores norms as 1 + weight), without ".weight"; {} is the layer index.
_NAMES = (
    ("embedding", "model.embed_tokens", "token_embd"),
    ("blocks.{}.pre_attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("blocks.{}.attention.query", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("blocks.{}.attention.key", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("blocks.{}.attention.value", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("blocks.{}.attention.output", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("blocks.{}.attention.query_norm", "model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("blocks.{}.attention.key_norm", "model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("blocks.{}.post_attention_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
    ("blocks.{}.pre_mlp_norm", "model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
    ("blocks.{}.mlp.gate", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("blocks.{}.mlp.up", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("blocks.{}.mlp.down", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("blocks.{}.post_mlp_norm", "model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)
HUGGING_FACE = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs, _ in _NAMES}
GGUF = {f"{ours}.weight": f"{theirs}.weight" for ours, _, theirs in _NAMES}


def tensor_name_pairs(layers: int, tied: bool, table: Mapping[str, str] = HUGGING_FACE) -> Iterator[tuple[str, str]]:
    """Yield (our name, name in the format) for every tensor of a model."""
    for ours, theirs in table.items():
        if ours == "head.weight" and tied:
            continue
        for layer in range(layers if "{}" in ours else 1):
            yield ours.format(layer), theirs.format(layer)
