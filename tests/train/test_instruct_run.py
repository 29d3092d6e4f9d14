"""Supervised fine-tuning: replies and their ends are learned, a resumed run is the same, bad data is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import runs
from gemmule.data.batches import IGNORED
from gemmule.data.dataset import open_dataset
from gemmule.data.shards import open_shard
from gemmule.errors import DatasetError, RecipeError
from gemmule.inference.engine import reply_to_all, stop_tokens
from gemmule.inference.requests import requests_of
from gemmule.inference.sampling import SamplingSettings
from gemmule.run_folder import read_json_lines
from gemmule.settings import read_recipe
from gemmule.tokenizer.chat import CHAT_TEMPLATE, render_chat
from gemmule.train.loss import summed_loss
from gemmule.train.objectives import training_rows
from gemmule.train.opening import load_with_path
from gemmule.train.recipe import Recipe
from gemmule.train.run import run_recipe

pytestmark = pytest.mark.usefixtures("without_plots")

TRAIN = """
[data]
kind = "conversations"
train = "{train}"
validation = "{validation}"

[train]
start = "{start}"
steps = 6
batch_size = 4
context = 96
log_every = 1
validate_every = 3
checkpoint_every = 3
sample_prompts = ["What is number 3?"]
sample_tokens = 24
device = "cpu"
precision = "fp32"

[optimizer]
name = "adamw"
learning_rate = 0.01

[schedule]
warmup_share = 0.0
"""
THINGS = ("kite", "ball", "drum", "boat", "cake", "lamp")


def write_chats(path: Path, count: int, first: int = 0, turns: int = 2) -> Path:
    rows = [
        {
            "messages": [
                message
                for turn in range(1 + number % turns)
                for message in (
                    {"role": "user", "content": f"What is number {number + turn}?"},
                    {"role": "assistant", "content": f"It is a {THINGS[(number + turn) % 6]}."},
                )
            ]
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(start: Path, tmp_path: Path) -> Path:
    train, held_out = write_chats(tmp_path / "train.jsonl", 40), write_chats(tmp_path / "held.jsonl", 6, 100)
    recipe = tmp_path / "instruct.toml"
    recipe.write_text(TRAIN.format(train=train, validation=held_out, start=start), encoding="utf-8")
    return recipe


def test_a_run_says_what_is_trained_and_the_model_is_ready_to_chat(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = runs.gemmule("train", file, "--out", run)
    assert ended.code == 0, ended.err
    report = open_dataset(run / "data").report.train.loss_mask
    assert report is not None
    assert f"train: {report}" in ended.err
    assert ended.err.index(f"train: {report}") < ended.err.index("step 1/6" if "step 1/6" in ended.err else "training")
    assert "40 conversations in" in ended.err
    assert f"gemmule chat {run / 'model'}" in ended.err
    _, tokenizer, _ = load_with_path(run / "model")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    generation = json.loads((run / "model" / "generation_config.json").read_text())
    assert tokenizer.end_of_turn_id in generation["eos_token_id"]
    samples = read_json_lines(run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [3, 6]
    assert samples[0]["text"].startswith("What is number 3?\n\n")
    resolved = read_recipe(run / "recipe.toml", Recipe)
    assert (resolved.data.kind, resolved.data.too_long) == ("conversations", "drop")


def test_replies_and_their_ends_are_learned(file: Path, tmp_path: Path) -> None:
    changes = ("train.steps=150", "train.validate_every=150", "train.checkpoint_every=150", "train.sample_prompts=[]")
    outcome = run_recipe(read_recipe(file, Recipe, changes), tmp_path / "run")
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val_loss"] < lines[0]["loss"] / 2  # which thing it is cannot be known
    assert outcome.model is not None
    tokenizer = outcome.dataset.tokenizer
    prompts = [
        render_chat(tokenizer, [{"role": "user", "content": f"What is number {n}?"}], reply=True).ids for n in (7, 8)
    ]
    greedy = SamplingSettings(temperature=0)
    for reply in reply_to_all(outcome.model.eval(), requests_of(prompts, 40, stop_tokens(tokenizer), greedy, 0)):
        assert reply[-1] == tokenizer.end_of_turn_id
        assert tokenizer.decode(reply).startswith("It is a ")


def test_the_first_loss_is_that_of_the_replies_alone(file: Path, start: Path, tmp_path: Path) -> None:
    changes = ("train.steps=1", "train.validate_every=1", "train.checkpoint_every=1", "train.sample_prompts=[]")
    recipe = read_recipe(file, Recipe, (*changes, "optimizer.learning_rate=1e-12"))
    run_recipe(recipe, tmp_path / "run")
    [line] = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    model, tokenizer, _ = load_with_path(start, dtype=torch.float32)
    nats, count, size = 0.0, 0, 0
    for row in (tmp_path / "held.jsonl").read_text().splitlines():
        messages = json.loads(row)["messages"]
        ids, trained = render_chat(tokenizer, messages)
        targets = torch.tensor([[i if own else IGNORED for i, own in zip(ids[1:], trained[1:], strict=True)]])
        with torch.no_grad():
            nats += model(torch.tensor([ids[:-1]]), output_head=summed_loss(targets)).item()
        count += sum(trained)
        size += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    assert line["val_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert line["val_bits_per_byte"] == pytest.approx(nats / size / 0.6931471805599453, rel=1e-6)
    assert line["tokens"] == sum(training_rows_targets(recipe, tmp_path / "run"))


def training_rows_targets(recipe: Recipe, run: Path) -> list[int]:
    batch = training_rows(open_dataset(run / "data"), recipe).rows(0, recipe.train.batch_size)
    return (batch.targets != IGNORED).sum(dim=1).tolist()


def test_what_is_too_long_is_left_out_or_loses_its_last_turns(file: Path, tmp_path: Path, messages: list[str]) -> None:
    write_chats(tmp_path / "train.jsonl", 40, turns=4)
    run_recipe(read_recipe(file, Recipe, ("train.steps=1",)), tmp_path / "one")
    dropped = next(line for line in messages if "longer than train.context = 96 left out" in line)
    messages.clear()
    changes = ("train.steps=1", "data.too_long=drop_turns")
    run_recipe(read_recipe(file, Recipe, changes), tmp_path / "other")
    assert any("without their last turns (" in line for line in messages)
    assert "without their last turns" not in dropped


def test_masks_that_teach_nothing_end_before_training(file: Path, tmp_path: Path) -> None:
    run_recipe(read_recipe(file, Recipe, ("train.steps=1",)), tmp_path / "run")
    folder = shutil.copytree(tmp_path / "run" / "data", tmp_path / "data")
    [shard] = folder.glob("train-*.tokens")
    changes = (f"data.train={folder}", "data.validation=none")
    with pytest.raises(RecipeError, match=r'data\.kind = "text": the dataset was prepared as "conversations"'):
        run_recipe(read_recipe(file, Recipe, (*changes, "data.kind=text")), tmp_path / "text")
    import hashlib

    header = open_shard(shard, open_dataset(folder).tokenizer.fingerprint).header
    raw = bytearray(shard.read_bytes())
    raw[header.mask_start :] = bytes(len(raw) - header.mask_start)
    raw[72:104] = hashlib.sha256(raw[128:]).digest()
    shard.write_bytes(raw)
    with pytest.raises(DatasetError, match="train document 0 has no token to train on"):
        run_recipe(read_recipe(file, Recipe, changes), tmp_path / "nothing")
    assert not (tmp_path / "nothing" / "model").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.train=storybook:10", "storybook is text"),
        ("train.context=8", "none of the 40 conversations fits; the shortest needs"),
    ],
)
def test_bad_settings_end_in_one_sentence(file: Path, tmp_path: Path, change: str, words: str) -> None:
    validation = ("--set", "data.validation=none") if "storybook" in change else ()
    ended = runs.gemmule("train", file, "--set", change, *validation, "--out", tmp_path / "run")
    assert ended.code == 2
    assert words in ended.err


@pytest.mark.slow
def test_a_run_killed_again_and_again_equals_one_that_was_not(file: Path, tmp_path: Path) -> None:
    changes = runs.overrides("train.steps=12", "data.too_long=drop_turns", "train.micro_batch_size=2")
    straight, run, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    assert runs.gemmule("train", file, *changes, "--out", straight).code == 0
    for call in range(2, 8):  # of each run that is resumed; the last one is killed within its second half
        death = runs.Death("gemmule.train.loop:lr_scale", min(call, 5))
        process = runs.start("train", file, *changes, "--out", run, "--resume", log=log, death=death)
        process.join()
        if process.exitcode == 0:
            break
    assert runs.gemmule("train", file, *changes, "--out", run, "--resume").code == 0
    assert runs.final_weights(run) == runs.final_weights(straight)
    assert runs.timeless_metrics(run) == runs.timeless_metrics(straight)
    assert (run / "samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(file: Path, tmp_path: Path, strategy: str) -> None:
    steady = [each for each in runs.STEADY if not each.startswith("model.")]
    changes = runs.overrides(*steady, "train.micro_batch_size=2", "train.sample_prompts=[]")
    assert runs.gemmule("train", file, *changes, "--out", tmp_path / "alone").code == 0
    words = ("train", file, *changes, "--set", f"parallel.strategy={strategy}", "--out", tmp_path / "both")
    log = tmp_path / "both.log"
    processes = runs.start_world(2, *words, log=log)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], log.with_name("both.log.0").read_text()
    runs.assert_same_curve(tmp_path / "both", tmp_path / "alone")
