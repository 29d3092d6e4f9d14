import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gemmule.data import open_dataset
from gemmule.errors import OutputError, RecipeError
from gemmule.model.gemma3 import Gemma3
from gemmule.recipe import check_recipe, read_recipe, write_recipe
from gemmule.runtime import ALONE
from gemmule.tokenizer import Tokenizer
from gemmule.train import run as run_module
from gemmule.train.metrics import read_json_lines
from gemmule.train.run import Audience, Recipe, build, claim_folder, describe, run_recipe, validation

CPU = torch.device("cpu")


class Listener:
    """An audience that remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.told: list[tuple[Sequence[str], int, int]] = []

    def tell(self, model: Gemma3, _tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int) -> list[str]:
        assert not model.training, "dropout has no place in samples"
        self.told.append((prompts, tokens, seed))
        return [f"{prompt} ..." for prompt in prompts]

    @property
    def audience(self) -> Audience:
        return Audience(
            self.said.append, lambda *_: None, lambda line, steps: self.steps.append((line["step"], steps)), self.tell
        )


def recipe_of(file: Path, *changes: str) -> Recipe:
    return read_recipe(file, Recipe, changes)


def test_a_run_tells_its_audience_and_writes_what_was_told(tiny_recipe: Path, tmp_path: Path) -> None:
    listener = Listener()
    outcome = run_recipe(recipe_of(tiny_recipe, "train.steps=8"), tmp_path / "run", False, listener.audience)
    assert outcome.position.step == 8
    assert outcome.model is not None
    assert not outcome.model.training
    assert listener.steps == [(step, 8) for step in range(1, 9)]
    assert [(prompts, tokens) for prompts, tokens, _ in listener.told] == [(("Mia", "The owl saw"), 12)] * 2
    assert len({seed for _, _, seed in listener.told}) == 1, "the same draws each time, so that samples compare"
    assert read_json_lines(tmp_path / "run" / "samples.jsonl") == [
        {"step": step, "prompt": prompt, "text": f"{prompt} ..."}
        for step in (6, 8)
        for prompt in ("Mia", "The owl saw")
    ]


def test_minutes_become_steps_that_the_resolved_recipe_repeats(tiny_recipe: Path, tmp_path: Path) -> None:
    given = recipe_of(tiny_recipe, "train.minutes=0.001", "train.steps=50")
    listener = Listener()
    outcome = run_recipe(given, tmp_path / "run", False, listener.audience)
    resolved = read_recipe(tmp_path / "run" / "recipe.toml", Recipe)
    assert resolved.train.minutes is None
    assert 1 <= resolved.train.steps == outcome.position.step < 50
    assert any(line.startswith(f"{resolved.train.steps:,} steps: ") for line in listener.said)


def test_minutes_never_raise_the_steps(tiny_recipe: Path, tmp_path: Path) -> None:
    given = recipe_of(tiny_recipe, "train.minutes=60", "train.steps=2")
    assert run_recipe(given, tmp_path / "run", False, Listener().audience).position.step == 2


def test_first_weights_are_a_pure_function_of_the_seed(tiny_recipe: Path) -> None:
    def weights(*changes: str) -> dict[str, torch.Tensor]:
        torch.rand(3)
        return build(recipe_of(tiny_recipe, "model.vocab_size=320", *changes), CPU, "fp32", ALONE)[0].model.state_dict()

    one, again, other = weights(), weights(), weights("train.seed=1")
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_damped_branches_start_at_the_gain_of_their_depth(tiny_recipe: Path) -> None:
    recipe = recipe_of(tiny_recipe, "model.vocab_size=320", "train.damp_branches=true")
    gains = [
        1 + block.post_mlp_norm.weight.mean().item() for block in build(recipe, CPU, "fp32", ALONE)[0].model.blocks
    ]
    assert gains == pytest.approx([1 / (2 * 7) ** 0.5] * 7)


def test_the_description_counts_the_parameters(tiny_run: Path) -> None:
    recipe = read_recipe(tiny_run / "recipe.toml", Recipe)
    counted = sum(parameter.numel() for parameter in Gemma3(recipe.model).parameters())
    text = describe(recipe, CPU, "fp32", ALONE)
    assert f"{counted:,} parameters ({320 * 32:,} in the embedding): 7 layers of width 32" in text
    assert "on cpu in fp32, 8 x 32 tokens a step" in text


@pytest.mark.parametrize(("limit", "known"), [(None, True), (100, False)])
def test_the_floor_is_known_where_all_of_the_validation_is_measured(
    tiny_run: Path, limit: int | None, known: bool
) -> None:
    recipe = read_recipe(tiny_run / "recipe.toml", Recipe)
    recipe = recipe.replace(train=recipe.train.replace(validation_tokens=limit))
    dataset = open_dataset(tiny_run / "data")
    model, _ = build(recipe, CPU, "fp32", ALONE)
    assert validation(dataset, recipe, model, "fp32").floor is None, "of this text nobody knows the entropy"
    targets = dataset.validation.tokens - dataset.validation.documents
    measure = validation(dataset._replace(floor_nats=2.5 * targets), recipe, model, "fp32")
    assert measure.floor == (pytest.approx(2.5) if known else None)
    assert measure.score().tokens == (targets if known else pytest.approx(limit, abs=40))


def complaint(**sections: dict[str, Any]) -> str:
    table = {"data": {"train": "x.txt"}, "train": {"steps": 1}} | sections
    with pytest.raises(RecipeError) as caught:
        check_recipe(table, Recipe, "tiny.toml")
    return str(caught.value)


def test_sections_that_do_not_fit_each_other_are_refused() -> None:
    message = complaint(model={"vocab_size": 300}, tokenizer={"vocab_size": 400})
    assert message.endswith(
        "model.vocab_size = 300: must be at least tokenizer.vocab_size (400); leave it out to follow that"
    )
    message = complaint(train={"steps": 1, "context": 128}, model={"max_position_embeddings": 64})
    assert message.endswith("train.context = 128: must be at most model.max_position_embeddings (64)")


def test_a_new_folder_gets_the_recipe_as_given(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    for resume in (False, True):
        out = tmp_path / f"deep/{resume}"
        assert claim_folder(recipe, out, resume) == recipe
        assert read_recipe(out / "recipe.toml", Recipe) == recipe


def test_a_resumed_run_keeps_the_kernel_that_was_chosen_for_it(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    auto, chosen, named = (
        recipe.replace(train=recipe.train.replace(attention=kernel)) for kernel in ("auto", "folded", "reference")
    )
    claim_folder(auto, tmp_path, False)
    write_recipe(chosen, tmp_path / "recipe.toml", "resolved")
    (tmp_path / "metrics.jsonl").touch()
    assert claim_folder(auto, tmp_path, True).train.attention == "folded"
    assert claim_folder(named, tmp_path, True).train.attention == "reference"


def test_a_run_that_never_began_frees_its_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    claim_folder(recipe_of(tiny_recipe), tmp_path, False)
    changed = recipe_of(tiny_recipe, "train.steps=3")
    assert claim_folder(changed, tmp_path, False) == changed
    assert read_recipe(tmp_path / "recipe.toml", Recipe) == changed


@pytest.fixture
def begun(tiny_recipe: Path, tmp_path: Path) -> Path:
    claim_folder(recipe_of(tiny_recipe), tmp_path / "run", False)
    (tmp_path / "run" / "metrics.jsonl").touch()
    return tmp_path / "run"


def test_a_run_that_began_is_only_resumed(begun: Path, tiny_recipe: Path) -> None:
    with pytest.raises(OutputError, match=r"holds a run already; go on with it by --resume, or name another"):
        claim_folder(recipe_of(tiny_recipe), begun, False)
    assert claim_folder(recipe_of(tiny_recipe), begun, True) == recipe_of(tiny_recipe)


def test_a_run_of_another_recipe_is_told_apart_by_its_settings(begun: Path, tiny_recipe: Path) -> None:
    changed = recipe_of(tiny_recipe, "train.seed=5", "optimizer.name=adamw")
    with pytest.raises(OutputError, match=r"train\.seed is 5, was 0; optimizer\.name is 'adamw', was 'muon'"):
        claim_folder(changed, begun, True)


def test_a_resumed_run_that_cannot_write_its_recipe_keeps_it(
    tiny_run: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_recipe: Recipe, path: Path, *_: object) -> None:
        path.write_text("# The recipe of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(run_module, "write_recipe", fill_the_disk)
    with pytest.raises(OutputError, match=r"recipe\.toml: no space left on the device"):
        run_recipe(recipe_of(tiny_recipe), run, True, Listener().audience)
    assert (run / "recipe.toml").read_text() == (tiny_run / "recipe.toml").read_text()


def test_what_a_run_settles_for_itself_is_no_difference(begun: Path, tiny_recipe: Path) -> None:
    given = recipe_of(tiny_recipe, "train.minutes=2", "train.steps=500")
    assert claim_folder(given, begun, True).train.steps == 12


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_a_vocabulary_left_open_follows_the_run_and_another_is_a_difference(
    begun: Path, tiny_recipe: Path, name: str
) -> None:
    assert "vocab_size" not in recipe_of(tiny_recipe).model.model_fields_set
    settled = recipe_of(tiny_recipe, "model.vocab_size=320")
    write_recipe(settled, begun / "recipe.toml", "resolved")
    assert claim_folder(recipe_of(tiny_recipe), begun, True) == settled
    with pytest.raises(OutputError, match=rf"{name}\.vocab_size is 330, was 320"):
        claim_folder(recipe_of(tiny_recipe, "model.vocab_size=330", "tokenizer.vocab_size=330"), begun, True)


def test_other_files_are_left_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        for resume in (False, True):
            with pytest.raises(OutputError, match="holds other files and no run; name a new or empty folder"):
                claim_folder(recipe_of(tiny_recipe), out, resume)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("thesis.txt", "mine")]
