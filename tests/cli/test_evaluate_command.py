import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.evaluate import overlap
from gemmule.evaluate.results import read_evaluations
from gemmule.formats.folder import save_folder
from gemmule.run_folder import RunFolder, read_json_lines
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import lively_model, tiny_config


def evaluate(model: Path, data: object, *options: object) -> dict[str, float]:
    """Return the figures of a text, without intervals and documents."""
    ended = gemmule("evaluate", model, "--data", data, "--json", *options)
    assert ended.code == 0, ended.err
    return plain(json.loads(ended.out))


def plain(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name] for name in FIGURES}


FIGURES = ("loss", "bits_per_byte", "perplexity", "tokens", "bytes", "documents", "dropped")


def test_figures_are_consistent(tiny_run: Path, tiny_recipe: Path) -> None:
    data = tiny_recipe.parent / "valid.txt"
    figures = evaluate(tiny_run, data)
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
    assert "24 documents, 989 bytes" in ended.err
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
    figures = plain(json.loads(ended.out))
    assert f"the validation documents of {tiny_run / 'data'}:" in ended.err
    assert figures["documents"] == 24
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
        ([tiny_run, "--stride", 65, "--context", 64], "--stride = 65: must be at most the context, 64"),
        ([tiny_run, "--suite", "tales"], "--suite tales: no such suite; there are stories"),
        ([tiny_run, "--suite", "stories", "--stride", 5], "--stride 5: a suite of stories reads no text"),
        ([tiny_run, tmp_path / "nothing"], f"MODEL {tmp_path / 'nothing'}"),
        ([tiny_run, "--separator", "%"], "is prepared, its text was read already; leave them out"),
        ([tiny_run, "--context", 100_000], "--context = 100000: the model reads at most"),
    ]:
        ended = gemmule("evaluate", *options)
        assert ended.code == 2
        assert words in ended.err.replace("\n", " ")


def test_a_dataset_of_another_tokenizer_is_read_as_text(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    text = tiny_recipe.parent / "valid.txt"
    other = tmp_path / "other"
    options = ["--validation", text, "--vocab-size", 300, "--out", other]
    assert gemmule("prepare", tiny_recipe.parent / "train.txt", *options).code == 0
    assert evaluate(tiny_run, other) == pytest.approx(evaluate(tiny_run, text), rel=1e-6)


def test_every_document_and_the_interval_are_in_the_json(tiny_run: Path, tiny_recipe: Path) -> None:
    ended = gemmule("evaluate", tiny_run, "--data", tiny_recipe.parent / "valid.txt", "--json")
    result = json.loads(ended.out)
    assert len(result["items"]) == result["ends"]["count"] == 24
    assert sum(item["nats"] for item in result["items"]) == pytest.approx(result["loss"] * result["tokens"])
    low, high = result["intervals"]["bits_per_byte"]
    assert low < result["bits_per_byte"] < high
    assert f"({low:.4f} to {high:.4f}) bits per byte" in ended.err
    assert "the ends of documents cost" in ended.err


def test_windows_that_overlap_give_tokens_more_context(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(" ".join(f"Mia saw the key, number 0-{number}." for number in range(20)))
    cut, moved = (evaluate(tiny_run, tmp_path / "long.txt", "--context", 16, *more) for more in ([], ["--stride", 4]))
    assert cut["tokens"] == moved["tokens"]
    assert moved["loss"] != cut["loss"]
    assert evaluate(tiny_run, tmp_path / "long.txt", "--context", 16, "--stride", 16) == cut


def test_one_document_is_scored_without_an_interval(tiny_run: Path) -> None:
    ended = gemmule("evaluate", tiny_run, "--data", "storybook:1", "--json")
    assert json.loads(ended.out)["intervals"]["loss"] is None
    assert "no interval: it needs 10 documents, here is 1" in ended.err


def test_models_are_compared_on_the_same_documents(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    first = min((tiny_run / "checkpoints").iterdir())
    data = ["--data", tiny_recipe.parent / "valid.txt"]
    ended = gemmule("evaluate", tiny_run, first, tiny_run, *data, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [model["model"] for model in found["models"]] == [f"{tiny_run} (1)", str(first), f"{tiny_run} (2)"]
    worse, same, better = found["differences"]
    assert (worse["significant"], same["significant"], better["significant"]) == (True, False, True)
    assert worse["interval"][1] < 0 < better["interval"][0], "the first checkpoint needs more bits"
    assert f"{tiny_run} (1) against {tiny_run} (2): +0.0000 bits per byte" in ended.err
    assert "no significant difference; they predict the same" in ended.err
    assert worse["difference"] == pytest.approx(
        found["models"][0]["bits_per_byte"] - found["models"][1]["bits_per_byte"]
    )


def test_models_of_two_tokenizers_are_compared_in_bits_per_byte(
    tiny_run: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = lively_model(tiny_config(vocab_size=380, max_position_embeddings=256))
    (tmp_path / "other").mkdir()
    save_folder(model, tiny_tokenizer, tmp_path / "other")
    ended = gemmule("evaluate", tiny_run, tmp_path / "other", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert [each["measure"] for each in found["differences"]] == ["bits_per_byte"]
    assert found["models"][0]["bytes"] == found["models"][1]["bytes"]
    assert found["models"][0]["tokens"] != found["models"][1]["tokens"]
    assert "the tokenizers differ, so that the models can be compared in bits per byte alone" in ended.err


def test_what_is_found_of_a_run_is_kept_in_it(tiny_run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    run.evaluation.unlink(missing_ok=True)
    text = tiny_recipe.parent / "valid.txt"
    for _ in range(2):
        evaluate(run.path, text)
        evaluate(run.model, text, "--documents", 12)
    (tmp_path / "suite.toml").write_text('prompts = ["Mia"]\ncount = 3\nmax_new_tokens = 9')
    ended = gemmule("evaluate", run.path, "--suite", tmp_path / "suite.toml", "--json")
    assert ended.code == 0, ended.err
    whole, part, told = read_evaluations(run)
    assert (whole["kind"], whole["data"], whole["limit"]) == ("text", str(text), None)
    assert whole["model"] == f"checkpoints/{newest(run.path).name}"
    assert (part["model"], part["limit"], len(part["items"])) == ("model", 12, 12)
    assert (told["kind"], told["stories"], len(told["items"])) == ("stories", 3, 3)
    assert told["items"] == json.loads(ended.out)["items"]
    assert (whole["memorization"]["texts"], told["memorization"]["texts"]) == (20, 3)
    assert told["memorization"]["generated"]["words"] == sum(item["words"] for item in told["items"])


def test_the_training_data_of_a_run_is_searched_for_its_text(
    tiny_run: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "SPAN", 8)  # its documents have ten words
    trained = (tiny_recipe.parent / "train.txt").read_text().split("<|endoftext|>")
    (tmp_path / "mixed.txt").write_text(
        "<|endoftext|>".join([trained[0], "something else", f"new {trained[9].strip()}"])
    )
    ended = gemmule("evaluate", tiny_run, "--data", tmp_path / "mixed.txt", "--json")
    found = json.loads(ended.out)
    assert [item["overlap"] for item in found["items"]] == [True, False, True]
    assert found["overlap"]["without"]["documents"] == 1
    assert "2 of 3 documents have a span of" in ended.err
    assert "memorization: " in ended.err
    silent = gemmule("evaluate", tiny_run, "--data", tmp_path / "mixed.txt", "--json", "--no-overlap")
    assert "memorization" not in silent.err
    alone = json.loads(silent.out)
    assert not {"overlap", "memorization"} & alone.keys()
    assert plain(alone) == plain(found)


@pytest.mark.parametrize("options", [("--data", "storybook:2"), ("--suite", "stories")])
def test_a_run_without_its_training_data_says_that_memorization_is_not_measured(
    tiny_run: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("data"))
    ended = gemmule("evaluate", run, *options, "--json")
    assert ended.code == 0, ended.err
    assert "memorization" not in json.loads(ended.out)
    (said,) = (line for line in ended.err.splitlines() if "memorization" in line)
    assert said.startswith(f"memorization: not measured, for the training data of {run} is not at hand")
    shutil.copytree(tiny_run / "model", tmp_path / "alone")
    assert "memorization" not in gemmule("evaluate", tmp_path / "alone", *options).err


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

text.score_batches = wait
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
    _, said = process.communicate(timeout=300)
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
