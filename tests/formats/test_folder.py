import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemmule.errors import ModelError, TokenizerError
from gemmule.formats.folder import load_folder, read_config, save_folder, write_config
from gemmule.model.attention import KERNELS
from gemmule.model.config import Gemma3Config
from gemmule.tokenizer import Tokenizer
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

ORIGIN = Path("config.json")

# What Google's config.json files say of the text model where transformers' default is not meant.
GOOGLE = {
    "4b": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34},
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
    "27b": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    },
}


@pytest.fixture
def folder(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    save_folder(lively_model(tiny_config()), tiny_tokenizer, tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_model_gives_identical_logits(
    tiny_tokenizer: Tokenizer, tmp_path: Path, tied: bool, kernel: str
) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=tied, dropout=0.1, attention_dropout=0.2), kernel)
    save_folder(model, tiny_tokenizer, tmp_path)
    again, tokenizer = load_folder(tmp_path, kernel)
    tokens = some_tokens(model.config)
    assert not again.training
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    assert tokenizer.fingerprint == tiny_tokenizer.fingerprint


def test_loaded_model_can_be_trained_on(folder: Path) -> None:
    model, _ = load_folder(folder)
    model(some_tokens(model.config)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dtype_of_the_weights_is_kept_and_named(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(lively_model(tiny_config()).bfloat16(), tiny_tokenizer, tmp_path)
    model, _ = load_folder(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_weights_stored_in_fp16_are_computed_in_fp32(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(lively_model(tiny_config()).half(), tiny_tokenizer, tmp_path)
    model, _ = load_folder(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_folder_says_how_texts_begin_and_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 1, 0)
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (2, [1, 5], 0)


def configs() -> st.SearchStrategy[Gemma3Config]:
    counts = st.integers(1, 9)
    numbers = st.floats(1, 1e7)
    return st.builds(
        lambda heads, group, half, wide, **others: Gemma3Config(
            num_attention_heads=heads * group,
            num_key_value_heads=heads,
            head_dim=2 * half,
            hidden_size=heads * group * wide,
            **others,
        ),
        *[counts] * 4,
        vocab_size=counts,
        intermediate_size=counts,
        num_hidden_layers=counts,
        query_pre_attn_scalar=counts,
        sliding_window=counts,
        sliding_window_pattern=counts,
        rope_theta=numbers,
        rope_local_base_freq=numbers,
        rope_scaling_factor=numbers,
        max_position_embeddings=counts,
        rms_norm_eps=st.floats(1e-9, 1),
        tie_word_embeddings=st.booleans(),
        initializer_range=st.floats(1e-3, 1),
        dropout=st.floats(0, 0.9),
        attention_dropout=st.floats(0, 0.9),
    )


NEW_DIALECT = {"rope_parameters", "layer_types"}
OLD_DIALECT = {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}


@given(configs())
def test_either_dialect_reads_back_to_the_same_config(config: Gemma3Config) -> None:
    table = json.loads(json.dumps(write_config(config, None)))
    assert table.keys() >= NEW_DIALECT | OLD_DIALECT
    assert read_config(table, ORIGIN) == config
    assert read_config({key: table[key] for key in table.keys() - NEW_DIALECT}, ORIGIN) == config
    new = read_config({key: table[key] for key in table.keys() - OLD_DIALECT}, ORIGIN)
    # A list of layer types cannot tell by how much the pattern is longer than the model.
    assert new.layer_kinds == config.layer_kinds
    assert new.replace(sliding_window_pattern=1) == config.replace(sliding_window_pattern=1)


@pytest.mark.parametrize("size", GOOGLE)
def test_absent_keys_mean_what_they_mean_to_transformers(size: str) -> None:
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text = GOOGLE[size] | {"model_type": "gemma3_text", "rope_scaling": scaling, "sliding_window": 1024}
    table = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    assert read_config(table, ORIGIN) == Gemma3Config.model_validate({"size": size})


def test_scaling_may_be_called_by_its_older_name() -> None:
    table = {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}
    assert read_config(table, ORIGIN).rope_scaling_factor == 8.0


def test_layer_types_outrank_a_pattern_that_contradicts_them() -> None:
    table = write_config(tiny_config(sliding_window_pattern=99), None) | {"sliding_window_pattern": 3}
    assert set(read_config(table, ORIGIN).layer_kinds) == {"local"}


LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "config.json: model_type is 'llama'; Gemmule opens 'gemma3_text' models"),
        ({"model_type": None}, "config.json: model_type is None; Gemmule opens"),
        ({"attention_bias": True}, "config.json: attention_bias is True; for Gemma 3 it is False"),
        ({"final_logit_softcapping": 30.0}, "config.json: final_logit_softcapping is 30.0; for Gemma 3 it is None"),
        ({"attn_logit_softcapping": 50.0}, "config.json: attn_logit_softcapping is 50.0; for Gemma 3 it is None"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; for Gemma 3 it is 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; for Gemma 3 it is False"),
        (
            {"rope_parameters": {GLOBAL: {"rope_type": "yarn", "factor": 8.0}}},
            "rotary scaling is 'yarn'; for Gemma 3 it is 'default' or 'linear'",
        ),
        (
            {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 8.0}}},
            "rotary scaling is 'linear'; for Gemma 3 it is 'default'",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling is 'dynamic'"),
        ({"rope_parameters": 8}, "config.json: rope_parameters is 8, not an object"),
        ({"text_config": [1]}, "config.json: text_config is [1], not an object"),
        ({"hidden_size": "wide"}, 'hidden_size = "wide": value should be a valid integer'),
        ({"hidden_size": 0}, "hidden_size = 0: value should be greater than 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads"),
        ({"layer_types": [LOCAL, GLOBAL]}, "do not name num_hidden_layers = 7 layers"),
        ({"layer_types": "all"}, "config.json: layer_types all do not name num_hidden_layers = 7 layers"),
        ({"layer_types": [GLOBAL, *[LOCAL] * 6]}, "are not a repeating pattern"),
        ({"layer_types": [LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL]}, "are not a repeating pattern"),
        ({"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, "chunked_attention", LOCAL]}, "not a repeating pattern"),
    ],
)
def test_config_of_another_architecture_is_refused(changes: dict[str, Any], sentence: str) -> None:
    table = write_config(tiny_config(), None) | changes
    with pytest.raises(ModelError, match=re.escape(sentence)):
        read_config(table, ORIGIN)


def test_missing_tensor_is_named(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.3.mlp.up_proj.weight"]

    edit_tensors(folder, change)
    with pytest.raises(ModelError, match=r"model\.safetensors: lacks model\.layers\.3\.mlp\.up_proj\.weight$"):
        load_folder(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mlp.up_proj.bias"] = torch.zeros(1)

    edit_tensors(folder, change)
    with pytest.raises(ModelError, match=r"model\.safetensors: has also model\.layers\.3\.mlp\.up_proj\.bias$"):
        load_folder(folder)


def test_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(25)

    edit_tensors(folder, change)
    with pytest.raises(ModelError, match=r"does not fit config\.json: norm\.weight is \[25\], not \[24\]$"):
        load_folder(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=8, layer_types=None)
    with pytest.raises(ModelError, match=r"lacks (model\.layers\.7\S+, ){4}model\.layers\.7\S+ and 8 more$"):
        load_folder(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_damaged(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or not a safetensors file"):
        load_folder(folder)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    torch.save({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or not a safetensors file"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"{re.escape(name)}: no such file; a model folder has config.json and"):
        load_folder(folder)


def test_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_in_place_of_a_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ModelError, match=re.escape(name)):
        load_folder(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model_type": ', b"\xff\xfe", b"[1, 2]", b"null"])
def test_damaged_config_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: (cannot be read|holds no JSON object)"):
        load_folder(folder)


def test_name_of_the_folder_changes_nothing(folder: Path) -> None:
    tokens = some_tokens(tiny_config())
    before = load_folder(folder)[0](tokens)
    moved = folder.rename(folder.with_name("llama-27b-gguf"))
    assert greatest_difference(load_folder(moved)[0](tokens), before) == 0
