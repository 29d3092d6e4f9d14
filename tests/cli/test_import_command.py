import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemmule as package
from gemmule.formats import opening
from gemmule.formats.gguf import save_gguf
from runs import Ended, gemmule


def refused(ended: Ended) -> str:
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("gemmule: ")
    return ended.err.removeprefix("gemmule: ").removesuffix("\n")


@pytest.fixture
def source(tiny_run: Path, tmp_path: Path) -> Path:
    """A multimodal checkpoint of somebody else's."""
    folder = shutil.copytree(tiny_run / "model", tmp_path / "theirs")
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.x": torch.ones(2)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    return folder


def test_a_folder_is_taken_and_it_is_said_what(source: Path, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    ended = gemmule("import", source, "--out", out)
    assert (ended.code, ended.out) == (0, "")
    said, summary = ended.err.splitlines()
    assert said == "skipped the vision encoder, 1 of 55 tensors; Gemmule loads the text model"
    assert summary.startswith(f"{out}: ")
    assert "parameters in 4 layers, stored as float32, 0.2 MB; tokenizer with 320 ids" in summary
    theirs, mine = package.load(tiny_run / "model"), package.load(out)
    assert mine[0].config == theirs[0].config
    assert mine[1].fingerprint == theirs[1].fingerprint
    for name, tensor in theirs[0].state_dict().items():
        assert torch.equal(mine[0].state_dict()[name], tensor)
    assert gemmule("generate", out, "--max-new-tokens", 3).code == 0


@pytest.mark.parametrize(("dtype", "stored"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_dtype_can_be_chosen(source: Path, tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    assert gemmule("import", source, "--out", tmp_path / "mine", "--dtype", dtype).code == 0
    assert {tensor.dtype for tensor in package.load(tmp_path / "mine")[0].parameters()} == {stored}
    assert gemmule("import", source, "--out", tmp_path / "other", "--dtype", "f17").code == 2


def test_a_run_folder_is_imported_from_its_newest_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    assert gemmule("import", tiny_run, "--out", tmp_path / "mine").code == 0
    newest = tiny_run / "checkpoints" / "step-00000012" / "model.safetensors"
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == newest.read_bytes()


def test_a_gguf_file_is_taken(tiny_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf, which writes the file, is not installed")
    model, tokenizer = package.load(tiny_run / "model")
    save_gguf(model, tokenizer, tmp_path / "theirs.gguf", "f32")
    ended = gemmule("import", tmp_path / "theirs.gguf", "--out", tmp_path / "mine")
    assert ended.code == 0
    assert ended.err.startswith("the weights take 0.2 MB in fp32; --dtype bf16 halves that\n")
    assert (
        "takes half" not in gemmule("import", tmp_path / "theirs.gguf", "--out", tmp_path / "b", "--dtype", "bf16").err
    )
    mine, words = package.load(tmp_path / "mine")
    tokens = torch.tensor([words.encode("Once upon a time")])
    assert tokens.tolist() == [tokenizer.encode("Once upon a time")]
    assert torch.allclose(mine(tokens), model(tokens), atol=1e-4)


def test_a_name_on_the_hub_is_taken(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(opening, "fetch", lambda _name: source)
    assert gemmule("import", "google/gemma-3-270m", "--out", tmp_path / "mine").code == 0
    assert gemmule("generate", "google/gemma-3-270m", "--max-new-tokens", 3).code == 0
    assert gemmule("evaluate", "google/gemma-3-270m", "--data", "storybook:1").code == 0


def test_a_place_that_holds_something_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "fetch", None)
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        words = "already exists and is not empty; choose a new or empty folder"
        assert refused(gemmule("import", "google/gemma-3-270m", "--out", out)) == f"--out {out}: {words}"
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(source: Path, tmp_path: Path, value: str) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.model.layers.2.mlp.up_proj.weight"][0, 0] = float(value)
    save_file(tensors, source / "model.safetensors")
    ended = gemmule("import", source, "--out", tmp_path / "mine")
    assert ended.code == 2
    damage = "the model is damaged: blocks.2.mlp.up.weight holds NaN or infinity"
    assert ended.err.endswith(f"gemmule: {damage}; see `gemmule doctor {source}`\n")
    assert not (tmp_path / "mine").exists()


def test_a_prefix_that_is_taken_off_is_told(tiny_run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_run / "model", tmp_path / "theirs")
    tensors = load_file(source / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    ended = gemmule("import", source, "--out", tmp_path / "mine")
    assert ended.err.startswith("removed the prefix 'module.' from all tensor names\n")


def test_a_refused_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors: damaged" in refused(gemmule("import", source, "--out", tmp_path / "mine"))
    assert "no such folder" in refused(gemmule("import", tmp_path / "nowhere", "--out", tmp_path / "mine"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
