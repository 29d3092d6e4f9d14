"""`--adapter` beside any MODEL, and folders of adapters as MODEL."""

import json
from pathlib import Path

import pytest

from adapters import write_adapter, write_base
from gemmule.model.lora import LoRA
from gemmule.tokenizer import Tokenizer
from runs import gemmule


@pytest.fixture(scope="module")
def places(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a base and of an adapter."""
    folder = tmp_path_factory.mktemp("adapted")
    base = write_base(folder / "base", tiny_tokenizer)
    write_adapter(folder / "adapter", base, LoRA(4, 8.0))
    return base, folder / "adapter"


COMMANDS: dict[str, list[object]] = {
    "generate": ["--prompt", "Mia", "--seed", 1, "--max-new-tokens", 12],
    "evaluate": ["--data", "storybook:3"],
    "explain": ["--text", "Mia found a key."],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_beside_its_base_is_the_adapter_as_model(command: str, places: tuple[Path, Path]) -> None:
    base, adapter = places
    alternatives: list[list[object]] = [[adapter], [base, "--adapter", adapter], [base]]
    found = [gemmule(command, *words, *COMMANDS[command], "--device", "cpu", "--json") for words in alternatives]
    assert [ended.code for ended in found] == [0, 0, 0], found
    texts = [ended.out.replace(str(adapter), "MODEL").replace(str(base), "MODEL") for ended in found]
    answers = [json.loads(text.splitlines()[-1]) for text in texts]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


@pytest.mark.slow  # the doctor tries many variants
def test_doctor_and_trim_take_adapters(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = places
    ended = gemmule("doctor", base, "--adapter", adapter, "--json")
    assert next(f for f in json.loads(ended.out)["findings"] if f["name"] == "weights")["verdict"] == "passed"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Mia found a red kite.\n")
    alternatives: list[list[object]] = [[adapter], [base, "--adapter", adapter]]
    for number, words in enumerate(alternatives):
        ended = gemmule("trim", *words, "--corpus", corpus, "--out", tmp_path / f"small{number}")
        assert ended.code == 0, ended.err
    files = [(tmp_path / f"small{number}" / "model.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]


def test_several_models_and_an_adapter_are_refused(places: tuple[Path, Path]) -> None:
    base, adapter = places
    ended = gemmule("evaluate", base, base, "--adapter", adapter)
    assert ended.code == 2
    assert ended.err == (
        f"gemmule: --adapter {adapter}: is for one MODEL; folders of adapters are MODELs, too: name them so\n"
    )
    ended = gemmule("generate", base, "--adapter", base)
    assert ended.code == 2
    assert ended.err == f"gemmule: --adapter {base}: has no adapter_config.json; name the folder of an adapter\n"


def test_a_served_model_may_have_an_adapter(places: tuple[Path, Path]) -> None:
    from gemmule.cli.chat import open_model

    base, adapter = places
    prints = [
        open_model(str(model), "cpu", "plain", False, adapters=adapters).fingerprint
        for model, adapters in ((adapter, ()), (base, (str(adapter),)), (base, ()))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_export_merges_the_adapter(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = places
    alternatives: list[list[object]] = [[adapter], [base, "--adapter", adapter]]
    for number, words in enumerate(alternatives):
        ended = gemmule("export", *words, "--to", "hf", "--dtype", "f32", "--out", tmp_path / f"hf{number}")
        assert ended.code == 0, ended.err
    one, other = ((tmp_path / f"hf{number}" / "model.safetensors").read_bytes() for number in range(2))
    assert one == other
    assert one != (base / "model.safetensors").read_bytes()


def test_export_to_adapter_is_the_folder_for_peft(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = places
    out = tmp_path / "out"
    assert gemmule("export", adapter, "--to", "adapter", "--out", out).code == 0
    assert {file.name for file in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    assert (out / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    ended = gemmule("export", base, "--to", "adapter", "--out", tmp_path / "none")
    assert ended.code == 2
    assert ended.err == f"gemmule: MODEL {base}: has no adapter; --to adapter is for the folder or the run of one\n"
    ended = gemmule("export", adapter, "--to", "adapter", "--dtype", "f32", "--out", tmp_path / "none")
    assert ended.code == 2
    assert not (tmp_path / "none").exists()
