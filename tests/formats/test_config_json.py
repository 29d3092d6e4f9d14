"""config.json in both dialects."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.errors import ModelError
from gemmule.formats.config_json import read_config, read_json, write_config
from gemmule.model.config import Gemma3Config
from tiny import tiny_config

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
        ({"attention_bias": True}, "config.json: attention_bias is True; Gemma 3 has False"),
        ({"final_logit_softcapping": 30.0}, "config.json: final_logit_softcapping is 30.0; Gemma 3 has None"),
        ({"attn_logit_softcapping": 50.0}, "config.json: attn_logit_softcapping is 50.0; Gemma 3 has None"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; Gemma 3 has 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; Gemma 3 has False"),
        (
            {"rope_parameters": {GLOBAL: {"rope_type": "yarn", "factor": 8.0}}},
            "RoPE scaling is 'yarn'; Gemma 3 has 'default' or 'linear'",
        ),
        (
            {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 8.0}}},
            "RoPE scaling is 'linear'; Gemma 3 has 'default'",
        ),
        ({"rope_parameters": {GLOBAL: {"rope_type": "linear"}}}, "RoPE scaling is 'linear' without a factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling is 'dynamic'"),
        ({"rope_parameters": 8}, "config.json: rope_parameters is 8, not an object"),
        ({"text_config": [1]}, "config.json: text_config is [1], not an object"),
        ({"hidden_size": "wide"}, "config.json: hidden_size is 'wide', not a number or a boolean"),
        ({"num_hidden_layers": 7.0}, "config.json: num_hidden_layers = 7.0: "),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers = true: "),
        (
            {"max_position_embeddings": 10**18},
            "max_position_embeddings = 1000000000000000000: must be at most 9,007,199,254,740,992",
        ),
        ({"hidden_size": 10**400}, "hidden_size is 100000000000000000...0000000000000000000, too large for the size"),
        (
            {"rope_theta": 1e300, "rope_parameters": None},
            "rope_theta = 1e+300: must be a number from 1e-30 to 1e+30",
        ),
        (
            {"rope_theta": 1e-300, "rope_parameters": None},
            "rope_theta = 1e-300: must be a number from 1e-30 to 1e+30",
        ),
        ({"rms_norm_eps": 0}, "config.json: rms_norm_eps = 0: must be a number from 1e-30"),
        ({"sliding_window_pattern": 10**18, "layer_types": None}, "sliding_window_pattern = 1000000000000000000: must"),
        ({"hidden_size": 24.5}, "config.json: hidden_size = 24.5: must be a whole number from 1 to 1,048,576"),
        (
            {"num_attention_heads": 10**12},
            "num_attention_heads = 1000000000000: must be a whole number from 1 to 1,048,576",
        ),
        ({"rope_theta": [1e6], "rope_parameters": None}, "config.json: rope_theta is [1000000.0], not a number"),
        ({"rms_norm_eps": float("inf")}, "config.json: rms_norm_eps = Infinity: must be a number from"),
        (
            {"hidden_size": 0, "head_dim": 7},
            "config.json: hidden_size = 0: must be a whole number from 1 to 1,048,576; head_dim = 7",
        ),
        ({"hidden_size": 0}, "hidden_size = 0: must be a whole number from 1 to 1,048,576"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads"),
        ({"layer_types": [LOCAL, GLOBAL]}, "do not name num_hidden_layers = 7 layers"),
        ({"layer_types": "all"}, "config.json: layer_types 'all' do not name num_hidden_layers = 7 layers"),
        ({"layer_types": [GLOBAL, *[LOCAL] * 6]}, "do not repeat a pattern"),
        ({"layer_types": [LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL]}, "do not repeat a pattern"),
        ({"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, "chunked_attention", LOCAL]}, "not repeat a pattern"),
    ],
)
def test_config_of_another_architecture_is_refused(changes: dict[str, Any], sentence: str) -> None:
    table = write_config(tiny_config(), None) | changes
    with pytest.raises(ModelError, match=re.escape(sentence)):
        read_config(table, ORIGIN)


def test_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"hidden_size": 24}')
    assert read_json(tmp_path / "config.json") == {"hidden_size": 24}


def test_a_factor_without_linear_scaling_means_nothing_as_in_transformers() -> None:
    table = {"model_type": "gemma3_text", "rope_parameters": {GLOBAL: {"rope_type": "default", "factor": 8.0}}}
    assert read_config(table, ORIGIN).rope_scaling_factor == 1.0


@pytest.mark.parametrize(("outer", "inner", "tied"), [(False, True, False), (True, None, True), (None, False, False)])
def test_a_multimodal_model_says_itself_whether_its_head_is_tied(
    outer: bool | None, inner: bool | None, tied: bool
) -> None:
    text = {"model_type": "gemma3_text"} | ({} if inner is None else {"tie_word_embeddings": inner})
    table = {"text_config": text} | ({} if outer is None else {"tie_word_embeddings": outer})
    assert read_config(table, ORIGIN).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"{", "cannot be read: "),
        (b'{"model_type": ', "cannot be read: "),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"rope_theta": NaN}', "cannot be read: NaN is not a JSON number"),
        (b'{"rope_theta": -Infinity}', "cannot be read: -Infinity is not a JSON number"),
        (b'{"x": ' + b"[" * 200_000, "cannot be read: nested too deeply"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "cannot be read: Exceeds the limit"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"{path}: {words}")):
        read_json(path)
