"""The one table of tensor names, read in both directions."""

from collections.abc import Iterator

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


def foreign_names(layers: int, tied: bool) -> Iterator[tuple[str, str]]:
    """Yield (our name, Hugging Face's name) for every tensor of a model."""
    for ours, theirs in HUGGING_FACE.items():
        if ours == "head.weight" and tied:
            continue
        for layer in range(layers if "{}" in ours else 1):
            yield ours.format(layer), theirs.format(layer)
