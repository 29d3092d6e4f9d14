"""The packed file: what is written is read again, and what is damaged is refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import SHAPES, altered, forged, model_of, rounded

from gemmule.errors import ModelError, TokenizerError
from gemmule.formats.packed import DTYPES, TRAILER, load_packed, save_packed
from gemmule.formats.packed_vocabulary import pack_vocabulary
from gemmule.tokenizer import Tokenizer
from tiny import greatest_difference, some_tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_read_as_it_was_written(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str, dtype: str) -> None:
    model = model_of(**SHAPES[shape])
    save_packed(model, tiny_tokenizer, tmp_path / "model.packed", dtype, "A name")
    packed = load_packed(tmp_path / "model.packed")
    assert (packed.name, packed.dtype) == ("A name", dtype)
    assert packed.model.config.layer_kinds == model.config.layer_kinds
    tokens = some_tokens(model.config)
    with torch.no_grad():
        difference = greatest_difference(packed.model(tokens), rounded(model, dtype)(tokens))
    assert difference < 1e-5


def test_the_scale_of_a_bf16_embedding_is_kept(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of().bfloat16()
    save_packed(model, tiny_tokenizer, tmp_path / "model.packed", "f32", "x")
    packed = load_packed(tmp_path / "model.packed").model
    scale = model.embedding.weight.new_tensor(24**0.5).item()
    assert scale != 24**0.5
    scaled = packed.embedding.weight * 24**0.5
    assert torch.allclose(scaled, model.embedding.weight.float() * scale, rtol=1e-6)
    assert packed.head is not None
    assert torch.equal(packed.head.weight, model.embedding.weight.float())


def test_the_vocabulary_is_that_of_the_tokenizer(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_packed(model_of(vocab_size=400), tiny_tokenizer, tmp_path / "model.packed", "int8", "x")
    vocabulary = load_packed(tmp_path / "model.packed").vocabulary
    for one, other in zip(vocabulary, pack_vocabulary(tiny_tokenizer, 400), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    starts = vocabulary.token_starts.tolist()
    texts = [vocabulary.token_texts[starts[i] : starts[i + 1]] for i in range(400)]
    assert texts == [tiny_tokenizer.piece(token) for token in range(400)]
    assert (vocabulary.bos, vocabulary.stops) == (tiny_tokenizer.bos_id, (1, 5))


@pytest.fixture(scope="module")
def whole(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.packed"
    save_packed(model_of(num_hidden_layers=3), tiny_tokenizer, path, "int8", "x")
    return path.read_bytes()


def test_a_packed_file_is_found_at_the_end_of_a_program(whole: bytes, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF and more" + whole + TRAILER.pack(len(whole), b"GEMMPACK"))
    assert load_packed(program).name == "x"


def boundaries(whole: bytes) -> Iterator[int]:
    """Yield the ends of the beginning, the header and every array, and bytes beside them."""
    length = int.from_bytes(whole[56:64], "little")
    header = json.loads(whole[64 : 64 + length])
    for place in {0, 8, 12, 16, 48, 56, 64, *(64 + length + x for starts in header["arrays"].values() for x in starts)}:
        yield from {max(0, place - 1), place, place + 1}


def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for end in {*boundaries(whole), len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match=rf"{path}: is (truncated|not a packed file)"):
            load_packed(path)


def test_a_flipped_bit_is_refused_wherever_it_is(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped"
    for place in {*boundaries(whole), *range(64), len(whole) - 1}:
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            with pytest.raises(
                ModelError, match=rf"{path}: is (damaged|truncated|not a packed|a packed file of version)"
            ):
                load_packed(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 381}, {"vocab_size": 2**20}, {"vocab_size": -1}, {"vocab_size": "380"}, {"head_dim": 7},
        {"num_merges": 2**39}, {"num_merges": -1}, {"num_merges": 1.0}, {"layer_kinds": [0, 0]},
        {"layer_kinds": [1, 0, 0]}, {"layer_kinds": 3}, {"windows": [5]}, {"windows": [5, 5]}, {"windows": [-5, 0]},
        {"rope_factors": [2.0, 4.0]}, {"dtype": "int4"}, {"tied": 0}, {"tied": 2}, {"embedding_scale": 0.0},
        {"embedding_scale": "1"}, {"arrays": {}}, {"arrays": ...}, {"name": 1}, {"bos": 380}, {"bos": "2"},
        {"stops": [400]}, {"stops": None}, {"stops": [[1]]}, {"num_hidden_layers": 2**20}, {"token_text_bytes": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused_though_its_checksum_fits(
    whole: bytes, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "forged"
    path.write_bytes(forged(whole))
    load_packed(path)
    path.write_bytes(forged(whole, **changes))
    with pytest.raises(ModelError, match=f"^{path}: "):
        load_packed(path)


def test_what_is_no_packed_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path / 'none'}: no such file"):
        load_packed(tmp_path / "none")
    with pytest.raises(ModelError, match=f"{tmp_path}: cannot be read: "):
        load_packed(tmp_path)
    for content in (b"", b"GGUF", b"GGUF" * 100, b"\0" * 64):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ModelError, match="other: is not a packed file, which begins with GEMMPACK"):
            load_packed(tmp_path / "other")


WORD = {"id": 380, "content": "the end", "special": False, "normalized": False}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_byte_fallback": False}, "without byte fallback"),
        ({"model_dropout": 0.5}, "has dropout"),
        ({"model_ignore_merges": True}, "has ignore_merges"),
        ({"normalizer": {"type": "Lowercase"}}, "has the normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "has the pre-tokenizer Whitespace"),
        ({"added_tokens": [WORD | PLAIN | {"lstrip": True}]}, "has the added token 'the end' with lstrip"),
        (
            {"added_tokens": [WORD | PLAIN, WORD | PLAIN | {"id": 381, "content": "zqx", "normalized": True}]},
            "looked for after normalization",
        ),
    ],
)
def test_a_tokenizer_that_the_arrays_cannot_say_is_refused(
    tiny_tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TokenizerError, match=sentence):
        save_packed(model_of(vocab_size=400), altered(tiny_tokenizer, **changes), tmp_path / "out", "int8", "x")
    assert list(tmp_path.iterdir()) == []
