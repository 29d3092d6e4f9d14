"""Folders that transformers writes, text and multimodal, whole and in shards: ours predicts the same from them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gemmule.formats.folder import load_folder
from gemmule.formats.safetensors_reader import INDEX
from gemmule.tokenizer import Tokenizer
from tiny import greatest_difference

transformers = pytest.importorskip("transformers", reason="transformers, which writes the folders, is not installed")
pytestmark = [
    pytest.mark.slow,
    # Deprecations between torch and transformers are theirs to settle.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]

TEXT: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention" if (i + 1) % 3 else "full_attention" for i in range(7)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 4,
    "patch_size": 2,
}  # fmt: skip


def text_model() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))


def multimodal_model() -> Any:
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [text_model, multimodal_model])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_transformers_saves_predicts_the_same(
    messages: list[str], build: Any, sharded: bool, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = build().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    tiny_tokenizer.save(tmp_path)
    assert (tmp_path / INDEX).exists() == sharded
    ours, _ = load_folder(tmp_path)
    assert len(messages) == (build is multimodal_model)
    tokens = torch.randint(48, (2, 23))
    with torch.no_grad():
        assert greatest_difference(ours(tokens), theirs(input_ids=tokens).logits) <= 1e-4
