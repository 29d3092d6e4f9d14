"""Our folders in transformers, theirs in ours: weights, settings, sizes and tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twin import MARKS, SHAPES, TOLERANCE, transformers

from gemmule.formats.config_json import write_config
from gemmule.formats.folder import load_folder, save_folder
from gemmule.model.config import SIZES, Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from sentences import SENTENCES
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

pytestmark = MARKS


def open_twin(model: Gemma3, tokenizer: Tokenizer, folder: Path) -> Any:
    """Save a model and let transformers open the folder, in fp32."""
    folder.mkdir(exist_ok=True)
    save_folder(model, tokenizer, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_our_folder(tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]))
    twin = open_twin(model, tiny_tokenizer, tmp_path)
    tokens = some_tokens(model.config, length=23)
    with torch.no_grad():
        assert greatest_difference(model(tokens), twin(input_ids=tokens).logits) <= TOLERANCE


def test_transformers_opens_our_folder_in_the_dtype_of_its_weights(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config()).bfloat16()
    save_folder(model, tiny_tokenizer, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = some_tokens(model.config, length=23)
    assert twin.dtype == torch.bfloat16
    with torch.no_grad():
        assert greatest_difference(model(tokens), twin(input_ids=tokens).logits.float()) <= 0.25


def test_what_transformers_saves_is_opened(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = lively_model(tiny_config(tie_word_embeddings=False))
    twin = open_twin(model, tiny_tokenizer, tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer.save(tmp_path / "theirs")
    again, _ = load_folder(tmp_path / "theirs")
    tokens = some_tokens(model.config)
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_as_many_parameters(size: str) -> None:
    config = Gemma3Config.model_validate({"size": size})
    with torch.device("meta"):
        ours = Gemma3(config)
        theirs = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**write_config(config, None)))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def their_tokenizer(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_folder(lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size)), tiny_tokenizer, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["the ", " fox", "  ", "\n\n", "\t", "12", "\u2581", "\u2019", "e\u0301", "\U0001f984"])
).map("".join)


@settings(max_examples=200)
@given(text)
def test_tokenizer_encodes_and_decodes_the_same(tiny_tokenizer: Tokenizer, their_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert their_tokenizer.encode(text, split_special_tokens=True) == ids
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_encodes_sentences_the_same(tiny_tokenizer: Tokenizer, their_tokenizer: Any) -> None:
    assert their_tokenizer(SENTENCES).input_ids == [tiny_tokenizer.encode(sentence) for sentence in SENTENCES]
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (2, 1, 0)
