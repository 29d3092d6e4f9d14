"""Adapter folders: read as they were written, and what does not fit is named in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gemmule
from adapters import write_adapter, write_base
from gemmule.errors import ModelError
from gemmule.formats.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterConfig,
    adapter_names,
    base_sha256,
    read_adapter_config,
    weights_sha256,
)
from gemmule.formats.folder import load_folder, save_folder
from gemmule.model.lora import LoRA, changes_nothing, merge
from gemmule.tokenizer import Tokenizer
from gemmule.train.opening import load_with_path, open_unmerged
from tiny import greatest_difference, some_tokens, tiny_config

PLAIN = LoRA(4, 8.0)
KINDS = {
    "lora": PLAIN,
    "rslora with rows": LoRA(3, 6.5, dropout=0.1, rank_stabilized=True, rows=(2, 9)),
    "dora of two": LoRA(2, 4.0, targets=("attention.query", "mlp.down"), dora=True),
}


@pytest.fixture
def base(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", tiny_tokenizer)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", base, PLAIN)
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def complaint(model: Path, *adapters: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_with_path(model, adapters=adapters)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_as_it_was_written(kind: str, base: Path, tmp_path: Path) -> None:
    folder, lora = tmp_path / "adapter", KINDS[kind]
    model = write_adapter(folder, base, lora)
    assert read_adapter_config(folder) == AdapterConfig(lora, str(base))
    tokens = some_tokens(model.config)
    with torch.no_grad():
        wanted, plain = model(tokens), load_folder(base)[0](tokens)
        assert greatest_difference(gemmule.load(folder)[0](tokens), wanted) < 1e-4
        beside, _, found = load_with_path(base, adapters=[folder])
        unmerged = open_unmerged(folder)
        assert unmerged is not None
        assert torch.equal(unmerged(tokens), wanted)
    assert found == base
    assert greatest_difference(beside(tokens), wanted) < 1e-4
    assert greatest_difference(plain, wanted) > 0.1
    assert open_unmerged(base) is None


def test_names_are_those_of_the_one_table(folder: Path) -> None:
    names = {theirs for _, theirs in adapter_names(tiny_config(), PLAIN)}
    assert set(load_file(folder / WEIGHTS)) == names
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    rows = dict(adapter_names(tiny_config(), KINDS["rslora with rows"]))["embedding.rows"]
    assert rows == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_merging_rounds_once_to_the_dtype(base: Path, folder: Path) -> None:
    model = open_unmerged(folder)
    assert model is not None
    exact = merge(model)
    for dtype in (torch.float32, torch.bfloat16):
        found, _, _ = load_with_path(folder, dtype=dtype)
        for name, values in found.named_parameters():
            assert torch.equal(values, exact.get_parameter(name).to(dtype)), name


def test_several_adapters_add_up(base: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_adapter(one, base, PLAIN, seed=3)
    write_adapter(other, base, LoRA(2, 8.0, targets=("mlp.up",), rows=(5,)), seed=4)
    plain = dict(load_folder(base)[0].named_parameters())
    both = dict(load_with_path(base, adapters=[one, other])[0].named_parameters())
    singles = [dict(load_with_path(base, adapters=[each])[0].named_parameters()) for each in (one, other)]
    for name, values in both.items():
        wanted = plain[name] + sum(single[name] - plain[name] for single in singles)
        assert torch.allclose(values, wanted, atol=1e-6), name
    again = load_with_path(one, adapters=[other])[0]
    assert all(torch.equal(values, again.get_parameter(name)) for name, values in both.items())


def test_an_adapter_may_stand_on_an_adapter(base: Path, folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    model, tokenizer, _ = load_with_path(folder)
    merged.mkdir()
    save_folder(model, tokenizer, merged)
    write_adapter(tmp_path / "second", merged, PLAIN, seed=9)
    wanted = load_with_path(tmp_path / "second")[0]
    change_config(tmp_path / "second", base_model_name_or_path=str(folder))
    found = load_with_path(tmp_path / "second")[0]
    assert all(torch.equal(values, wanted.get_parameter(name)) for name, values in found.named_parameters())
    change_config(tmp_path / "second", base_model_name_or_path=str(tmp_path / "second"))
    assert "its base is an adapter, and so on, 8 times" in complaint(tmp_path / "second")


def test_the_sha256_is_of_the_weights_however_they_are_stored(base: Path) -> None:
    model, _ = load_folder(base)
    own = weights_sha256(model.bfloat16())
    assert weights_sha256(model.float()) == own
    with torch.no_grad():
        model.blocks[6].get_parameter("mlp.down.weight")[3, 1] *= 1.01
    assert weights_sha256(model) != own


def test_an_adapter_of_another_base_is_refused(folder: Path, base: Path, tiny_tokenizer: Tokenizer) -> None:
    other = write_base(base.with_name("other"), tiny_tokenizer, seed=1)
    sentence = complaint(other, folder)
    assert sentence.startswith(f"{folder}: was trained on another base than {other}: the SHA-256 of its weights is ")
    assert str(base_sha256(folder))[:12] in sentence
    shutil.rmtree(base)
    other.rename(base)
    assert "was trained on another base" in complaint(folder)
    (folder / "base.json").write_text("{}")
    assert "has no weights_sha256" in complaint(folder)
    (folder / "base.json").unlink()  # as of a program that writes none
    load_with_path(folder)


def test_a_base_that_is_gone_or_not_named(folder: Path, base: Path) -> None:
    moved = base.rename(base.with_name("moved"))
    sentence = complaint(folder)
    assert sentence.startswith(f"{folder}: its base cannot be opened: MODEL {base}: no such folder")
    assert sentence.endswith(f"open it beside its base: MODEL --adapter {folder}")
    load_with_path(moved, adapters=[folder])
    change_config(folder, base_model_name_or_path=None)
    assert "does not name its base" in complaint(folder)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(FIRST), f"lacks {FIRST}"),
        (lambda t: t.update(extra=torch.ones(1)), "the base does not ask for: extra"),
        (lambda t: t.update({FIRST.replace("_A", "_embedding_A"): t.pop(FIRST)}), "found instead"),
        (lambda t: t.update({FIRST: torch.ones(5, 24)}), f"{FIRST} is [5, 24], not [4, 24]"),
        (lambda t: t.update({FIRST: torch.full((4, 24), float("nan"))}), "values that are not finite"),
        (
            lambda t: t.update({name: torch.zeros_like(v) for name, v in t.items() if "lora_B" in name}),
            "changes nothing: every lora_B is 0",
        ),
        (
            lambda t: t.update({"base_model.model.model.vision_tower.q_proj.lora_A.weight": torch.ones(4, 4)}),
            "adapts the vision encoder",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: Callable[[Any], object], said: str) -> None:
    change_weights(folder, change)
    assert said in complaint(folder)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "LOHA", 'peft_type = "LOHA": only LORA'),
        ("bias", "all", 'bias = "all"'),
        ("modules_to_save", ["lm_head", "embed_tokens"], 'modules_to_save = ["lm_head", "embed_tokens"]: is not'),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
        ("layers_to_transform", [1], "layers_to_transform = [1]"),
        ("init_lora_weights", "pissa", "changes the base"),
        ("use_qalora", True, "use_qalora = true"),
        ("r", 8, "is [4, 24], not [8, 24]"),
        ("r", 0, "r = 0: must be"),
        ("lora_alpha", "a", "lora_alpha"),
        ("target_modules", ["q_proj", "c_attn"], "c_attn is none of q_proj, k_proj"),
        ("target_modules", ["q_proj"], "the base does not ask for"),
        ("target_modules", [], "must name at least one"),
        ("trainable_token_indices", [3], "lacks base_model.model.model.embed_tokens.token_adapter"),
        ("trainable_token_indices", [380], "the model has no token 380"),
        ("trainable_token_indices", {"lm_head": [3], "embed_tokens": [3]}, "different ids"),
        ("trainable_token_indices", [3, 3], "different ids"),
        ("use_dora", True, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_settings_of_an_adapter_that_are_not_supported_are_named(
    folder: Path, key: str, value: object, said: str
) -> None:
    change_config(folder, **{key: value})
    assert said in complaint(folder)


def test_an_adapter_of_the_text_model_in_a_multimodal_one_opens(folder: Path) -> None:
    wanted = load_with_path(folder)[0]

    def prefixed(tensors: dict[str, Tensor]) -> None:
        for name in [*tensors]:
            tensors[name.replace("model.model.layers", "model.model.language_model.layers")] = tensors.pop(name)

    change_weights(folder, prefixed)
    found = load_with_path(folder)[0]
    assert all(torch.equal(values, wanted.get_parameter(name)) for name, values in found.named_parameters())


def test_adapters_that_do_not_add_up_are_refused(base: Path, folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "dora", base, KINDS["dora of two"])
    assert complaint(base, folder, tmp_path / "dora").endswith("open it alone")
    for name in ("one", "two"):
        write_adapter(tmp_path / name, base, LoRA(2, 4.0, rows=(7, 8)))
    assert "replaces the embedding of token 7, which" in complaint(base, tmp_path / "one", tmp_path / "two")
    assert "given twice" in complaint(base, folder, folder)


def test_a_folder_without_weights_or_adapter(base: Path, folder: Path) -> None:
    assert complaint(base, base) == f"--adapter {base}: has no adapter_config.json; name the folder of an adapter"
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert complaint(folder).endswith("save adapter_model.bin as safetensors with peft")


def test_slices_that_two_ranks_wrote_are_joined(folder: Path) -> None:
    wanted, tensors = load_with_path(folder)[0], load_file(folder / WEIGHTS)
    for rank in (1, 2):
        part = {}
        for name, values in tensors.items():
            half = len(values) // 2
            rows = slice(0, half) if rank == 1 else slice(half, len(values))
            part[f"{name}[{rows.start}:{rows.stop}]"] = values[rows].contiguous()
        save_file(part, folder / f"adapter_model-{rank:05d}-of-00002.safetensors")
    (folder / WEIGHTS).unlink()
    found = load_with_path(folder)[0]
    assert all(torch.equal(values, wanted.get_parameter(name)) for name, values in found.named_parameters())
    (folder / "adapter_model-00001-of-00002.safetensors").unlink()
    assert "do not join" in complaint(folder)


def test_reading_changes_nothing_that_was_written(base: Path, folder: Path) -> None:
    before = {file: file.read_bytes() for place in (base, folder) for file in place.iterdir()}
    model = open_unmerged(folder)
    assert model is not None
    assert not changes_nothing(model)
    load_with_path(folder)
    assert before == {file: file.read_bytes() for place in (base, folder) for file in place.iterdir()}
