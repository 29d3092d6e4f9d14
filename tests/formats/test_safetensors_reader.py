"""Weights as others lay them out: in shards, in a multimodal checkpoint, with the head stored twice, in odd formats."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.errors import ModelError
from gemmule.formats.folder import load_folder, save_folder
from gemmule.formats.safetensors_reader import INDEX, WEIGHTS
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model() -> Gemma3:
    return lively_model(tiny_config())


@pytest.fixture
def folder(model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_folder(model, tiny_tokenizer, tmp_path)
    return tmp_path


def assert_same_weights(model: Gemma3, other: Gemma3) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS)


def edit_config(folder: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def shard(folder: Path, parts: int = 3) -> dict[str, str]:
    """Cut the weights into shards, as published models are; return where each tensor went."""
    tensors = load_file(folder / WEIGHTS)
    placed = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {name: tensor.clone() for name, tensor in list(tensors.items())[part::parts]}
        save_file(mine, folder / file)
        placed |= dict.fromkeys(mine, file)
    (folder / WEIGHTS).unlink()
    write_index(folder, placed)
    return placed


def write_index(folder: Path, placed: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def test_shards_are_one_model(model: Gemma3, folder: Path) -> None:
    shard(folder)
    assert_same_weights(load_folder(folder)[0], model)


def test_one_file_is_read_where_an_index_lies_beside_it(model: Gemma3, folder: Path) -> None:
    write_index(folder, {"model.norm.weight": "elsewhere.safetensors"})
    assert_same_weights(load_folder(folder)[0], model)


def test_missing_shard_is_named(folder: Path) -> None:
    placed = shard(folder)
    lost = folder / placed["model.norm.weight"]
    lost.unlink()
    with pytest.raises(ModelError, match=rf"{re.escape(str(lost))}: no such file; .* or all its shards$"):
        load_folder(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    placed = shard(folder)
    other = next(file for file in sorted(set(placed.values())) if file != placed["model.norm.weight"])
    save_file(load_file(folder / other) | {"model.norm.weight": torch.zeros(24)}, folder / other)
    with pytest.raises(
        ModelError, match=r"-of-00003\.safetensors: holds model\.norm\.weight, which model-\S+ holds too$"
    ):
        load_folder(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder: Path) -> None:
    placed = shard(folder)
    write_index(folder, placed | {"model.nothing": placed["model.norm.weight"]})
    with pytest.raises(ModelError, match=r"index\.json: disagrees with the files about model\.nothing$"):
        load_folder(folder)
    del placed["model.norm.weight"]
    write_index(folder, placed)
    with pytest.raises(ModelError, match=r"index\.json: disagrees with the files about model\.norm\.weight$"):
        load_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors", "..\\outside.safetensors", "",
        "..", "config.json", "x\n.safetensors", "x\0.safetensors", "\ud800.safetensors", "x" * 5000, 7, None, ["x"],
    ],
)  # fmt: skip
def test_an_index_opens_nothing_outside_of_its_folder(folder: Path, name: object) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    placed = shard(folder)
    write_index(folder, placed | {"model.norm.weight": name})
    with pytest.raises(ModelError, match=r"weight_map names .{1,90}, not a \.safetensors file of this folder$"):
        load_folder(folder)


@pytest.mark.parametrize("placed", [{}, None, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(folder: Path, placed: object) -> None:
    shard(folder)
    write_index(folder, placed)
    with pytest.raises(ModelError, match=r"index\.json: has no weight_map"):
        load_folder(folder)


def first_layout(tensors: Tensors) -> Tensors:
    """Name tensors as the multimodal checkpoints that Google published do."""
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | {
        "vision_tower.vision_model.embeddings.patch_embedding.bias": torch.ones(3),
        "multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(3),
    }


def present_layout(tensors: Tensors) -> Tensors:
    """Name tensors as transformers saves a multimodal model today."""
    inner = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    return inner | {
        "model.vision_tower.vision_model.embeddings.patch_embedding.bias": torch.ones(3),
        "model.multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(3),
    }


@pytest.mark.parametrize("layout", [first_layout, present_layout])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_text_of_a_multimodal_model_is_taken_and_that_is_said(
    messages: list[str],
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    layout: Callable[[Tensors], Tensors],
    tied: bool,
    sharded: bool,
) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=tied))
    save_folder(model, tiny_tokenizer, tmp_path)
    rewrite(tmp_path, layout)
    edit_config(tmp_path, lambda text: {"model_type": "gemma3", "text_config": text, "vision_config": {}})
    if sharded:
        shard(tmp_path)
    again, _ = load_folder(tmp_path)
    assert again.config == model.config
    assert_same_weights(again, model)
    assert messages == [f"skipped the vision encoder, 2 of {95 + (not tied)} tensors; Gemmule loads the text model"]


def test_nothing_is_said_of_a_text_model(messages: list[str], folder: Path) -> None:
    load_folder(folder)
    assert messages == []


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"language_model.model.norm.weight": torch.zeros(24)})
    words = r"(\S*model\.norm\.weight) and (\S*model\.norm\.weight) are the same tensor$"
    with pytest.raises(ModelError, match=words):
        load_folder(folder)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(model: Gemma3, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same_weights(load_folder(folder)[0], model)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.* set it to false"):
        load_folder(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"][:3]})
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from"):
        load_folder(folder)


def test_an_untied_head_that_is_missing_is_named(folder: Path) -> None:
    edit_config(folder, lambda config: config | {"tie_word_embeddings": False})
    with pytest.raises(ModelError, match=r"model\.safetensors: lacks lm_head\.weight$"):
        load_folder(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_a_dtype_can_be_asked_for(model: Gemma3, folder: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    rewrite(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    expected = wanted or (torch.float32 if stored == torch.float16 else stored)
    assert_same_weights(load_folder(folder, dtype=wanted)[0], model.to(stored).to(expected))


def test_weights_of_several_dtypes_are_computed_in_fp32(folder: Path) -> None:
    norm = "model.norm.weight"
    rewrite(folder, lambda tensors: {k: v if k == norm else v.bfloat16() for k, v in tensors.items()})
    assert {tensor.dtype for tensor in load_folder(folder)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_weights_in_another_format_are_named(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(24).to(dtype)})
    with pytest.raises(ModelError, match=r"is not of F32, BF16, F16: model\.norm\.weight is (I32|F64|BOOL|F8_E4M3)$"):
        load_folder(folder)


@pytest.mark.parametrize("layers", [94, 1 << 20])
def test_more_layers_than_tensors_are_refused_before_they_are_built(folder: Path, layers: int) -> None:
    edit_config(folder, lambda config: config | {"num_hidden_layers": layers, "layer_types": None})
    words = rf"num_hidden_layers is {layers}, but model\.safetensors has only 93 tensors$"
    with pytest.raises(ModelError, match=words):
        load_folder(folder)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "head_dim", "vocab_size"])
def test_sizes_that_would_fill_any_memory_are_compared_first(folder: Path, key: str) -> None:
    edit_config(folder, lambda config: config | {key: 1 << 20})
    with pytest.raises(ModelError, match=r"does not fit config\.json"):
        load_folder(folder)


def test_a_name_that_would_break_the_line_is_escaped(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"two\nlines": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"has unexpected tensors: 'two\\nlines'$"):
        load_folder(folder)
