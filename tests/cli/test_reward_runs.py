"""Runs that learn from rewards, through the command line."""

import json
import signal
from pathlib import Path

import pytest

from gemmule.run_folder import read_json_lines
from gemmule.settings import read_recipe
from gemmule.train.recipe import Recipe
from runs import Death, final_weights, gemmule, overrides, start, timeless_metrics

pytestmark = pytest.mark.usefixtures("without_plots")

RECIPE = """
[data]
kind = "prompts"
train = "{folder}/train.jsonl"
validation = "{folder}/valid.jsonl"

[train]
start = "{start}"
steps = 6
batch_size = 8
micro_batch_size = 4
context = 40
log_every = 1
validate_every = 6
checkpoint_every = 2
sample_prompts = []
device = "cpu"
precision = "fp32"

[optimizer]
name = "adamw"
learning_rate = 0.01

[rewards]
reward = "{folder}/reward.py:vowels"
replies = 4
max_reply_tokens = 10
"""

REWARD = """
import time

def vowels(messages, reply, row):
    print("noise on the standard output")
    assert messages[-1]["content"] == row["messages"][-1]["content"]
    return sum(letter in "aeiou" for letter in reply) / (1 + len(reply))

def parts(messages, reply, row):
    return {"length": len(reply), "target": row["task"]["target"]}

def raises(messages, reply, row):
    raise ValueError("no such\\nmood")

def hangs(messages, reply, row):
    time.sleep(60)

def ends(messages, reply, row):
    import os
    os._exit(7)

def nan(messages, reply, row):
    return float("nan")

def text(messages, reply, row):
    return "good"

def one(messages, reply, row):
    return 1
"""


@pytest.fixture
def recipe(tiny_run: Path, tmp_path: Path) -> Path:
    """A recipe that teaches a small model to write vowels, by a function of the user's."""
    for name, count in (("train", 12), ("valid", 5)):
        rows = [{"prompt": f"Say {name} {number}.", "target": number} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    file = tmp_path / "vowels.toml"
    file.write_text(RECIPE.format(folder=tmp_path, start=tiny_run / "model"), encoding="utf-8")
    return file


def with_reward(recipe: Path, name: str) -> list[str]:
    return overrides(f"rewards.reward={recipe.parent / 'reward.py'}:{name}")


@pytest.mark.slow
def test_a_reward_is_learned_and_everything_about_it_is_logged(recipe: Path, tmp_path: Path) -> None:
    ended = gemmule("train", recipe, "--out", tmp_path / "run", *overrides("train.steps=30", "train.validate_every=30"))
    assert ended.code == 0, ended.err
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    names = {"reward", "no_signal", "reply_tokens", "ended", "entropy", "kl", "clipped"}
    assert all(names <= line.keys() for line in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(line["clipped"] == 0 for line in lines)  # one step for each reply
    first, last = (sum(line["reward"] for line in part) / 8 for part in (lines[:8], lines[-8:]))
    assert last > first + 0.05
    assert lines[-1]["kl"] > 0.01
    assert lines[-1]["val_reward"] > lines[0]["reward"]
    assert "reward 0." in ended.err


@pytest.mark.slow
def test_a_killed_run_gives_the_same_replies_and_weights(recipe: Path, tmp_path: Path) -> None:
    options = overrides("rewards.steps_per_rollout=2", "rewards.kl=0.1", "rewards.scale_by_deviation=true")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert gemmule("train", recipe, "--out", straight, *options).code == 0
    for _ in range(2):  # in the second step on the same replies, which are made again
        death = Death("gemmule.train.loop:lr_scale", 4)
        process = start("train", recipe, "--out", killed, *options, "--resume", log=tmp_path / "log", death=death)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert gemmule("train", recipe, "--out", killed, *options, "--resume").code == 0
    assert final_weights(straight) == final_weights(killed)
    assert timeless_metrics(straight) == timeless_metrics(killed)
    lines = timeless_metrics(straight)
    assert any(line["clipped"] > 0 for line in lines)
    # Steps in pairs have the same replies.
    assert [line["reward"] for line in lines[::2]] == [line["reward"] for line in lines[1::2]]


def test_components_are_weighed_and_logged_by_themselves(recipe: Path, tmp_path: Path) -> None:
    options = [*with_reward(recipe, "parts"), *overrides('rewards.components=["length"]', "rewards.weights=[0.5]")]
    assert gemmule("train", recipe, "--out", tmp_path / "run", *options, *overrides("train.steps=2")).code == 0
    for line in read_json_lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["reward"] == pytest.approx(line["reward_length"] / 2)
        assert "reward_target" in line
    stored = read_recipe(tmp_path / "run" / "recipe.toml", Recipe)
    assert (stored.rewards.components, stored.rewards.weights) == (("length",), (0.5,))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "reward.py:raises: raises raised ValueError: no such mood"),
        ("hangs", "reward.py:hangs: a call took more than 0.5 s"),
        ("ends", "reward.py:ends: its process ended with 7"),
        ("nan", "reward.py:nan: reward is nan, not a finite number"),
        ("text", "reward.py:text: text raised ValueError"),
        ("one", "reward.py:one: each of the first 100 replies earns 1"),
        ("missing", "reward.py has no function missing"),
    ],
)
def test_a_reward_that_cannot_teach_ends_the_run_in_one_sentence(
    recipe: Path, tmp_path: Path, name: str, words: str
) -> None:
    options = [*with_reward(recipe, name), *overrides("rewards.call_seconds=0.5", "train.steps=20")]
    ended = gemmule("train", recipe, "--out", tmp_path / "run", *options)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "rewards.reward=sings",
            '"sings": no such reward; there are task, ended, or file.py:function',
        ),
        ("rewards.reward=task", 'rewards.reward = "task": a prompt has no task with a checker'),
        ("train.batch_size=6", "train.batch_size = 6: must be a multiple of rewards.replies (4)"),
        ("train.context=20", "train.context = 20: is too short: the longest prompt has"),
        ("train.start=none", "train.start: name the MODEL"),
        ("train.minutes=1", "train.minutes = 1"),
        ("rewards.steps_per_rollout=4", "train.steps = 6: must be a multiple of rewards.steps_per_rollout (4)"),
        ("rewards.weights=[1.0]", "rewards.weights = [1.0]: must be as many as rewards.components (0)"),
        ("parallel.strategy=fsdp", "use ddp"),
        ("data.kind=text", "rewards.reward"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_is_trained(
    recipe: Path, tmp_path: Path, change: str, words: str
) -> None:
    ended = gemmule("train", recipe, "--out", tmp_path / "run", *overrides(change))
    assert ended.code == 2
    assert words in ended.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_json_lines(tmp_path / "run" / "metrics.jsonl")
