import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.errors import ModelError, TokenizerError
from gemmule.formats.folder import load_folder, save_folder
from gemmule.formats.opening import open_model
from gemmule.model.attention import KERNELS
from gemmule.tokenizer import Tokenizer
from tiny import greatest_difference, lively_model, some_tokens, tiny_config


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


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


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
    with pytest.raises(
        ModelError, match=r"model\.safetensors: has unexpected tensors: model\.layers\.3\.mlp\.up_proj\.bias$"
    ):
        load_folder(folder)


def test_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(25)

    edit_tensors(folder, change)
    with pytest.raises(ModelError, match=r"does not fit config\.json: model\.norm\.weight is \[25\], not \[24\]$"):
        load_folder(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=8, layer_types=None)
    with pytest.raises(ModelError, match=r"lacks (model\.layers\.7\S+, ){4}model\.layers\.7\S+ and 8 more$"):
        load_folder(folder)


@pytest.mark.parametrize("prefix", ["module.", "base_model.", "module.base_model.model."])
def test_prefix_that_all_tensors_have_is_taken_off_and_said(messages: list[str], folder: Path, prefix: str) -> None:
    expected = load_folder(folder)[0].state_dict()
    rename_tensors(folder, lambda name: prefix + name)
    model, _ = load_folder(folder)
    assert messages == [f"removed the prefix {prefix!r} from all tensor names"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("before", "after"), [("model.", "_orig_mod.model."), (".self_attn", "._orig_mod.self_attn")])
def test_wrappers_of_torch_are_no_part_of_a_name(folder: Path, before: str, after: str) -> None:
    expected = load_folder(folder)[0].state_dict()
    rename_tensors(folder, lambda name: name.replace(before, after))
    state = load_folder(folder)[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_prefix_of_some_tensors_is_refused_with_what_is_there(folder: Path) -> None:
    rename_tensors(folder, lambda name: f"module.{name}" if "norm" not in name else name)
    with pytest.raises(ModelError, match=r"lacks model\.embed_tokens\.weight, .*; found instead module\.model\."):
        load_folder(folder)


def test_names_of_another_program_are_shown(folder: Path) -> None:
    rename_tensors(folder, lambda name: name.replace("model.", "transformer.h.", 1))
    with pytest.raises(ModelError, match=r"lacks .* and 88 more; found instead transformer\.h\..* and 88 more$"):
        load_folder(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 511\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_pointer_of_git_lfs_is_called_so(folder: Path, name: str) -> None:
    (folder / name).write_bytes(POINTER)
    with pytest.raises((ModelError, TokenizerError), match=f"{re.escape(name)}: is a Git LFS pointer, .*git lfs pull"):
        load_folder(folder)


def test_byte_order_marks_are_passed_over(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    model, tokenizer = load_folder(folder)
    assert model.config == tiny_config()
    assert tokenizer.chat_template == "{{ messages }}"


NAMES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("itself", "Too many levels of symbolic links"),
        ("/proc/self/mem", "Input/output error"),
        ("x" * 300, "too long"),
    ],
)
def test_file_that_cannot_be_read_is_named_with_the_reason(folder: Path, name: str, target: str, reason: str) -> None:
    if target.startswith("/proc") and not Path(target).exists():
        pytest.skip("no /proc")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name if target == "itself" else target)
    with pytest.raises((ModelError, TokenizerError), match=f"{re.escape(name)}: .*{reason}"):
        load_folder(folder)


def test_pipe_in_the_place_of_weights_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a regular file"):
        load_folder(folder)
    os.mkfifo(folder / "pipe.gguf")
    with pytest.raises(ModelError, match=r"pipe\.gguf: not a regular file"):
        open_model(folder / "pipe.gguf")


@pytest.mark.parametrize("name", NAMES[:4])
def test_closed_file_is_no_missing_one(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    opened = io.open

    def refuse(file: object, *arguments: Any, **options: Any) -> object:
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", file)
        return opened(file, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises((ModelError, TokenizerError), match=f"{re.escape(name)}: cannot be read: Permission denied"):
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


def test_name_of_the_folder_changes_nothing(folder: Path) -> None:
    tokens = some_tokens(tiny_config())
    before = load_folder(folder)[0](tokens)
    moved = folder.rename(folder.with_name("llama-27b-gguf"))
    assert greatest_difference(load_folder(moved)[0](tokens), before) == 0


def test_whoever_may_read_the_config_may_read_the_weights(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(lively_model(tiny_config()), tiny_tokenizer, tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert len(modes) == 1
