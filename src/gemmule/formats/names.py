"""The one table of tensor names, read in both directions."""

from collections.abc import Iterator, Mapping

# ours -> Hugging Face's; {} is the layer.
HUGGING_FACE = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.pre_attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.post_attention_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.pre_mlp_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "blocks.{}.post_mlp_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

# ours -> GGUF's, which stores norms as 1 + weight.
GGUF = {
    "embedding.weight": "token_embd.weight",
    "blocks.{}.pre_attention_norm.weight": "blk.{}.attn_norm.weight",
    "blocks.{}.attention.query.weight": "blk.{}.attn_q.weight",
    "blocks.{}.attention.key.weight": "blk.{}.attn_k.weight",
    "blocks.{}.attention.value.weight": "blk.{}.attn_v.weight",
    "blocks.{}.attention.output.weight": "blk.{}.attn_output.weight",
    "blocks.{}.attention.query_norm.weight": "blk.{}.attn_q_norm.weight",
    "blocks.{}.attention.key_norm.weight": "blk.{}.attn_k_norm.weight",
    "blocks.{}.post_attention_norm.weight": "blk.{}.post_attention_norm.weight",
    "blocks.{}.pre_mlp_norm.weight": "blk.{}.ffn_norm.weight",
    "blocks.{}.mlp.gate.weight": "blk.{}.ffn_gate.weight",
    "blocks.{}.mlp.up.weight": "blk.{}.ffn_up.weight",
    "blocks.{}.mlp.down.weight": "blk.{}.ffn_down.weight",
    "blocks.{}.post_mlp_norm.weight": "blk.{}.post_ffw_norm.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def foreign_names(layers: int, tied: bool, table: Mapping[str, str] = HUGGING_FACE) -> Iterator[tuple[str, str]]:
    """Yield (our name, the format's name) for every tensor of a model."""
    for ours, theirs in table.items():
        if ours == "head.weight" and tied:
            continue
        for layer in range(layers if "{}" in ours else 1):
            yield ours.format(layer), theirs.format(layer)
