import json
from pathlib import Path

import pytest

from gemmule.evaluate.doctor import CHECKS
from gemmule.formats.folder import save_folder
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import lively_model, tiny_config


@pytest.fixture
def folder(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_folder(lively_model(tiny_config(vocab_size=380)).bfloat16(), tiny_tokenizer, tmp_path)
    return tmp_path


def test_a_well_model_ends_with_0_and_a_line_for_each_check(folder: Path) -> None:
    ended = gemmule("doctor", folder)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == list(CHECKS)
    assert lines[-1] == f"{folder} is well"


def test_an_ill_model_ends_with_1_and_is_told_why(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))
    ended = gemmule("doctor", folder, "--json")
    assert ended.code == 1
    report = json.loads(ended.out)
    assert not report["well"]
    [finding] = [finding for finding in report["findings"] if finding["verdict"] == "ill"]
    assert finding["name"] == "special_tokens"
    assert finding["sentence"] == "config.json says eos_token_id = 3; the tokenizer's eos is 1"
    assert gemmule("doctor", folder).out.endswith(f"{folder} is ill: special_tokens\n")


def test_a_run_is_examined_by_its_newest_checkpoint_on_a_text(tiny_run: Path, tiny_recipe: Path) -> None:
    ended = gemmule("doctor", tiny_run, "--data", tiny_recipe.parent / "valid.txt", "--json")
    assert ended.code == 0
    assert {finding["verdict"] for finding in json.loads(ended.out)["findings"]} == {"well"}


def test_what_is_no_model_or_text_is_a_mistake_and_no_illness(folder: Path, tmp_path: Path) -> None:
    assert gemmule("doctor", tmp_path / "nowhere").code == 2
    ended = gemmule("doctor", folder, "--data", "nowhere.txt")
    assert ended.code == 2
    assert "nowhere.txt: no such file or folder" in ended.err
    (folder / "generation_config.json").write_text("{")
    ended = gemmule("doctor", folder)
    assert ended.code == 2
    assert "generation_config.json: cannot be read" in ended.err
