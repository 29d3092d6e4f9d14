"""`gemmule grow`: one command from a text to a model, a recipe with reasons, and what is said where it cannot."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemmule.cli.grow import _name_of
from gemmule.data.dataset import open_dataset
from gemmule.grow import machine
from gemmule.run_folder import RunFolder
from gemmule.settings import read_comments, read_recipe
from gemmule.train.recipe import Recipe
from runs import gemmule, write_text

pytestmark = pytest.mark.usefixtures("without_plots")

# Less than the rule would take, so that a test is over soon.
SHORT = (
    "--minutes", "0.05", "--set", "train.minutes=none", "--set", "train.steps=4", "--set", "train.validate_every=2",
    "--set", "train.checkpoint_every=2", "--set", "train.sample_tokens=4",
)  # fmt: skip
# What a run would find out by timing it.
NOT_TIMED = ("--set", "train.precision=fp32", "--set", "train.attention=sdpa")


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """The machine stays the same: the first plan measures it, at one width, and the others use that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_ROWS", 1)
        patch.setattr(machine, "_SECONDS", 0.0)
        patch.setattr(machine, "measure", functools.cache(machine.measure))
        yield


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "letters"
    folder.mkdir()
    write_text(folder / "one.txt", 200)
    (folder / "two.md").write_text("# A letter\n\nDear Ada, the weather is fine.\n" * 20)
    return folder


@pytest.fixture(scope="module")
def grown(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that grow has trained, and what it printed."""
    out = tmp_path_factory.mktemp("grown") / "run"
    ended = gemmule("grow", letters, "--out", out, *SHORT, "--json")
    assert ended.code == 0, ended.err
    return out, ended.err


def test_a_folder_becomes_a_model_with_one_command(grown: tuple[Path, str]) -> None:
    out, said = grown
    run = RunFolder(out)
    assert (run.model / "model.safetensors").is_file()
    assert run.read_metrics()[-1]["step"] == 4
    assert "documents kept" in said, "the report of the data"
    assert "GFLOP/s at hidden size" in said, "what was measured"
    for command in ("gemmule serve", "gemmule report", "gemmule export", "gemmule grow"):
        assert f"{command} {out}" in said
    assert gemmule("generate", out, "--prompt", "Dear", "--max-new-tokens", 3).code == 0


def test_the_recipe_has_a_reason_for_what_was_chosen_and_repeats_the_run(
    grown: tuple[Path, str], letters: Path, tmp_path: Path
) -> None:
    out, said = grown
    comments = read_comments(out / "recipe.toml")
    for key in ("tokenizer.vocab_size", "model.hidden_size", "train.batch_size", "train.context", "data.holdout"):
        assert comments[key] in said
    recipe = read_recipe(out / "recipe.toml", Recipe)
    assert recipe.data.train == (str(letters),)
    assert recipe.model.vocab_size == open_dataset(out / "data").tokenizer.vocab_size
    again = gemmule("train", out / "recipe.toml", "--out", tmp_path / "again")
    assert again.code == 0
    first, second = (RunFolder(each).read_metrics()[-1]["loss"] for each in (out, tmp_path / "again"))
    assert first == second


def test_plan_stops_after_the_recipe_which_train_follows(letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = gemmule("grow", letters, "--out", out, "--plan", *SHORT, *NOT_TIMED)
    assert ended.code == 0, ended.err
    assert not (out / "metrics.jsonl").exists()
    assert f"train it by:  gemmule train {out}/recipe.toml --out {out} --resume" in ended.err
    assert gemmule("train", out / "recipe.toml", "--out", out, "--resume").code == 0
    assert RunFolder(out).read_metrics()[-1]["step"] == 4
    assert read_comments(out / "recipe.toml"), "the reasons are still there"


def test_another_plan_in_the_same_folder_reads_the_text_again(letters: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "run", tmp_path / "text.txt"
    write_text(text, 100)
    assert gemmule("grow", text, "--minutes", 1, "--out", out, "--plan").code == 0
    before = open_dataset(out / "data").train.bytes
    write_text(text, 60, seed=3)
    assert gemmule("grow", text, "--minutes", 30, "--out", out, "--plan").code == 0
    assert open_dataset(out / "data").train.bytes < before
    assert gemmule("grow", letters, "--minutes", 30, "--out", out, "--plan").code == 0
    recipe = read_recipe(out / "recipe.toml", Recipe)
    assert (recipe.data.train, recipe.train.minutes) == ((str(letters),), 30)


def test_folders_with_other_files_are_left_alone(letters: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "dataset.json").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "dataset.json").write_text("precious")
    (tmp_path / "project" / "recipe.toml").write_text("[data]\n")
    other = "holds other files and no run"
    for out, sentence in (("own", other), ("project", other), ("file", "is a file")):
        refused = gemmule("grow", letters, "--out", tmp_path / out, "--plan")
        assert (refused.code, sentence in refused.err) == (2, True)
    for folder in ("own", "project"):
        assert (tmp_path / folder / "data" / "dataset.json").read_text() == "precious"


def test_a_plan_that_fails_leaves_nothing_behind(letters: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for arguments in ((tmp_path / "empty.txt",), (letters, "--size", "1k")):
        assert gemmule("grow", *arguments, "--out", tmp_path / "run", "--plan").code == 2
        assert not (tmp_path / "run").exists()


def test_what_was_set_by_hand_is_said_to_be(letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = gemmule("grow", letters, "--out", out, "--plan", "--json", "--set", "train.context=64")
    assert json.loads(ended.out) == {"run": str(out), "recipe": str(out / "recipe.toml")}
    assert "train.context = 64: set by --set" in ended.err
    assert read_comments(out / "recipe.toml")["train.context"] == "set by --set"


def test_a_finished_run_is_left_alone(grown: tuple[Path, str], letters: Path) -> None:
    out, _ = grown
    refused = gemmule("grow", letters, "--out", out)
    assert refused.code == 2
    for advice in ("--resume", f"gemmule grow {out}", f"--start {out} --out NEW"):
        assert advice in refused.err
    for option in ("--size", "--start"):
        ended = gemmule("grow", out, option, "5m")
        assert (ended.code, f"leaves {option} without effect" in ended.err) == (2, True)


@pytest.mark.slow  # the least that it can be asked for are three seconds of training
def test_a_finished_run_is_trained_longer(grown: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(grown[0], tmp_path / "run")
    longer = gemmule("grow", out, "--minutes", 0.05)
    assert longer.code == 0, longer.err
    assert "extending the run by 0.05 minutes: from step 4" in longer.err
    assert RunFolder(out).read_metrics()[-1]["step"] > 4


def test_the_weights_of_a_model_learn_another_text(tiny_run: Path, letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = gemmule("grow", letters, "--start", tiny_run, "--out", out, *SHORT, *NOT_TIMED, "--json")
    assert ended.code == 0, ended.err
    recipe = read_recipe(out / "recipe.toml", Recipe)
    assert recipe.train.start == str(tiny_run)
    assert recipe.optimizer.name == "adamw"
    assert "small steps for all of them" in read_comments(out / "recipe.toml")["optimizer.name"]
    assert json.loads(ended.out)["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("missing.txt",), "missing.txt"),
        (("TEXT", "--size", "big"), "--size big: write a number of parameters, such as 500k, 5m or 5000000"),
        (("TEXT", "--size", "10"), "no shape has about so many parameters"),
        (("TEXT", "--minutes", "0"), "--minutes"),
        (("TEXT", "--minutes", "nan"), "--minutes"),
        (("TEXT", "--start", "missing"), "missing"),
        (("TEXT", "--start", "RUN", "--size", "1m"), "--size: has no effect beside --start"),
        (("TEXT", "--set", "train.stpes=1"), "did you mean train.steps?"),
        (("TEXT", "--set", "data.holdout=2"), "data.holdout"),
        (("TEXT", "--set", "data.train=other.txt"), "the text is what SOURCE names"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, letters: Path, tiny_run: Path, tmp_path: Path
) -> None:
    known = {"TEXT": str(letters), "RUN": str(tiny_run)}
    ended = gemmule("grow", *(known.get(each, each) for each in arguments), "--out", tmp_path / "run", "--plan")
    assert ended.code == 2
    assert sentence in ended.err
    assert "Traceback" not in ended.err


def test_a_text_of_a_few_bytes_is_said_to_be_too_little(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("Roses are red, violets are blue, sugar is sweet, and so are you.\n" * 5)
    ended = gemmule("grow", tmp_path / "poem.txt", "--out", tmp_path / "run", *SHORT, *NOT_TIMED)
    assert ended.code == 0, ended.err
    assert "bytes of text are enough to learn its characters" in ended.err
    assert (tmp_path / "run" / "model").is_dir()


def test_a_run_that_has_not_ended_is_to_be_finished_first(grown: tuple[Path, str], tmp_path: Path) -> None:
    out = shutil.copytree(grown[0], tmp_path / "run")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 3))
    ended = gemmule("grow", out, "--minutes", 1)
    assert ended.code == 2
    assert f"finish it first by gemmule train {out}/recipe.toml --out {out} --resume" in ended.err


@pytest.mark.parametrize(
    ("source", "name"),
    [("docs/*.md", "docs"), ("letters/", "letters"), ("a/b.jsonl.gz", "b"), ("hf:owner/name", "name"), ("-", "grown")],
)
def test_a_run_is_named_after_its_source(source: str, name: str) -> None:
    assert _name_of(source) == name


def test_under_torchrun_the_recipe_is_to_be_written_first(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ended = gemmule("grow", letters)
    assert ended.code == 2
    assert "write the recipe with --plan" in ended.err
