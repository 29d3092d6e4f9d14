"""GGUF written and read again; what llama.cpp makes of it is in tests/parity."""

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmule.errors import ModelError, TokenizerError, UserError
from gemmule.formats.gguf import DTYPES, load_gguf, load_gguf_tokenizer, metadata_of, runtime_caveats, save_gguf
from gemmule.formats.gguf_file import GgufHeader
from gemmule.formats.gguf_tokenizer import read_vocabulary, write_vocabulary
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

library = pytest.importorskip("gguf", reason="the gguf library is not installed")


def fitting_model(tokenizer: Tokenizer, **changes: Any) -> Gemma3:
    """A model whose rows fit blocks of 32, with as many of the vocabulary as there are tokens."""
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64}
    return lively_model(tiny_config(**shape | changes))


def written(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: Any = "f32") -> Path:
    save_gguf(model, tokenizer, folder / "model.gguf", dtype)
    return folder / "model.gguf"


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "scalar of the head": {"query_pre_attn_scalar": 8},
    "other bases": {"rope_theta": 3000.0, "rope_local_base_freq": 50.0},
    "no scaling": {"rope_scaling_factor": 1.0},
    "the official pattern": {"sliding_window_pattern": 6},
    "62 layers, which llama.cpp takes for the 27B": {"num_hidden_layers": 62},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read_back(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str) -> None:
    model = fitting_model(tiny_tokenizer, **SHAPES[shape])
    again, tokenizer = load_gguf(written(model, tiny_tokenizer, tmp_path))
    wide = model.config.num_hidden_layers == 62
    expected = model.config.replace(query_pre_attn_scalar=32 // 4 if wide else 8)
    assert again.config == expected, "the scalar is folded into the query norms"
    tokens = some_tokens(model.config)
    with torch.no_grad():
        assert greatest_difference(model(tokens), again(tokens)) < 1e-4
    assert tokenizer.fingerprint != tiny_tokenizer.fingerprint, "spaces are marked, as SentencePiece does"


@pytest.mark.parametrize(
    ("dtype", "share"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2), ("q5_1", 0.05), ("q5_0", 0.08), ("q4_0", 0.2)]
)
def test_rounded_weights_are_read_back_about_equal(
    tiny_tokenizer: Tokenizer, tmp_path: Path, dtype: str, share: float
) -> None:
    model = fitting_model(tiny_tokenizer)
    again, _ = load_gguf(written(model, tiny_tokenizer, tmp_path, dtype))
    for name, weight in model.state_dict().items():
        other = again.state_dict()[name]
        if weight.ndim == 1 and not name.endswith("query_norm.weight"):
            assert torch.allclose(weight, other, atol=1e-6), "norms are never rounded"
        elif weight.ndim == 2:
            assert 0 < (weight - other).norm() <= share * weight.norm(), name


def test_weights_are_read_in_the_dtype_that_is_asked_for(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = fitting_model(tiny_tokenizer)
    again, _ = load_gguf(written(model, tiny_tokenizer, tmp_path), dtype=torch.bfloat16)
    for name, weight in model.state_dict().items():
        if not name.endswith("query_norm.weight"):
            assert torch.allclose(again.state_dict()[name].float(), weight.bfloat16().float(), atol=1e-2), name
        assert again.state_dict()[name].dtype == torch.bfloat16


def test_rows_that_fit_no_block_stay_in_f32_and_it_is_said(
    messages: list[str], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = fitting_model(tiny_tokenizer, intermediate_size=40)
    save_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "q8_0")
    (remark,) = messages
    assert "kept in f32, because q8_0 needs rows in multiples of 32: blk.0.ffn_down.weight" in remark
    again, _ = load_gguf(tmp_path / "model.gguf")
    assert torch.equal(again.state_dict()["blocks.0.mlp.down.weight"], model.state_dict()["blocks.0.mlp.down.weight"])


def test_rows_beyond_the_vocabulary_are_left_out(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = fitting_model(tiny_tokenizer, vocab_size=tiny_tokenizer.vocab_size + 64)
    again, _ = load_gguf(written(model, tiny_tokenizer, tmp_path))
    assert again.config.vocab_size == tiny_tokenizer.vocab_size
    tokens = some_tokens(again.config)
    with torch.no_grad():
        assert greatest_difference(model(tokens)[..., : again.config.vocab_size], again(tokens)) < 1e-4


def test_the_metadata_name_everything_that_llama_cpp_could_take_otherwise(tiny_tokenizer: Tokenizer) -> None:
    keys = metadata_of(tiny_config(rope_local_base_freq=50.0))
    assert keys["gemma3.rope.freq_base_swa"] == 50.0
    assert keys["gemma3.attention.sliding_window_pattern"] == 3
    assert (keys["gemma3.rope.scaling.type"], keys["gemma3.rope.scaling.factor"]) == ("linear", 4.0)
    assert len(runtime_caveats(tiny_config(rope_local_base_freq=50.0))) == 2
    assert runtime_caveats(tiny_config(sliding_window_pattern=6)) == []
    vocabulary = write_vocabulary(tiny_tokenizer)
    assert vocabulary["tokenizer.ggml.add_space_prefix"] is False
    assert vocabulary["tokenizer.ggml.add_bos_token"] is True


def test_numbers_beyond_32_bits_are_written_as_the_largest(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    far = {"max_position_embeddings": 2**40, "sliding_window": 2**35, "sliding_window_pattern": 2**33}
    model = fitting_model(tiny_tokenizer)
    model.config = model.config.replace(**far)
    again, _ = load_gguf(written(model, tiny_tokenizer, tmp_path))
    assert again.config.max_position_embeddings == 2**31 - 1
    assert again.config.layer_kinds == model.config.layer_kinds


def test_the_vocabulary_is_the_same_after_both_ways(tiny_tokenizer: Tokenizer) -> None:
    again = read_vocabulary(write_vocabulary(tiny_tokenizer))
    texts = [*SENTENCES, "  a  b\n\n\tc 12.5", "\U0001f984 e\u0301 <end_of_turn>", "", " "]
    for text in texts:
        ids = tiny_tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == text
    once_more = write_vocabulary(again)
    assert once_more["tokenizer.ggml.tokens"] == write_vocabulary(tiny_tokenizer)["tokenizer.ggml.tokens"]
    assert (again.bos_id, again.eos_id, again.pad_id, again.unk_id) == (2, 1, 0, 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.model is 'gpt2'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "differ in length"),
        ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores is missing or damaged"),
        ({"tokenizer.ggml.token_type": ["x"]}, "tokenizer.ggml.token_type is missing or damaged"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "tokenizer.ggml.bos_token_id is 9999; there are 380 tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(
    tiny_tokenizer: Tokenizer, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TokenizerError, match=sentence):
        read_vocabulary(write_vocabulary(tiny_tokenizer) | change)


def changed_metadata(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> Callable[..., None]:
    """Let every file that is read have other metadata; None takes a key away."""
    read_header = GgufHeader._read_header

    def changed(self: GgufHeader, *given: Any) -> None:
        read_header(self, *given)
        self.metadata = {key: value for key, value in (self.metadata | change).items() if value is not None}

    monkeypatch.setattr(GgufHeader, "_read_header", changed)
    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general.architecture": "llama"}, "general.architecture is 'llama', not 'gemma3'"),
        ({"gemma3.block_count": None}, "the metadata lack gemma3.block_count"),
        ({"gemma3.block_count": 8}, "lacks blk.7.attn_norm.weight, .* and 8 more"),
        ({"gemma3.block_count": 6}, "has unexpected tensors: blk.6"),
        ({"gemma3.block_count": 10**6}, "gemma3.block_count is 1000000, but there are 93 tensors"),
        (
            {"gemma3.attention.head_count": 10**9},
            "num_attention_heads = 1000000000: must be a whole number from 1 to 1,048,576",
        ),
        ({"gemma3.attention.key_length": 2**62}, "head_dim = 4611686018427387904: must be a whole number from 1"),
        ({"gemma3.context_length": 10**18}, "max_position_embeddings = 10{18}: must be at most 9,007,199,254,740,992"),
        ({"gemma3.rope.freq_base": 1e-38}, "rope_theta = 1e-38: must be a number from 1e-30 to"),
        ({"gemma3.rope.freq_base": float("nan")}, "rope_theta = NaN: must be a number"),
        ({"gemma3.block_count": "7"}, "num_hidden_layers is '7', not a number or a boolean"),
        ({"gemma3.attention.layer_norm_rms_epsilon": 0.0}, "rms_norm_eps = 0.0: must be a number"),
        ({"gemma3.attention.sliding_window_pattern": [True, True, False, True, False, True, True]}, "not a repeating"),
        ({"gemma3.attention.sliding_window_pattern": [True, True, False]}, "one global layer for 7 layers"),
        (
            {"gemma3.final_logit_softcapping": 30.0},
            "gemma3.final_logit_softcapping is 30.0, which could change the log",
        ),
        (
            {"gemma3.attn_logit_softcapping": 50.0},
            "gemma3.attn_logit_softcapping is 50.0, which could change the logits",
        ),
        ({"gemma3.attention.scale": 0.5}, "gemma3.attention.scale is 0.5, which could change the logits"),
        ({"gemma3.expert_count": 8}, "gemma3.expert_count is 8, which could change the logits"),
        ({"gemma3.tomorrow": [1, 2]}, r"gemma3.tomorrow is \[1, 2\], which could change the logits"),
        ({"gemma3.attention.causal": False}, "gemma3.attention.causal is False; Gemmule supports only True"),
        ({"gemma3.rope.dimension_count": 4}, "gemma3.rope.dimension_count is 4; Gemmule supports only 8"),
        (
            {"gemma3.attention.value_length": 4},
            "gemma3.attention.value_length is 4; Gemmule supports only 8",
        ),
        ({"gemma3.rope.scaling.attn_factor": 2.0}, "gemma3.rope.scaling.attn_factor is 2.0"),
        ({"gemma3.rope.scaling.type": "longrope"}, "gemma3.rope.scaling.type is 'longrope'"),
        ({"split.count": 2, "split.no": 1}, "is part 2 of 2; name the first one"),
        ({"split.count": 2}, "is part 1 of 2; name it NAME-00001-of-00002.gguf, .*llama-gguf-split --merge"),
        ({"split.count": -3}, "split.count is -3"),
        ({"split.tensors.count": 4}, "split.tensors.count is 4; its parts have 93 tensors"),
        ({"gemma3.attention.sliding_window_pattern": [True, False]}, "sliding_window_pattern"),
        ({"gemma3.feed_forward_length": 32}, r"does not fit its metadata: blk.0.ffn_gate.weight is \[64, 32\]"),
        ({"gemma3.attention.head_count": 3}, "num_key_value_heads"),
        ({"gemma3.rope.scaling.type": "yarn"}, "gemma3.rope.scaling.type is 'yarn'"),
    ],
)
def test_metadata_that_do_not_fit_are_named(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], sentence: str
) -> None:
    path = written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path)
    changed_metadata(monkeypatch, change)
    with pytest.raises(ModelError, match=sentence):
        load_gguf(path)


ACCEPTED: dict[str, dict[str, Any]] = {
    "a pattern for each layer": {"gemma3.attention.sliding_window_pattern": [True, True, False] * 2 + [True]},
    "no key of the epsilon": {"gemma3.attention.layer_norm_rms_epsilon": None},
    "a cap of zero is none": {"gemma3.final_logit_softcapping": 0.0, "gemma3.attn_logit_softcapping": 0.0},
    "what the sizes say anyway": {"gemma3.vocab_size": 380, "gemma3.rope.dimension_count": 8},
    "Ollama's bases": {"gemma3.rope.freq_base_swa": None, "gemma3.rope.local.freq_base": 10_000.0,
                       "gemma3.rope.freq_base": None, "gemma3.rope.global.freq_base": 1_000_000.0},
    "no type of scaling is linear, as in llama.cpp": {"gemma3.rope.scaling.type": None},
    "what only yarn reads": {"gemma3.rope.scaling.original_context_length": 8192},
    "keys of other groups": {"general.name": "x", "quantize.imatrix.file": "y", "tokenizer.ggml.pre": "z"},
}  # fmt: skip


@pytest.mark.parametrize("form", ACCEPTED)
def test_other_legal_forms_are_read_alike(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path)
    config = load_gguf(path)[0].config
    changed_metadata(monkeypatch, ACCEPTED[form])
    assert load_gguf(path)[0].config == config


def test_bases_that_ollama_names_are_used(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path)
    changed_metadata(monkeypatch, {"gemma3.rope.freq_base_swa": None, "gemma3.rope.local.freq_base": 77.0})
    assert load_gguf(path)[0].config.rope_local_base_freq == 77.0


def test_ollamas_multimodal_files_have_googles_scaling_and_give_their_text_part(
    messages: list[str], tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fitting_model(tiny_tokenizer, rope_scaling_factor=1.0, max_position_embeddings=131_072)
    path = written(model, tiny_tokenizer, tmp_path)
    vision = {"gemma3.vision.block_count": 27, "gemma3.mm.tokens_per_image": 256}
    read_header = changed_metadata(monkeypatch, vision)

    def with_vision(self: GgufHeader, *given: Any) -> None:
        read_header(self, *given)
        self.tensors["v.blk.0.attn_q.weight"] = self.tensors["mm.input"] = self.tensors["output_norm.weight"]

    monkeypatch.setattr(GgufHeader, "_read_header", with_vision)
    assert load_gguf(path)[0].config.rope_scaling_factor == 8.0
    assert messages == [
        f"{path}: has no RoPE scaling factor; 8 is used, as in Google's multimodal models",
        "skipped the vision encoder, 2 of 95 tensors; Gemmule loads the text model",
    ]


def split(whole: Path, folder: Path, parts: int) -> list[Path]:
    """Write a model in parts, as llama-gguf-split does."""
    reader = library.GGUFReader(whole)
    files = [folder / f"model-{part + 1:05}-of-{parts:05}.gguf" for part in range(parts)]
    for number, file in enumerate(files):
        writer = library.GGUFWriter(file, "gemma3")
        skipped = {"general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
        for field in (field for field in reader.fields.values() if number == 0 and field.name not in skipped):
            inner = field.types[-1] if field.types[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        for key, value in (("no", number), ("count", parts)):
            writer.add_uint16(f"split.{key}", value)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def test_a_model_in_parts_is_read_from_all_of_them(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path, "q8_0")
    first, second, third = split(whole, tmp_path, 3)
    expected, model = load_gguf(whole)[0], load_gguf(first)[0]
    assert model.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    with pytest.raises(ModelError, match=f"{second.name}: is part 2 of 3; name the first one"):
        load_gguf(second)
    third.write_bytes(second.read_bytes())
    with pytest.raises(ModelError, match=f"{third.name}: is not part 3 of .*{first.name}"):
        load_gguf(first)
    third.unlink()
    with pytest.raises(ModelError, match=f"{third.name}: no such file"):
        load_gguf(first)


def test_a_chat_template_is_the_same_after_both_ways(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    several = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    for entry, count in (("{{ messages }}\n▁", 1), (several, 2), (several[1:], 1)):
        tokenizer = Tokenizer(json.dumps(tiny_tokenizer.description), config | {"chat_template": entry})
        assert len(tokenizer.chat_templates) == count
        file = written(fitting_model(tokenizer), tokenizer, tmp_path)
        again = load_gguf(file)[1]
        assert again.chat_templates == tokenizer.chat_templates
        again.save(tmp_path)
        assert Tokenizer.load(tmp_path).chat_templates == tokenizer.chat_templates
    assert library.GGUFReader(file).fields["tokenizer.chat_template.tool_use"].contents() == "{{ b }}"
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template is not a string"):
        read_vocabulary(write_vocabulary(tiny_tokenizer) | {"tokenizer.chat_template": 7})


def test_eos_is_added_where_the_file_says_so(tiny_tokenizer: Tokenizer) -> None:
    again = read_vocabulary(write_vocabulary(tiny_tokenizer) | {"tokenizer.ggml.add_eos_token": True})
    assert again.encode("the fox") == [*tiny_tokenizer.encode("the fox"), 1]
    both = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": False}
    again = read_vocabulary(write_vocabulary(tiny_tokenizer) | both)
    assert again.encode("the fox") == [*tiny_tokenizer.encode("the fox")[1:], 1]


def vocabulary_of(pieces: list[str]) -> dict[str, Any]:
    """The keys of a file with these pieces after four special tokens."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }


def test_pieces_that_contain_each_other_are_bounded() -> None:
    with pytest.raises(TokenizerError, match="has 500 characters, more than the limit of 256"):
        read_vocabulary(vocabulary_of(["a" * size for size in range(1, 501)]))
    pieces = [letter * size for letter in map(chr, range(0x3041, 0x3041 + 60)) for size in range(1, 61)]
    assert read_vocabulary(vocabulary_of(pieces)).encode("ぁ" * 60)[1:] == [63]
    pieces = [letter * size for letter in map(chr, range(0x4E00, 0x4E00 + 20)) for size in range(1, 257)]
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError, match="too many merges between 5120 pieces"):
            read_vocabulary(vocabulary_of(pieces))
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_the_library_reads_what_we_write(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = fitting_model(tiny_tokenizer)
    reader = library.GGUFReader(written(model, tiny_tokenizer, tmp_path, "bf16"))
    assert reader.fields["general.architecture"].contents() == "gemma3"
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    assert torch.allclose(torch.from_numpy(norm.data.copy()), 1 + model.norm.weight.detach())


def test_every_type_that_the_library_dequantises_is_read() -> None:
    import numpy as np

    from gemmule.formats.gguf_file import _block, _dequantizer

    kinds = [kind for kind in library.GGMLQuantizationType if _block(kind) is not None]
    names = {kind.name for kind in kinds}
    assert {
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
    } <= names
    for kind in kinds:
        elements, size = _block(kind) or (0, 0)
        assert _dequantizer(kind)(np.zeros((2, 3 * size), dtype=np.uint8)).shape == (2, 3 * elements), kind.name


def test_a_full_disk_leaves_nothing_behind(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="no space left on the device"):
        written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def corruptions(whole: bytes, count: int) -> list[bytes]:
    """Bit flips (most of them in the header), truncations, zeroed and exchanged ranges, drawn from a seed."""
    draw = random.Random(0)
    header = whole.index(b"output_norm.weight")
    damaged = []
    for number in range(count):
        data = bytearray(whole)
        place = draw.randrange(header if number % 4 else len(data))
        match number % 5:
            case 0 | 1:
                data[place] ^= 1 << draw.randrange(8)
            case 2:
                del data[place:]
            case 3:
                data[place : place + 8] = bytes([draw.choice((0, 0xFF))]) * 8
            case _:
                other = draw.randrange(len(data) - 16)
                data[place : place + 16] = data[other : other + 16]
        damaged.append(bytes(data))
    return damaged


def test_damaged_files_end_in_a_sentence_or_in_a_load(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = written(fitting_model(tiny_tokenizer), tiny_tokenizer, tmp_path).read_bytes()
    path, complaints = tmp_path / "damaged.gguf", []
    for data in corruptions(whole, 200):
        path.write_bytes(data)
        try:
            model, _ = load_gguf(path)
        except UserError as error:
            complaints.append(str(error))
        else:
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(complaints) > 50
    assert [sentence for sentence in complaints if str(path) not in sentence or len(sentence) > 1500] == []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(60), "GGUF version 9"),
        (
            b"GGUF" + (3).to_bytes(4, "big") + bytes(60),
            "a big-endian file; Gemmule reads versions 2 and 3, little-endian",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the file itself"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "truncated or damaged"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, data: bytes | None, sentence: str) -> None:
    path = tmp_path / "model.gguf"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ModelError, match=sentence):
        load_gguf_tokenizer(path)


def test_dtypes_are_those_of_the_command() -> None:
    from typing import get_args

    from gemmule.cli.export import export
    from gemmule.formats.k_quants import KINDS

    names, _ = get_args(get_args(export.__annotations__["dtype"])[0])  # or None
    assert {*get_args(names)} == {*DTYPES, *KINDS, "int8"}  # which the packed file has
