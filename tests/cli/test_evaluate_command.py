import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.run_folder import read_json_lines
from runs import gemmule


def evaluate(model: Path, data: object, *options: object) -> dict[str, float]:
    ended = gemmule("evaluate", model, "--data", data, "--json", *options)
    assert ended.code == 0, ended.err
    figures: dict[str, float] = json.loads(ended.out)
    return figures


def test_figures_are_consistent(tiny_run: Path, tiny_recipe: Path) -> None:
    data = tiny_recipe.parent / "valid.txt"
    figures = evaluate(tiny_run, data)
    assert set(figures) == {"loss", "bits_per_byte", "perplexity", "tokens", "bytes", "documents", "dropped"}
    texts = [text.strip() for text in data.read_text().split("<|endoftext|>") if text.strip()]
    assert figures["documents"] == len(texts)
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] / math.log(2) * figures["tokens"] / figures["bytes"]
    )


def test_a_text_costs_what_validation_said(tiny_run: Path, tiny_recipe: Path) -> None:
    last = read_json_lines(tiny_run / "metrics.jsonl")[-1]
    figures = evaluate(tiny_run, tiny_recipe.parent / "valid.txt")
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)


def test_how_many_rows_at_once_changes_nothing(tiny_run: Path, tiny_recipe: Path) -> None:
    data = tiny_recipe.parent / "valid.txt"
    one, many = (evaluate(tiny_run, data, "--batch-size", size) for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)


def test_the_first_documents_alone(tiny_run: Path, tiny_recipe: Path) -> None:
    assert evaluate(tiny_run, tiny_recipe.parent / "valid.txt", "--documents", 5)["documents"] == 5


def test_the_storybook_is_a_text_too(tiny_run: Path) -> None:
    assert evaluate(tiny_run, "storybook:2")["documents"] == 2


def test_without_json_the_figures_are_told(tiny_run: Path, tiny_recipe: Path) -> None:
    ended = gemmule("evaluate", tiny_run, "--data", tiny_recipe.parent / "valid.txt")
    assert (ended.code, ended.out) == (0, "")
    assert "60 documents, 2,473 bytes" in ended.err
    assert "nats per token" in ended.err


def test_a_run_reads_text_as_it_was_trained_to(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    recipe = (run / "recipe.toml").read_text().replace('separator = "<|endoftext|>"', 'separator = "%"')
    recipe = recipe.replace("min_characters = 0", "min_characters = 4")
    (run / "recipe.toml").write_text(recipe)
    (tmp_path / "jokes.txt").write_text("one joke%two jokes%no")
    for model in (run, run / "model", newest(run)):
        assert evaluate(model, tmp_path / "jokes.txt")["documents"] == 2
        assert evaluate(model, tmp_path / "jokes.txt", "--separator", "#")["documents"] == 1
    shutil.copytree(tiny_run / "model", tmp_path / "alone")
    assert evaluate(tmp_path / "alone", tmp_path / "jokes.txt")["documents"] == 1


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_without_data_the_held_out_documents_of_a_run_are_predicted(tiny_run: Path) -> None:
    last = read_json_lines(tiny_run / "metrics.jsonl")[-1]
    ended = gemmule("evaluate", tiny_run, "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    assert f"the validation documents of {tiny_run / 'data'}:" in ended.err
    assert figures["documents"] == 60
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    named = evaluate(tiny_run / "model", tiny_run / "data")
    assert named == figures
    assert evaluate(tiny_run, tiny_run / "data", "--documents", 7)["documents"] == 7


def test_what_cannot_be_predicted_is_refused(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "model", tmp_path / "alone")
    other = tmp_path / "other"
    text = tiny_recipe.parent / "valid.txt"
    assert gemmule("prepare", text, "--validation", text, "--vocab-size", 300, "--out", other).code == 2
    options = ["--validation", text, "--vocab-size", 300, "--out", other]
    assert gemmule("prepare", tiny_recipe.parent / "train.txt", *options).code == 0
    for options, words in [
        ([tmp_path / "alone"], "--data: name the text to score"),
        (
            [tiny_run, "--data", other],
            "was prepared with another tokenizer than the model's; name the text that it was",
        ),
        ([tiny_run, "--separator", "%"], "is prepared, its text was read already; leave them out"),
        ([tiny_run, "--context", 100_000], "--context = 100000: the model reads at most"),
    ]:
        ended = gemmule("evaluate", *options)
        assert ended.code == 2
        assert words in ended.err.replace("\n", " ")


def test_a_model_that_is_not_finite_is_no_success(tiny_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_run / "model", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    ended = gemmule("evaluate", tmp_path / "nan", "--data", "storybook:2", "--json")
    assert (ended.code, ended.out) == (1, "")
    assert f"{tmp_path / 'nan'}: the loss is nan, not a number; gemmule doctor" in ended.err


WAITS = """
import sys, time
from gemmule.cli.main import main
from gemmule.evaluate import text

def wait(*_, **__):
    print("waits", flush=True)
    time.sleep(60)

text.score = wait
sys.argv = ["gemmule", *sys.argv[1:]]
main()
"""


def test_a_text_is_scored_without_temporary_files(tiny_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS, "evaluate", str(tiny_run), "--data", "storybook:2"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    assert not list(tmp_path.glob("tmp*"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.endswith("gemmule: stopped\n")
    assert not list(tmp_path.glob("tmp*"))


def test_a_folder_in_bf16_is_computed_in_fp32(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_run / "model" / "model.safetensors")
    for name in ("bfloat16", "float32"):
        folder = shutil.copytree(tiny_run / "model", tmp_path / name)
        rounded = {key: weight.bfloat16().to(getattr(torch, name)) for key, weight in weights.items()}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    one, other = (evaluate(tmp_path / name, tiny_recipe.parent / "valid.txt") for name in ("bfloat16", "float32"))
    assert one == other
