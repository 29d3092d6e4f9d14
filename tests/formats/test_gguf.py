"""GGUF written and read again; what llama.cpp makes of it is in tests/parity."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmule.errors import ModelError, TokenizerError, UserError
from gemmule.formats.gguf import DTYPES, lint, load_gguf, load_gguf_tokenizer, metadata_of, save_gguf
from gemmule.formats.gguf_file import GgufFile
from gemmule.formats.gguf_tokenizer import read_vocabulary, write_vocabulary
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

library = pytest.importorskip("gguf", reason="the gguf library is not installed")


def silent(_: str) -> None:
    """Say nothing."""


def fitting_model(tokenizer: Tokenizer, **changes: Any) -> Gemma3:
    """A model whose rows fit blocks of 32, with as many of the vocabulary as there are tokens."""
    shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64}
    return lively_model(tiny_config(**shape | changes))


def written(model: Gemma3, tokenizer: Tokenizer, folder: Path, dtype: Any = "f32") -> Path:
    save_gguf(model, tokenizer, folder / "model.gguf", dtype, silent)
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


def test_rows_that_fit_no_block_stay_in_f32_and_it_is_said(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = fitting_model(tiny_tokenizer, intermediate_size=40)
    said: list[str] = []
    save_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", "q8_0", said.append)
    (remark,) = said
    assert "kept in f32, because q8_0 needs rows of a multiple of 32: blk.0.ffn_down.weight" in remark
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
    assert len(lint(tiny_config(rope_local_base_freq=50.0))) == 2
    assert lint(tiny_config(sliding_window_pattern=6)) == []
    vocabulary = write_vocabulary(tiny_tokenizer)
    assert vocabulary["tokenizer.ggml.add_space_prefix"] is False
    assert vocabulary["tokenizer.ggml.add_bos_token"] is True


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
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "do not fit"),
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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general.architecture": "llama"}, "general.architecture is 'llama', not 'gemma3'"),
        ({"gemma3.block_count": None}, "the metadata lack gemma3.block_count"),
        ({"gemma3.block_count": 8}, "lacks blk.7.attn_norm.weight, .* and 8 more"),
        ({"gemma3.block_count": 6}, "has also blk.6"),
        ({"gemma3.block_count": 2**31}, "gemma3.block_count tells of 2147483648 layers, but there are 93 tensors"),
        ({"gemma3.attention.head_count": 10**9}, "num_key_value_heads|hidden_size"),
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
    read_header = GgufFile._read_header

    def changed(self: GgufFile, *given: Any) -> None:
        read_header(self, *given)
        self.metadata = {key: value for key, value in (self.metadata | change).items() if value is not None}

    monkeypatch.setattr(GgufFile, "_read_header", changed)
    with pytest.raises(ModelError, match=sentence):
        load_gguf(path)


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
    for data in corruptions(whole, 400):
        path.write_bytes(data)
        try:
            model, _ = load_gguf(path)
        except UserError as error:
            complaints.append(str(error))
        else:
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert len(complaints) > 100
    assert [sentence for sentence in complaints if str(path) not in sentence or len(sentence) > 1500] == []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(60), "GGUF version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "cut short or damaged"),
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

    annotation = get_args(export.__annotations__["dtype"])[0]
    assert get_args(annotation) == (*DTYPES, *KINDS)
