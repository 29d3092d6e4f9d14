import json
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import DeviceError, RecipeError
from gemmule.plan.dataset_size import dataset_size
from gemmule.plan.planner import fewest_gpus, planner_of, savings
from gemmule.plan.prediction_log import PredictionLog, summary
from gemmule.run_folder import RunFolder
from gemmule.settings import check_recipe
from gemmule.train.recipe import Recipe


def recipe(**sections: dict[str, Any]) -> Recipe:
    given: dict[str, Any] = {
        "data": {"train": "storybook:100", "validation": "storybook:10"},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "vocab_size": 512,
        },
        "tokenizer": {"vocab_size": 512},
        "train": {"steps": 100, "batch_size": 16, "context": 32},
    }
    if "size" in sections.get("model", {}):
        given["model"] = {}
    merged = {name: given.get(name, {}) | sections.get(name, {}) for name in given.keys() | sections.keys()}
    return check_recipe(merged, Recipe, "of the test")


def test_a_plan_adds_up() -> None:
    plan = planner_of(recipe(train={"micro_batch_size": 4}), "h100", gpus=2, price=2.0).plan()
    assert (plan.micro_batch, plan.micro_batches, plan.tokens) == (4, 2, 100 * 16 * 32)
    assert plan.times.step == plan.times.forward + plan.times.backward + plan.times.optimizer + plan.times.communication
    assert plan.tokens_per_second == pytest.approx(512 / plan.times.step)
    assert plan.cost == pytest.approx(plan.hours * 2 * 2.0)
    assert plan.kilowatt_hours == pytest.approx(plan.hours * 2 * 0.7)
    assert plan.fits
    assert plan.largest == 8
    assert json.loads(json.dumps(summary(plan)))["memory"]["all"] == plan.memory.total


def test_a_time_budget_becomes_steps() -> None:
    plan = planner_of(recipe(train={"minutes": 0.01, "steps": 10**9}), "h100").plan(search=False)
    assert plan.steps == int(0.6 / plan.times.step)


@pytest.mark.slow
def test_larger_devices_take_larger_micro_batches() -> None:
    large = {
        "model": {"size": "270m", "vocab_size": 262_144},
        "train": {"steps": 10, "batch_size": 64, "context": 2048},
    }
    small, big = (planner_of(recipe(**large), name) for name in ("4090", "h200"))
    found, more = small.plan(), big.plan()
    assert not found.fits
    assert 0 < found.largest < more.largest
    assert small.memory(found.largest).total <= small.capacity < small.memory(2 * found.largest).total


def test_what_does_not_fit_is_told_what_would_help() -> None:
    large = {"model": {"size": "1b", "vocab_size": 262_144}, "train": {"batch_size": 8, "context": 2048, "steps": 10}}
    planner = planner_of(recipe(**large), "4090")
    found = savings(planner, 8, largest=0)
    assert [saving.bytes for saving in found] == sorted((saving.bytes for saving in found), reverse=True)
    assert {saving.setting for saving in found} >= {
        "train.micro_batch_size=1",
        "parallel.activation_checkpointing=full",
    }
    assert all(saving.bytes > 0 for saving in found)


def test_the_largest_micro_batch_that_fits_is_the_first_advice_and_is_accepted() -> None:
    given = recipe(model={"hidden_size": 256, "intermediate_size": 2048}, train={"batch_size": 64, "context": 4096})
    planner = planner_of(given, "3060")
    plan = planner.plan()
    assert not plan.fits
    assert 1 < plan.largest < 64
    found = savings(planner, plan.micro_batch, plan.largest)
    assert found[0].setting == f"train.micro_batch_size={plan.largest}"
    assert found[0].fits
    table = given.model_dump(exclude_unset=True)
    for saving in found:
        changed = planner_of(check_recipe(table, Recipe, "x", [saving.setting]), "3060").plan(search=False)
        assert changed.fits == saving.fits
        assert plan.memory.total - changed.memory.total == pytest.approx(saving.bytes)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (["storybook:10"], "estimated with 165 tokens per story of the storybook"),
        ([__file__], "unknown before the data is read; `gemmule prepare` counts the tokens"),
    ],
)
def test_only_what_was_assumed_of_the_text_is_named(train: list[str], told: str) -> None:
    assert dataset_size(recipe(data={"train": train})).source == told


def test_bytes_per_token_are_assumed_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 400)
    given = recipe(data={"train": [str(tmp_path / "a.txt")], "validation": None, "holdout": 0.5})
    assert dataset_size(given).source == "estimated with 4 bytes per token"
    assert dataset_size(given).tokens == 50


def test_a_model_too_large_for_a_device_is_spread() -> None:
    planner = planner_of(recipe(model={"size": "27b", "vocab_size": 262_208}), "h100")
    gpus = fewest_gpus(planner)
    assert gpus is not None
    weights_and_moments = 16 * 27_009_346_304
    assert weights_and_moments / 80e9 < gpus < 4 * weights_and_moments / 80e9


def test_devices_without_bf16_plan_in_fp32() -> None:
    assert planner_of(recipe(), "t4").precision == "fp32"
    assert planner_of(recipe(), "l4").precision == "bf16"
    assert planner_of(recipe(train={"precision": "fp32"}), "h100").precision == "fp32"
    with pytest.raises(RecipeError, match="fp16"):
        recipe(train={"precision": "fp16"})


def test_apples_devices_keep_the_table_of_attention() -> None:
    kept = {
        name: planner_of(recipe(train={"context": 512}), name).memory(8).classes["activations"] for name in ("m4", "t4")
    }
    assert kept["m4"] > 2 * kept["t4"]


def test_the_fastest_attention_of_a_cpu_is_planned_as_block_local() -> None:
    kept = {
        kernel: planner_of(
            recipe(train={"context": 512, "attention": kernel, "precision": "fp32"}, model={"sliding_window": 64}),
            "cpu",
        )
        .memory(8)
        .classes["activations"]
        for kernel in ("auto", "block-local", "sdpa")
    }
    assert kept["auto"] == kept["block-local"] > kept["sdpa"]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.batch_size = 16: must be a multiple of 5 GPUs, such as 15"):
        planner_of(recipe(), "h100", gpus=5)
    with pytest.raises(DeviceError, match="needs a GPU"):
        planner_of(recipe(), "cpu", gpus=2)


def test_data_is_counted_as_far_as_it_is_known(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(b"x" * 4000)
    assert dataset_size(recipe()).tokens == 16_500
    assert dataset_size(recipe(data={"train": str(file), "validation": str(file)})).tokens == 1000
    unknown = dataset_size(recipe(data={"train": "hf:someone/something"}))
    assert unknown.tokens is None
    assert "gemmule prepare" in unknown.source


def test_a_prepared_folder_tells_its_tokens(tiny_run: Path) -> None:
    from gemmule.data.dataset import open_dataset

    corpus = open_dataset(tiny_run / "data")
    text = dataset_size(recipe(data={"train": str(tiny_run / "data")}))
    assert (text.tokens, text.validation_tokens) == (corpus.train.tokens, corpus.validation.tokens)


def test_a_run_writes_how_far_its_plan_was_off(tiny_run: Path) -> None:
    found = json.loads((tiny_run / "plan.json").read_text())
    assert found["measured"]["step_seconds"] > 0
    for key, off in found["off"].items():
        assert off == pytest.approx(found["predicted"][key] / found["measured"][key] - 1)
    # It prepared its data itself, which may have taken more memory than training.
    assert "peak_memory" not in found["measured"]
    assert found["plan"]["parameters"]["all"] == 53_920


def test_a_run_goes_on_without_a_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such thing as a plan")

    monkeypatch.setattr("gemmule.plan.prediction_log.Planner", fail)
    log = PredictionLog(RunFolder(tmp_path), 1)
    log.observe({"tokens_per_second": 1.0})
    assert log.write() is None
    assert not (tmp_path / "plan.json").exists()


def test_utilization_is_a_share_of_the_plan_and_of_a_gpus_peak(tmp_path: Path) -> None:
    log = PredictionLog(RunFolder(tmp_path), 1)
    assert log.utilization(1000.0) == (None, None), "there is no plan yet"
    plan = log._plan = planner_of(recipe(), "h100").plan(search=False)
    assert plan.mfu is not None
    assert log.utilization(plan.tokens_per_second / 2) == pytest.approx((0.5, plan.mfu / 2))
