"""The user's mistakes, each by the real command line: exit code 2 and one clear sentence, never a traceback."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gemmule.files import directory_lock
from gemmule.train.checkpoint import checkpoints
from runs import Ended, final_weights, gemmule, steps_done, timeless_metrics, write_text


def complaint(ended: Ended) -> str:
    """Return the one sentence of a command that refused, which begins with the program's name."""
    assert ended.code == 2, ended
    assert ended.out == ""
    before, _, sentence = ended.err.rpartition("gemmule: ")
    assert "Traceback" not in before
    assert sentence.endswith("\n")
    return sentence.removesuffix("\n")


def train(recipe: Path, out: Path, *changes: str) -> Ended:
    overrides = [part for change in changes for part in ("--set", change)]
    return gemmule("train", recipe, *overrides, "--out", out)


# What a file holds (None: it is not there), and what is said of it.
BAD_TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no such file or folder"),
    "empty": (b"", "the file is empty"),
    "blank": (b" \n<|endoftext|>\n\t\n", "no document is left to use"),
    "latin": ("Ein Märchen.\n<|endoftext|>\n".encode("latin-1") * 20, "not UTF-8: 20 of 20 documents"),
    "utf16": ("Once upon a time.".encode("utf-16"), "not UTF-8 but UTF-16"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_learned_from(tiny_recipe: Path, tmp_path: Path, name: str) -> None:
    content, words = BAD_TEXTS[name]
    text = tmp_path / f"{name}.txt"
    if content is not None:
        text.write_bytes(content)
    for ended in (
        train(tiny_recipe, tmp_path / "run", f"data.train={text}"),
        gemmule("prepare", text, "--out", tmp_path / "dataset"),
    ):
        sentence = complaint(ended)
        assert str(text) in sentence
        assert words in sentence
        assert "\n" not in sentence
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_predicted(tiny_run: Path, tmp_path: Path, name: str) -> None:
    content, _ = BAD_TEXTS[name]
    text = tmp_path / f"{name}.txt"
    if content is not None:
        text.write_bytes(content)
    assert str(text) in complaint(gemmule("evaluate", tiny_run, "--data", text))


@pytest.mark.usefixtures("without_plots")
def test_a_refused_run_can_be_mended_in_the_same_place(tiny_recipe: Path, tmp_path: Path) -> None:
    complaint(train(tiny_recipe, tmp_path / "run", "data.train=nowhere.txt", "train.steps=1"))
    assert train(tiny_recipe, tmp_path / "run", "train.steps=1").code == 0


def test_a_corpus_with_fewer_tokens_than_a_row(tiny_recipe: Path, tmp_path: Path) -> None:
    sentence = complaint(train(tiny_recipe, tmp_path / "run", "train.context=20000"))
    assert sentence.startswith("train.context = 20000: the corpus has 9958 tokens in all, fewer than the 20001 of one")
    assert sentence.endswith("use more text or train.context = 9957 or less")


@pytest.mark.usefixtures("without_plots")
def test_a_vocabulary_larger_than_the_corpus_allows(tiny_recipe: Path, tmp_path: Path) -> None:
    sentence = complaint(train(tiny_recipe, tmp_path / "run", "tokenizer.vocab_size=30000"))
    assert sentence.startswith("tokenizer.vocab_size = 30000: more than this corpus allows; use ")
    largest = sentence.split("use ")[1].split(" ")[0]
    assert train(tiny_recipe, tmp_path / "run", f"tokenizer.vocab_size={largest}", "train.steps=1").code == 0


def test_every_mistake_in_a_recipe_is_reported_at_once(tiny_recipe: Path, tmp_path: Path) -> None:
    wrong = [
        "tokenizer.vocab_sise=300",
        "train.batch_size=many",
        "model.num_key_value_heads=3",
        "train.context=99999",
    ]
    lines = complaint(train(tiny_recipe, tmp_path / "run", *wrong)).splitlines()
    assert lines == [
        f"recipe {tiny_recipe}: 4 problems",
        "  tokenizer.vocab_sise = 300: no such setting; did you mean tokenizer.vocab_size?",
        '  train.batch_size = "many": must be a whole number from 1 to 1,000,000,000',
        "  train.context = 99999: must be at most model.max_position_embeddings (32768)",
        "  model.num_key_value_heads = 3: must divide num_attention_heads: [1, 2, 4]",
    ]
    assert not (tmp_path / "run").exists()


def test_a_required_setting_of_the_wrong_type_is_reported_once(tiny_recipe: Path, tmp_path: Path) -> None:
    assert complaint(train(tiny_recipe, tmp_path / "run", "train.steps=many")) == (
        f'recipe {tiny_recipe}\n  train.steps = "many": must be a whole number from 1 to 1,000,000,000'
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"[train\nsteps = 1", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"", "data.train: is required and not set"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes | None, words: str) -> None:
    recipe = tmp_path / "bad.toml"
    if content is not None:
        recipe.write_bytes(content)
    sentence = complaint(gemmule("train", recipe, "--out", tmp_path / "run"))
    assert sentence.startswith(f"recipe {recipe}")
    assert words in sentence


@pytest.fixture
def prepared(tiny_run: Path, tmp_path: Path) -> Path:
    """A prepared dataset to be damaged."""
    return shutil.copytree(tiny_run / "data", tmp_path / "prepared")


def test_a_truncated_shard(tiny_recipe: Path, prepared: Path, tmp_path: Path) -> None:
    shard = prepared / "train-00000.tokens"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    sentence = complaint(train(tiny_recipe, tmp_path / "run", f"data.train={prepared}"))
    assert sentence.startswith(f"shard {shard}: truncated: {len(whole) - 50} bytes, expected {len(whole)}")


def test_a_shard_made_with_another_tokenizer(tiny_recipe: Path, prepared: Path, tmp_path: Path) -> None:
    description = json.loads((prepared / "tokenizer.json").read_text())
    pieces = description["model"]["vocab"]
    first, second = [piece for piece, number in pieces.items() if number in (300, 301)]
    pieces[first], pieces[second] = pieces[second], pieces[first]
    (prepared / "tokenizer.json").write_text(json.dumps(description))
    sentence = complaint(train(tiny_recipe, tmp_path / "run", f"data.train={prepared}"))
    assert sentence.startswith(f"shard {prepared / 'train-00000.tokens'}: made with another tokenizer (fingerprint ")


def test_a_vocabulary_that_the_dataset_was_not_prepared_with(tiny_recipe: Path, prepared: Path, tmp_path: Path) -> None:
    ended = train(tiny_recipe, tmp_path / "run", f"data.train={prepared}", "tokenizer.vocab_size=512")
    assert complaint(ended) == (
        f"tokenizer.vocab_size = 512: the dataset {prepared} was prepared with 320; leave it out to follow that"
    )


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids(
    tiny_recipe: Path, tiny_run: Path, prepared: Path, tmp_path: Path
) -> None:
    changes = [f"data.train={prepared}", f"tokenizer.path={tiny_run / 'model'}", "model.vocab_size=300"]
    sentence = complaint(train(tiny_recipe, tmp_path / "run", *changes))
    assert sentence == "model.vocab_size = 300: the tokenizer has 320 ids; use 320, or leave it out"


@pytest.mark.parametrize("name", ["tokenizer.json", "report.json", "train-00000.tokens"])
def test_a_dataset_that_lacks_a_file(tiny_recipe: Path, prepared: Path, tmp_path: Path, name: str) -> None:
    (prepared / name).unlink()
    assert name in complaint(train(tiny_recipe, tmp_path / "run", f"data.train={prepared}"))


def test_a_folder_that_holds_something_else(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    words = "holds other files and no run; name a new or empty folder"
    assert complaint(train(tiny_recipe, tmp_path)) == f"--out {tmp_path}: {words}"
    assert complaint(gemmule("train", tiny_recipe, "--out", tmp_path, "--resume")) == f"--out {tmp_path}: {words}"
    assert complaint(train(tiny_recipe, tmp_path / "thesis.txt")).endswith(words)
    words = "is not empty; name a new or empty folder for the dataset"
    assert words in complaint(gemmule("prepare", tiny_recipe.parent / "train.txt", "--out", tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_that_holds_a_run(tiny_recipe: Path, tiny_run: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_run.rglob("*")}
    assert complaint(train(tiny_recipe, tiny_run)) == (
        f"--out {tiny_run}: holds a run already; resume it with --resume, name another folder, or remove it "
        f"(rm -r {tiny_run})"
    )
    changes = ["--set", "train.seed=7", "--set", "model.dropout=0.0"]
    assert complaint(gemmule("train", tiny_recipe, *changes, "--out", tiny_run, "--resume")) == (
        f"--out {tiny_run}: holds a run of another recipe (model.dropout is 0.0, was 0.1; train.seed is 7, was 0); "
        "name another folder"
    )
    assert {file: file.stat().st_mtime_ns for file in tiny_run.rglob("*")} == before


def test_a_place_that_cannot_be_written(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in complaint(train(tiny_recipe, tmp_path / "file" / "run"))


def test_fp16_is_refused_with_the_reason(tiny_recipe: Path, tmp_path: Path) -> None:
    sentence = complaint(train(tiny_recipe, tmp_path / "run", "train.precision=fp16"))
    assert sentence.startswith(f'recipe {tiny_recipe}\n  train.precision = "fp16": ')
    assert "65504" in sentence


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_a_device_that_is_not_there(tiny_recipe: Path, tiny_run: Path, tmp_path: Path, command: str) -> None:
    arguments: dict[str, list[object]] = {
        "train": [tiny_recipe, "--set", "train.device=mps:0", "--out", tmp_path / "run"],
        "generate": [tiny_run, "--device", "mps:0"],
        "evaluate": [tiny_run, "--device", "mps:0", "--data", "storybook:1"],
    }
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    assert "device 'mps:0': this machine has no such device" in complaint(gemmule(command, *arguments[command]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "RECIPE", "--price", "nan"],
        ["plan", "RECIPE", "--price", "inf"],
    ],
)
def test_numbers_of_options_out_of_range(arguments: list[object]) -> None:
    ended = gemmule(*arguments)
    assert ended.code == 2
    assert f"Invalid value for '{arguments[2]}'" in ended.err


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def make_bert(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "not there": (shutil.rmtree, "no such folder; name a model folder or a run folder"),
    "without configuration": (remove("config.json"), "config.json: no such file"),
    "without weights": (remove("model.safetensors"), "model.safetensors: no such file"),
    "without tokenizer": (remove("tokenizer.json"), "tokenizer.json: no such file"),
    "truncated": (cut("model.safetensors"), "model.safetensors: damaged or not a safetensors file"),
    "of another kind": (make_bert, "model_type is 'bert'; Gemmule opens 'gemma3_text' models"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_opened(tiny_run: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BAD_MODELS[name]
    model = shutil.copytree(tiny_run / "model", tmp_path / "model")
    spoil(model)
    for ended in (gemmule("generate", model), gemmule("evaluate", model, "--data", "storybook:1")):
        sentence = complaint(ended)
        assert str(model) in sentence
        assert words in sentence


def test_a_run_without_a_good_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for folder in checkpoints(run):
        cut("model.safetensors")(folder)
    sentence = complaint(gemmule("generate", run))
    assert "a run without a good checkpoint yet" in sentence
    assert sentence.count("damaged") == 2


def test_a_prompt_longer_than_the_model_reaches(tiny_run: Path) -> None:
    sentence = complaint(gemmule("generate", tiny_run, "--prompt", "x" * 40_000))
    assert sentence.endswith("tokens; this model's max_position_embeddings is 32768")


def test_nothing_to_continue(tiny_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_run / "model", tmp_path / "model")
    description = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(description | {"post_processor": None}))
    assert complaint(gemmule("generate", model, "--prompt", "")).startswith("the prompt is empty")
    assert gemmule("generate", model, "--prompt", "Tom", "--max-new-tokens", 2).code == 0


def test_a_mistake_shows_no_traceback_in_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemmule", "prepare", str(tmp_path / "no.txt"), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert complaint(Ended(ended.returncode, ended.stdout, ended.stderr)).startswith(f"{tmp_path / 'no.txt'}: no such")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many KiB, which grows when it is asked for again."""
    disk = tmp_path / "disk"

    def resize(size: int) -> Path:
        disk.mkdir(exist_ok=True)
        options = f"size={size}k" + (",remount" if disk.is_mount() else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        return disk

    yield resize
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_checkpoints_and_the_run_goes_on(
    tiny_recipe: Path, tiny_run: Path, small_disk: Callable[[int], Path]
) -> None:
    run = small_disk(800) / "run"
    ended = train(tiny_recipe, run)
    places = {step: run / "checkpoints" / f"step-{step:08d}" for step in (6, 9, 12)}
    told = "a checkpoint could not be written; earlier ones are kept and the run continues"
    for step in (6, 9):
        assert f"{told}: {places[step]}: no space left on the device" in ended.err
    assert f"{places[12]}: no space left on the device" in ended.err
    assert complaint(ended).startswith(f"{run / 'model'}: no space left on the device"), "it is tried all the same"
    assert steps_done(run) == 12
    assert [folder.name for folder in checkpoints(run)] == ["step-00000003"]
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["step-00000003"]
    assert "no space left" in complaint(gemmule("train", tiny_recipe, "--out", run, "--resume"))
    small_disk(8000)
    assert gemmule("train", tiny_recipe, "--out", run, "--resume").code == 0
    assert final_weights(run) == final_weights(tiny_run)
    assert timeless_metrics(run) == timeless_metrics(tiny_run)


@pytest.mark.parametrize(
    "arguments",
    [("generate",), ("evaluate", "--data", "storybook:1"), ("doctor",), ("export", "--to", "hf", "--out", "x"),
     ("import", "--out", "x")],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_folder(
    arguments: tuple[str, ...], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")  # which is a MODEL
    command, *options = arguments
    assert complaint(gemmule(command, "", *options)).startswith("'': is no name of a file or folder")


def test_a_run_that_another_process_is_writing(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    with directory_lock(run):
        sentence = complaint(gemmule("train", tiny_recipe, "--out", run, "--resume"))
    assert sentence == f"{run}: another process is writing there; let it end, or name another folder"


def test_a_dataset_that_does_not_fit_leaves_nothing(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    text = write_text(tmp_path / "train.txt", 3000)
    disk = small_disk(64)
    sentence = complaint(gemmule("prepare", text, "--vocab-size", 300, "--out", disk / "dataset"))
    assert sentence.startswith(f"{disk / 'dataset'}: no space left on the device")
    assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [*range(4, 100, 16), *range(560, 660, 16), *range(700, 1500, 200)])
def test_wherever_a_disk_fills_up_it_is_said(tiny_recipe: Path, small_disk: Callable[[int], Path], size: int) -> None:
    assert "no space left on the device" in complaint(train(tiny_recipe, small_disk(size) / "run"))
