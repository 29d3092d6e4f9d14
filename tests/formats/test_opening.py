"""Whatever a model is called, it opens the same way."""

import json
import re
from pathlib import Path

import pytest
import torch

from gemmule.errors import ModelError
from gemmule.formats import opening
from gemmule.formats.folder import save_folder
from gemmule.formats.gguf import save_gguf
from gemmule.formats.opening import open_model
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

MODEL = lively_model(tiny_config(vocab_size=380))


@pytest.fixture
def folder(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    save_folder(MODEL, tiny_tokenizer, path)
    return path


@pytest.fixture
def gguf(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    pytest.importorskip("gguf", reason="gguf, which writes the file, is not installed")
    path = tmp_path / "file.gguf"
    save_gguf(MODEL, tiny_tokenizer, path, "f32")
    return path


def assert_is_the_model(source: str | Path, dtype: torch.dtype = torch.float32) -> None:
    asked = None if dtype == torch.float32 else dtype
    model, _ = open_model(source, dtype=asked)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.allclose(tensor, MODEL.state_dict()[name].to(dtype), atol=0 if asked is None else 0.01), name


def fetched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    asked: list[str] = []

    def fetch(repo_id: str) -> Path:
        asked.append(repo_id)
        return folder

    monkeypatch.setattr(opening, "fetch", fetch)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_opens(folder: Path, dtype: torch.dtype) -> None:
    assert_is_the_model(folder, dtype)
    assert_is_the_model(str(folder), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_opens(gguf: Path, dtype: torch.dtype) -> None:
    model, _ = open_model(gguf, dtype=dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert open_model(str(gguf))[0].config == model.config


def test_a_gguf_file_is_known_by_its_first_bytes(gguf: Path, tmp_path: Path) -> None:
    for name in ("sha256-8f5b4a", "model.bin", "model.GGUF"):
        gguf.rename(tmp_path / name)
        assert open_model(tmp_path / name)[0].config.vocab_size == 380
        (tmp_path / name).rename(gguf)


@pytest.mark.parametrize("name", ["google/gemma-3-270m", "some_body/A.model-1"])
def test_a_name_on_the_hub_is_fetched_and_opens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = fetched(monkeypatch, folder)
    assert_is_the_model(name)
    assert asked == [name]


@pytest.mark.parametrize("source", ["runs/stroy", "stroy", "/runs/stroy", "a/b/c", "../a", "a/", "o w/n"])
def test_a_mistyped_path_is_not_asked_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    place = tmp_path / "here"
    (place / "runs").mkdir(parents=True)
    (place / "stroy").touch()
    monkeypatch.chdir(place)
    asked = fetched(monkeypatch, folder)
    with pytest.raises(ModelError, match=f"MODEL {re.escape(source)}: no"):
        open_model(source)
    assert asked == []


def test_a_path_that_exists_comes_before_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = fetched(monkeypatch, tmp_path)
    owner = tmp_path / "google"
    owner.mkdir()
    folder.rename(owner / "gemma-3-270m")
    assert_is_the_model("google/gemma-3-270m")
    assert asked == []


def test_what_a_model_can_be_is_said(tmp_path: Path) -> None:
    words = "no such folder; name a model folder or a run folder, a .gguf file, or owner/name of the Hugging Face Hub"
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path / 'x'}: {words}")):
        open_model(tmp_path / "x")
    (tmp_path / "x").write_text("a text")
    with pytest.raises(ModelError, match=re.escape("x: not a folder; name a model folder or")):
        open_model(tmp_path / "x")


def test_the_tokenizer_of_another_model_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(lively_model(tiny_config(vocab_size=379)), tiny_tokenizer, tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer has 380 ids, but the model has a vocabulary of 379$"):
        open_model(tmp_path)


def test_a_special_token_may_lack_a_row_as_in_googles_1b(folder: Path, tmp_path: Path) -> None:
    path = folder / "tokenizer.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    image = table["added_tokens"][0] | {"id": 380, "content": "<image_soft_token>", "special": True}
    path.write_text(json.dumps(table | {"added_tokens": [*table["added_tokens"], image]}), encoding="utf-8")
    model, tokenizer = open_model(folder)
    assert (tokenizer.vocab_size, model.config.vocab_size) == (381, 380)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x\.gguf"):
        open_model(tmp_path / "x.gguf")
