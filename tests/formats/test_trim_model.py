import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemmule.errors import ModelError, OutputError
from gemmule.formats.folder import load_folder
from gemmule.formats.gguf import load_gguf, save_gguf
from gemmule.formats.model_card import NO_CARD, ModelCard, read_card
from gemmule.formats.trim import TrimmedModel, logits_are_equal, save_trimmed, trim_model
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.trim import choose_ids, count_ids, trim_tokenizer
from sentences import SENTENCES
from tiny import greatest_difference, lively_model, tiny_config

CORPUS = SENTENCES[:7]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> Gemma3:
    # As in Google's, there are more rows than ids.
    return lively_model(tiny_config(vocab_size=tiny_tokenizer.vocab_size + 8, tie_word_embeddings=request.param))


@pytest.fixture
def trimmed(model: Gemma3, tiny_tokenizer: Tokenizer) -> TrimmedModel:
    kept = choose_ids(tiny_tokenizer, count_ids(tiny_tokenizer, CORPUS))
    assert len(kept) < tiny_tokenizer.vocab_size
    return TrimmedModel(trim_model(model, kept), trim_tokenizer(tiny_tokenizer, kept), kept)


def ids_of(trimmed: TrimmedModel) -> list[int]:
    return [token for ids in trimmed.tokenizer.encode_documents(CORPUS) for token in ids][:150]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_kept_ids_are_those_of_the_original(
    model: Gemma3, tiny_tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    kept = choose_ids(tiny_tokenizer, count_ids(tiny_tokenizer, CORPUS))
    trimmed = TrimmedModel(trim_model(model, kept), trim_tokenizer(tiny_tokenizer, kept), kept)
    ids = ids_of(trimmed)
    assert logits_are_equal(model, trimmed, ids)
    with torch.no_grad():
        before = model(torch.tensor([[kept[token] for token in ids]]))[..., kept]
        after = trimmed.model(torch.tensor([ids]))
    assert after.shape == (1, len(ids), len(kept))
    # The matmul of the original's whole head may round differently.
    assert greatest_difference(before, after) <= (1e-5 if dtype == torch.float32 else 0.05)


def test_the_original_is_as_it_was(model: Gemma3, trimmed: TrimmedModel, tiny_tokenizer: Tokenizer) -> None:
    fresh = lively_model(model.config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    assert model.config.vocab_size == tiny_tokenizer.vocab_size + 8
    assert trimmed.model.config == model.config.model_copy(update={"vocab_size": len(trimmed.old_ids)})


@pytest.mark.parametrize("part", ["a row of the embedding", "a weight of a block", "an id"])
def test_any_difference_is_found(model: Gemma3, trimmed: TrimmedModel, part: str) -> None:
    ids = ids_of(trimmed)
    if part == "an id":
        old_ids = list(trimmed.old_ids)
        old_ids[-1] += 1
        trimmed = trimmed._replace(old_ids=old_ids)
    else:
        trimmed.model.load_state_dict({name: tensor.clone() for name, tensor in trimmed.model.state_dict().items()})
        name = "embedding.weight" if part == "a row of the embedding" else "blocks.3.mlp.up.weight"
        parameter = trimmed.model.get_parameter(name)
        copy = parameter.detach().clone()
        copy[ids[0], 0] += 0.01
        trimmed.model.load_state_dict({**trimmed.model.state_dict(), name: copy}, assign=True)
    assert not logits_are_equal(model, trimmed, ids)


def test_a_token_without_an_embedding_is_named(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(tiny_config(vocab_size=300))
    with pytest.raises(ModelError, match="no embedding of the id 379, which its tokenizer needs; it has 300"):
        trim_model(model, [0, 1, 379])


def test_the_folder_is_a_model_folder(
    model: Gemma3, trimmed: TrimmedModel, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    save_trimmed(trimmed, out, tmp_path, NO_CARD, "tiny", tiny_tokenizer.vocab_size)
    again, tokenizer = load_folder(out)
    ids = ids_of(trimmed)
    assert torch.equal(again(torch.tensor([ids])), trimmed.model(torch.tensor([ids])))
    assert tokenizer.fingerprint == trimmed.tokenizer.fingerprint
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["vocab_size"] == tokenizer.vocab_size == len(trimmed.old_ids)
    assert len(load_file(out / "model.safetensors")["model.embed_tokens.weight"]) == tokenizer.vocab_size
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 1, 0)
    assert generation["eos_token_id"] == [tokenizer.eos_id, tokenizer.end_of_turn_id]
    assert json.loads((out / "vocabulary.json").read_text()) == {"old_ids": list(trimmed.old_ids)}
    text = (out / "README.md").read_text()
    assert "a modified copy of tiny" in text
    assert f"from 380 to {len(trimmed.old_ids)} ids" in text
    assert read_card(out) == NO_CARD


def test_license_and_notice_travel_with_it(trimmed: TrimmedModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    legal = ("LICENSE", "NOTICE.md", "GEMMA_TERMS.html", "licence.txt", "gemma_prohibited_use_policy.txt")
    for name in (*legal, "README.md", "model.bin"):
        (source / name).write_text(f"of {name}")
    (source / "licenses").mkdir()
    card = ModelCard("Gemma 3 270M", "gemma")
    save_trimmed(trimmed, tmp_path / "out", source, card, "Gemma 3 270M", 380)
    assert {name: (tmp_path / "out" / name).read_text() for name in legal} == {name: f"of {name}" for name in legal}
    assert not (tmp_path / "out" / "model.bin").exists()
    assert not (tmp_path / "out" / "licenses").exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlicense: gemma\nmodel_name: Gemma 3 270M\n---\n")
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in text
    assert read_card(tmp_path / "out") == card


def test_nothing_is_written_over(trimmed: TrimmedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="another program wrote into it meanwhile"):
        save_trimmed(trimmed, tmp_path / "out", tmp_path, NO_CARD, "tiny", 380)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf library is not installed")
@pytest.mark.parametrize("model", [True], indirect=True, ids=["tied"])
def test_gguf_and_back_is_the_same_model(trimmed: TrimmedModel, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_gguf(trimmed.model, trimmed.tokenizer, tmp_path / "tiny.gguf", "f32")
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    assert tokenizer.vocab_size == len(trimmed.old_ids)
    for text in SENTENCES[:40]:
        assert tokenizer.encode(text) == trimmed.tokenizer.encode(text)
    for text in CORPUS:
        assert [trimmed.old_ids[token] for token in tokenizer.encode(text)] == tiny_tokenizer.encode(text)
    ids = torch.tensor([ids_of(trimmed)])
    with torch.no_grad():
        assert greatest_difference(model(ids), trimmed.model(ids)) <= 1e-4
