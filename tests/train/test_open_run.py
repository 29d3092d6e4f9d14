import os
from pathlib import Path

import pytest

from gemmule.errors import OutputError
from gemmule.files import directory_lock
from gemmule.run_folder import RunFolder
from gemmule.settings import read_recipe, write_recipe
from gemmule.train.open_run import claim_run, keep_recipe, remove_leftovers
from gemmule.train.recipe import Recipe


def recipe_of(file: Path, *changes: str) -> Recipe:
    return read_recipe(file, Recipe, changes)


def claim_folder(recipe: Recipe, out: Path, resume: bool, allow_changes: bool = False) -> Recipe:
    """Claim a folder and let it go again; return the recipe to follow."""
    with claim_run(recipe, out, resume, allow_changes=allow_changes) as followed:
        return followed


def test_a_new_folder_gets_the_recipe_as_given(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    for resume in (False, True):
        out = tmp_path / f"deep/{resume}"
        assert claim_folder(recipe, out, resume) == recipe
        assert read_recipe(out / "recipe.toml", Recipe) == recipe


def test_a_resumed_run_keeps_the_kernel_that_was_chosen_for_it(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    auto, chosen, named = (
        recipe.replace(train=recipe.train.replace(attention=kernel)) for kernel in ("auto", "block-local", "reference")
    )
    claim_folder(auto, tmp_path, False)
    write_recipe(chosen, tmp_path / "recipe.toml", "resolved")
    (tmp_path / "metrics.jsonl").touch()
    assert claim_folder(auto, tmp_path, True).train.attention == "block-local"
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
    with pytest.raises(OutputError, match=r"holds a run already; resume it with --resume, name another"):
        claim_folder(recipe_of(tiny_recipe), begun, False)
    assert claim_folder(recipe_of(tiny_recipe), begun, True) == recipe_of(tiny_recipe)


def test_a_run_of_another_recipe_is_significant_by_its_settings(begun: Path, tiny_recipe: Path) -> None:
    changed = recipe_of(tiny_recipe, "train.seed=5", "optimizer.name=adamw")
    with pytest.raises(OutputError, match=r"train\.seed is 5, was 0; optimizer\.name is 'adamw', was 'muon'"):
        claim_folder(changed, begun, True)


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


def test_the_folder_is_locked_before_anything_is_written(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    with claim_run(recipe, tmp_path / "run", False):
        before = (tmp_path / "run" / "recipe.toml").read_bytes()
        with pytest.raises(OutputError, match="another process is writing there"):
            claim_folder(recipe_of(tiny_recipe, "train.seed=77"), tmp_path / "run", False)
        assert (tmp_path / "run" / "recipe.toml").read_bytes() == before
    with directory_lock(tmp_path / "run"):
        pass  # it is free again


@pytest.mark.parametrize("name", [".recipe.toml.partial", ".model.partial", ".loss.png.partial"])
def test_what_a_kill_left_does_not_block_a_new_run(tiny_recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("half")
    assert claim_folder(recipe_of(tiny_recipe), tmp_path, False) == recipe_of(tiny_recipe)


def test_what_changes_no_weight_may_be_changed(begun: Path, tiny_recipe: Path) -> None:
    changes = (
        "train.validate_every=3", "train.checkpoint_every=2", 'train.sample_prompts=["Mia"]', "train.sample_tokens=3",
        "train.keep_checkpoints=5", "train.log_every=7", "train.max_skipped_steps=4", 'train.final_model="best"',
        "train.micro_batch_size=2", "train.validation_tokens=50", "train.compile=true",
    )  # fmt: skip
    assert claim_folder(recipe_of(tiny_recipe, *changes), begun, True) == recipe_of(tiny_recipe, *changes)


CHANGED = ("optimizer.learning_rate=0.001", "schedule.warmup_share=0.2", "train.steps=20")


def test_the_license_of_the_data_may_be_given_later_and_is_kept_where_it_is_not(begun: Path, tiny_recipe: Path) -> None:
    licensed = recipe_of(tiny_recipe, "data.license=cc-by-4.0")
    assert claim_folder(licensed, begun, True).data.license == "cc-by-4.0"
    write_recipe(licensed, begun / "recipe.toml", "resolved")
    assert claim_folder(recipe_of(tiny_recipe), begun, True).data.license == "cc-by-4.0"


def test_what_changes_the_weights_is_changed_when_that_is_asked_for(begun: Path, tiny_recipe: Path) -> None:
    changed = recipe_of(tiny_recipe, *CHANGED)
    with pytest.raises(OutputError, match=r"train\.steps is 20, was 12; .*add --allow-changes"):
        claim_folder(changed, begun, True)
    followed = claim_folder(changed, begun, True, allow_changes=True)
    assert (followed.optimizer, followed.schedule, followed.train.steps) == (changed.optimizer, changed.schedule, 20)


@pytest.mark.parametrize(
    "change",
    ["train.batch_size=16", "train.seed=3", "data.holdout=0.5", "model.hidden_size=64", "optimizer.name=adamw"],
)
def test_what_makes_another_run_is_refused_whatever_is_asked_for(begun: Path, tiny_recipe: Path, change: str) -> None:
    with pytest.raises(OutputError, match=r"holds a run of another recipe .*; name another folder$"):
        claim_folder(recipe_of(tiny_recipe, change, *CHANGED), begun, True, allow_changes=True)


def test_a_precision_that_is_left_open_is_the_runs(tiny_recipe: Path, tmp_path: Path) -> None:
    settled, open_ = recipe_of(tiny_recipe, "train.precision=bf16"), recipe_of(tiny_recipe, "train.precision=auto")
    claim_folder(settled, tmp_path, False)
    (tmp_path / "metrics.jsonl").touch()
    assert claim_folder(open_, tmp_path, True).train.precision == "bf16"
    with pytest.raises(OutputError, match=r"train\.precision is 'fp32', was 'bf16'"):
        claim_folder(recipe_of(tiny_recipe), tmp_path, True)
    assert claim_folder(recipe_of(tiny_recipe), tmp_path, True, allow_changes=True).train.precision == "fp32"


def test_leftovers_of_kills_are_swept_and_moved_folders_get_their_names_back(tmp_path: Path) -> None:
    for name in (
        ".recipe.toml.partial", ".model.old/model.safetensors", "model/config.json", ".data.partial/clean/a.json",
        "checkpoints/.step-00000003.partial/state.json", "checkpoints/.step-00000006.old/state.json",
        "checkpoints/.step-00000009.old/state.json", "checkpoints/step-00000009/state.json", ".notes", "my.old",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(RunFolder(tmp_path))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [
        ".data.partial/clean/a.json", ".notes", "checkpoints/step-00000006/state.json",
        "checkpoints/step-00000009/state.json", "model/config.json", "my.old",
    ]  # fmt: skip


def test_the_recipe_of_the_steps_before_a_change_is_kept(begun: Path) -> None:
    before = (begun / "recipe.toml").read_bytes()
    keep_recipe(RunFolder(begun), 500)
    assert (begun / "recipe-until-00000500.toml").read_bytes() == before


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_written(tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"r\xe9")
    with (
        pytest.raises(OutputError, match="must be UTF-8"),
        claim_run(read_recipe(tiny_recipe, Recipe), out, resume=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
