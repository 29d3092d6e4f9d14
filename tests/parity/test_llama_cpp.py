"""GGUF files in llama.cpp: its numbers are ours for every shape that Gemma 3 can have, and the certificate says so."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gemmule.evaluate.certificate import CertificateError, certify
from gemmule.formats.exports import Export, export_model, reopen
from gemmule.formats.gguf_file import GgufFile, storage_type_names
from gemmule.formats.k_quants import KINDS
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

pytest.importorskip("gguf", reason="the gguf library is not installed")
if find_spec("llama_cpp") is None:
    pytest.skip("llama.cpp is not installed: pip install 'gemmule[llama]'", allow_module_level=True)
pytestmark = pytest.mark.slow

SHAPES: dict[str, dict[str, Any]] = {
    "scalar of the head": {"query_pre_attn_scalar": 32},
    "another scalar": {"query_pre_attn_scalar": 12},
    "own bases": {"rope_theta": 30_000.0, "rope_local_base_freq": 500.0},
    "factor 8 on global layers": {"rope_scaling_factor": 8.0},
    "the official pattern": {"sliding_window_pattern": 6},
    "a longer window": {"sliding_window": 40},
    "untied": {"tie_word_embeddings": False},
    "as many key as query heads": {"num_key_value_heads": 4},
    "62 layers": {"num_hidden_layers": 62, "hidden_size": 64},
}


def model_of(tokenizer: Tokenizer, **changes: Any) -> Gemma3:
    """A model whose sizes llama.cpp has kernels for."""
    shape: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 96, "intermediate_size": 64, "head_dim": 32,
        "query_pre_attn_scalar": 32, "sliding_window": 12, "max_position_embeddings": 512,
    }  # fmt: skip
    return lively_model(tiny_config(**shape | changes))


def certificate_of(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: str) -> dict[str, Any]:
    artefact = export_model(Export(model, tokenizer, dtype), "gguf", folder / "model.gguf")
    return certify(artefact, "llama.cpp", dtype, (model, tokenizer), reopen(artefact, tokenizer))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str) -> None:
    found = certificate_of(model_of(tiny_tokenizer, **SHAPES[shape]), tiny_tokenizer, tmp_path, "f32")
    assert found["positions"] >= 20 * 12 or shape == "a longer window"
    assert found["argmax_agreement"] >= 0.995
    # llama.cpp looks gelu and softmax up in tables of fp16.
    assert found["largest_logit_difference_to_the_exported_model"] <= 0.02 * found["logit_standard_deviation"]
    assert found["passed"]


@pytest.mark.parametrize(("dtype", "least"), [("f16", 0.995), ("bf16", 0.995), ("q8_0", 0.95), ("q4_0", 0.9)])
def test_rounded_weights_mean_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path, dtype: str, least: float) -> None:
    found = certificate_of(model_of(tiny_tokenizer), tiny_tokenizer, tmp_path, dtype)
    assert found["argmax_agreement"] >= least
    assert found["passed"], found


@pytest.mark.parametrize("kind", KINDS)
def test_k_quants_are_made_and_read(tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    model = model_of(tiny_tokenizer, hidden_size=256, intermediate_size=512)
    found = certificate_of(model, tiny_tokenizer, tmp_path, kind)
    with GgufFile(tmp_path / "model.gguf") as file:
        assert {"Q3_K", "Q4_K", "Q5_K", "Q6_K"} & set(storage_type_names(info.kind for info in file.tensors.values()))
    assert found["passed"], found
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_seeds_shape_is_certified(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """89M parameters but for the vocabulary, which is the tests' small one."""
    config = Gemma3Config(
        vocab_size=tiny_tokenizer.vocab_size, hidden_size=512, intermediate_size=6144, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256, query_pre_attn_scalar=256, sliding_window=128,
    )  # fmt: skip
    model = Gemma3(config).eval()
    init_weights(model, seed=0)
    found = certificate_of(model, tiny_tokenizer, tmp_path, "bf16")
    assert found["positions"] == 2 * 128 + 32
    assert found["passed"], found


def test_a_model_that_differs_is_not_certified(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(tiny_tokenizer)
    artefact = export_model(Export(model, tiny_tokenizer, "f32"), "gguf", tmp_path / "model.gguf")
    other = model_of(tiny_tokenizer, sliding_window=13)
    found = certify(artefact, "llama.cpp", "f32", (other, tiny_tokenizer), (other, tiny_tokenizer))
    assert not found["passed"]


def test_what_llama_cpp_cannot_open_is_said(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(tiny_tokenizer)
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but no more than that")
    with pytest.raises(CertificateError, match=r"model\.gguf: llama\.cpp cannot open or run it"):
        certify(tmp_path / "model.gguf", "llama.cpp", "f32", (model, tiny_tokenizer), (model, tiny_tokenizer))
