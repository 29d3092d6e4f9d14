import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gemmule.evaluate.doctor import CHECKS
from gemmule.formats.folder import save_folder
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import lively_model, tiny_config


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the command; what the checks find is that of `tests/evaluate/test_doctor.py`."""
    monkeypatch.setattr("gemmule.evaluate.doctor.text._MOST_TOKENS", 1024)


@pytest.fixture
def folder(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    model = lively_model(tiny_config(vocab_size=380, num_hidden_layers=4))
    save_folder(model.bfloat16(), tiny_tokenizer, tmp_path)
    return tmp_path


def test_random_weights_fail_with_exit_code_1_and_a_line_per_check(folder: Path) -> None:
    """Each is named while it runs."""
    ended = gemmule("doctor", folder)
    assert ended.code == 1
    assert "checking weights ..." in ended.err.splitlines()
    assert "trying rope_theta: 10,000 ..." in ended.err.splitlines()
    lines = ended.out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == list(CHECKS)
    assert lines[-1] == f"{folder} failed: loss"
    assert "no better than a unigram model" in ended.out


def test_a_failed_check_says_why(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))
    ended = gemmule("doctor", folder, "--json")
    assert ended.code == 1
    report = json.loads(ended.out)
    assert not report["passed"]
    finding, _ = [finding for finding in report["findings"] if finding["verdict"] == "failed"]
    assert finding["name"] == "special_tokens"
    assert finding["sentence"] == "config.json says eos_token_id = 3; the tokenizer's eos is 1"


def test_a_run_passes_on_a_text_and_on_its_own_validation_documents(tiny_run: Path, tiny_recipe: Path) -> None:
    """A run of 12 steps is no better than a unigram model, but which texts it was measured on is said."""
    ended = gemmule("doctor", tiny_run, "--data", tiny_recipe.parent / "valid.txt", "--json")
    [loss] = [finding for finding in json.loads(ended.out)["findings"] if finding["name"] == "loss"]
    assert f"nats per token of {tiny_recipe.parent / 'valid.txt'}" in loss["sentence"]
    ended = gemmule("doctor", tiny_run, "--json")
    [loss] = [finding for finding in json.loads(ended.out)["findings"] if finding["name"] == "loss"]
    for name in ("built-in English text", "built-in stories", f"validation documents of {tiny_run / 'data'}"):
        assert f"nats per token of the {name}" in loss["sentence"]


def test_what_is_no_model_or_text_is_the_users_mistake(folder: Path, tmp_path: Path) -> None:
    assert gemmule("doctor", tmp_path / "nowhere").code == 2
    ended = gemmule("doctor", folder, "--data", "nowhere.txt")
    assert ended.code == 2
    assert "nowhere.txt: no such file or folder" in ended.err
    (folder / "generation_config.json").write_text("{")
    ended = gemmule("doctor", folder)
    assert ended.code == 2
    assert "generation_config.json: cannot be read" in ended.err


@pytest.mark.parametrize(
    ("value", "name"), [("nan", "model.norm.weight"), ("inf", "model.layers.3.mlp.up_proj.weight")]
)
def test_a_weight_that_is_no_number_is_named(folder: Path, value: str, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = float(value)
    save_file(weights, folder / "model.safetensors")
    ended = gemmule("doctor", folder, "--json")
    assert ended.code == 1
    report = json.loads(ended.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    [finding] = [finding for finding in report["findings"] if finding["name"] == "weights"]
    ours = {"model.norm.weight": "norm.weight"}.get(name, "blocks.3.mlp.up.weight")
    assert finding == {"name": "weights", "verdict": "failed", "sentence": f"{ours} holds NaN or infinity"}
