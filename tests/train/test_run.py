import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gemmule.data.dataset import open_dataset
from gemmule.data.prepare import prepare_dataset
from gemmule.errors import CheckpointError, OutputError, RecipeError, TrainingError
from gemmule.model.gemma3 import Gemma3
from gemmule.run_folder import read_json_lines
from gemmule.runtime import Runtime
from gemmule.settings import check_recipe, read_recipe
from gemmule.tokenizer import Tokenizer
from gemmule.train import metrics as metrics_module
from gemmule.train import objectives, storage
from gemmule.train import run as run_module
from gemmule.train.checkpoint import checkpoints, newest_checkpoint
from gemmule.train.objectives import fixed_validation
from gemmule.train.observer import Observer
from gemmule.train.optim import Optimizers
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import ResolvedRecipe, build, describe
from gemmule.train.run import run_recipe
from gemmule.train.state import LossEMA, Position
from gemmule.train.validation import Score, score
from runs import write_text

pytestmark = pytest.mark.usefixtures("without_plots")

CPU = torch.device("cpu")
THREE_LAYERS = "model.num_hidden_layers=3"  # where a test is of the run, and not of the model
WRITING_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


class Recorder(Observer):
    """An observer that remembers its calls, and a sampler that remembers what it was asked."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.asked: list[tuple[Sequence[str], int, int]] = []
        self.sampled: list[Sequence[str]] = []
        self.begun: list[ResolvedRecipe] = []

    def on_train_begin(self, recipe: ResolvedRecipe) -> None:
        self.begun.append(recipe)

    def on_metrics(self, metrics: dict[str, Any], steps: int) -> None:
        self.steps.append((metrics["step"], steps))

    def on_samples(self, step: int, texts: Sequence[str]) -> None:
        self.sampled.append(texts)

    def sample(self, model: Gemma3, _tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int) -> list[str]:
        assert not model.training, "samples are drawn without dropout"
        self.asked.append((prompts, tokens, seed))
        return [f"{prompt} ..." for prompt in prompts]


def recipe_of(file: Path, *changes: str) -> Recipe:
    return read_recipe(file, Recipe, changes)


def test_a_run_calls_its_observer_and_writes_its_samples(tiny_recipe: Path, tmp_path: Path) -> None:
    seen, recipe = Recorder(), recipe_of(tiny_recipe, "train.steps=5", "train.validate_every=4")
    outcome = run_recipe(recipe, tmp_path / "run", False, seen, seen.sample)
    assert outcome.position.step == 5
    assert outcome.model is not None
    assert not outcome.model.training
    assert seen.steps == [(step, 5) for step in range(1, 6)]
    assert [(prompts, tokens) for prompts, tokens, _ in seen.asked] == [(("Mia", "The owl saw"), 12)] * 2
    assert len({seed for _, _, seed in seen.asked}) == 1, "the same draws each time, so that samples compare"
    assert seen.sampled == [["Mia ...", "The owl saw ..."]] * 2
    assert [recipe.train.steps for recipe in seen.begun] == [5]
    assert read_json_lines(tmp_path / "run" / "samples.jsonl") == [
        {"step": step, "prompt": prompt, "text": f"{prompt} ..."}
        for step in (4, 5)
        for prompt in ("Mia", "The owl saw")
    ]


def test_minutes_become_steps_that_the_resolved_recipe_repeats(
    tiny_recipe: Path, tmp_path: Path, messages: list[str]
) -> None:
    given = recipe_of(tiny_recipe, "train.minutes=0.001", "train.steps=50", THREE_LAYERS)
    outcome = run_recipe(given, tmp_path / "run", False)
    resolved = read_recipe(tmp_path / "run" / "recipe.toml", Recipe)
    assert resolved.train.minutes is None
    assert 1 <= resolved.train.steps == outcome.position.step < 50
    assert any(line.startswith(f"{resolved.train.steps:,} steps: ") for line in messages)


@pytest.mark.slow
def test_minutes_never_raise_the_steps(tiny_recipe: Path, tmp_path: Path) -> None:
    given = recipe_of(tiny_recipe, "train.minutes=60", "train.steps=2")
    assert run_recipe(given, tmp_path / "run", False).position.step == 2


def test_first_weights_are_a_pure_function_of_the_seed(tiny_recipe: Path) -> None:
    def weights(*changes: str) -> dict[str, torch.Tensor]:
        torch.rand(3)
        recipe = recipe_of(tiny_recipe, "model.vocab_size=320", *changes)
        return build(recipe, Runtime(CPU)).parallel.model.state_dict()

    one, again, other = weights(), weights(), weights("train.seed=1")
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_damped_branches_start_at_the_gain_of_their_depth(tiny_recipe: Path) -> None:
    recipe = recipe_of(tiny_recipe, "model.vocab_size=320", "train.damp_branches=true")
    model = build(recipe, Runtime(CPU)).parallel.model
    gains = [1 + block.post_mlp_norm.weight.mean().item() for block in model.blocks]
    assert gains == pytest.approx([1 / (2 * 4) ** 0.5] * 4)


def test_the_description_counts_the_parameters(tiny_run: Path) -> None:
    recipe = read_recipe(tiny_run / "recipe.toml", Recipe)
    counted = sum(parameter.numel() for parameter in Gemma3(recipe.model).parameters())
    text = describe(recipe, Runtime(CPU))
    assert f"{counted:,} parameters ({320 * 32:,} in the embedding): 4 layers, hidden size 32," in text
    assert "on cpu in fp32, 8 x 32 tokens per step" in text


@pytest.mark.parametrize(("limit", "known"), [(None, True), (100, False)])
def test_the_floor_is_known_where_all_of_the_validation_is_measured(
    tiny_run: Path, limit: int | None, known: bool
) -> None:
    recipe = read_recipe(tiny_run / "recipe.toml", Recipe)
    recipe = recipe.replace(train=recipe.train.replace(validation_tokens=limit))
    dataset = open_dataset(tiny_run / "data")
    state = build(recipe, Runtime(CPU))
    assert fixed_validation(dataset, recipe, state).floor is None, "of this text nobody knows the entropy"
    targets = dataset.validation.tokens - dataset.validation.documents
    measure = fixed_validation(dataset._replace(floor_nats=2.5 * targets), recipe, state)
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


def test_a_resumed_run_that_cannot_write_its_recipe_keeps_it(
    tiny_run: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_recipe: Recipe, path: Path, *_: object, **_options: object) -> None:
        path.write_text("# The recipe of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(run_module, "write_recipe", fill_the_disk)
    with pytest.raises(OutputError, match=r"recipe\.toml: no space left on the device"):
        run_recipe(recipe_of(tiny_recipe), run, True)
    assert (run / "recipe.toml").read_text() == (tiny_run / "recipe.toml").read_text()


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path) -> Path:
    """A run that has come to its end, to be damaged."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_library_user_needs_no_observer(tiny_recipe: Path, tmp_path: Path) -> None:
    outcome = run_recipe(recipe_of(tiny_recipe, "train.steps=2"), tmp_path / "run")
    assert outcome.position.step == 2
    assert read_json_lines(tmp_path / "run" / "samples.jsonl") == []


@pytest.mark.parametrize("resume", [False, True])
def test_sample_prompts_are_checked_before_the_first_step(tiny_recipe: Path, tmp_path: Path, resume: bool) -> None:
    prompt = "Mia found a red kite, and the owl saw two eggs. " * 2
    changes = (f'train.sample_prompts=["Mia", "{prompt}"]', "model.max_position_embeddings=32", "train.steps=2")
    with pytest.raises(
        RecipeError, match=r"train\.sample_prompts = .* has \d\d tokens; model\.max_position_embeddings"
    ):
        run_recipe(recipe_of(tiny_recipe, *changes), tmp_path / "run", resume)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    fewer = ('train.sample_prompts=["Mia"]', *changes[1:])
    assert run_recipe(recipe_of(tiny_recipe, *fewer), tmp_path / "run", True).position.step == 2


def test_a_library_that_was_left_cut_short_is_built_again_in_the_middle_of_a_run(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    library, validation_of = tmp_path / "cache" / "ab" / "c0.main.so", objectives.fixed_validation
    library.parent.mkdir(parents=True)
    library.touch()

    def loads_it(*arguments: Any) -> Any:
        if library.exists():
            raise ImportError(f"{library}: file too short")
        return validation_of(*arguments)

    monkeypatch.setattr(objectives, "fixed_validation", loads_it)
    recipe = recipe_of(tiny_recipe, "train.steps=2")
    assert run_recipe(recipe, tmp_path / "run", False).position.step == 2
    assert any("a truncated library in the compiler" in sentence for sentence in messages)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # one that stays is not tried for ever
    library.touch()
    with pytest.raises(ImportError, match="file too short"):
        run_recipe(recipe, tmp_path / "again")


def test_a_run_whose_data_were_replaced_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    """Of the same vocabulary size, so that nothing else would notice."""
    data, run = tmp_path / "data", tmp_path / "run"
    settings = recipe_of(tiny_recipe)
    prepare_dataset(settings.data, settings.tokenizer, data)
    changes = (f"data.train={data}", "data.validation=none", "train.steps=2", "train.checkpoint_every=1")
    recipe = recipe_of(tiny_recipe, *changes)
    run_recipe(recipe, run)
    shutil.rmtree(checkpoints(run)[0])
    metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(data)
    text = write_text(tmp_path / "other.txt", 300, seed=9)
    prepare_dataset(settings.data.replace(train=(str(text),)), settings.tokenizer, data)
    with pytest.raises(CheckpointError, match="was trained on other data, with another tokenizer"):
        run_recipe(recipe, run, True)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert (run / "model" / "tokenizer.json").read_bytes() != (data / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_changes_text_has_no_bits_per_byte(tiny_recipe: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    settings = recipe_of(tiny_recipe)
    prepare_dataset(settings.data, settings.tokenizer, data)
    written = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(written | {"lossless": False}))
    run_recipe(recipe_of(tiny_recipe, f"data.train={data}", "data.validation=none", "train.steps=2"), run)
    validated = [line for line in read_json_lines(run / "metrics.jsonl") if "val_loss" in line]
    assert validated
    assert all(line["val_bits_per_byte"] is None and line["val_perplexity"] > 1 for line in validated)


def test_a_run_without_a_whole_checkpoint_is_not_started_again(
    tiny_recipe: Path, finished: Path, messages: list[str]
) -> None:
    for folder in checkpoints(finished):
        with (folder / "config.json").open("a") as file:
            file.write("\n")
    metrics = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="all of its 2 checkpoints are damaged, and nothing is overwritten"):
        run_recipe(recipe_of(tiny_recipe), finished, True)
    assert sum("skipped a damaged checkpoint" in sentence for sentence in messages) == 2
    assert (finished / "metrics.jsonl").read_bytes() == metrics


def test_checkpoints_of_format_2_are_resumed(tiny_recipe: Path, finished: Path) -> None:
    """As written before the position knew what is still to come."""
    for folder in checkpoints(finished):
        state = json.loads((folder / "state.json").read_text())
        del state["position"]["pending"], state["data"]
        position = Position.model_validate(
            state["position"] | {"level": LossEMA.model_validate(state["position"]["level"])}
        )
        digest = hashlib.sha256(position.model_dump_json(exclude={"pending"}).encode()).hexdigest()
        (folder / "state.json").write_text(json.dumps(state | {"format": 2, "position_sha256": digest}))
    assert run_recipe(recipe_of(tiny_recipe), finished, True).position.step == 12


def test_more_steps_continue_a_finished_run(tiny_recipe: Path, finished: Path, messages: list[str]) -> None:
    longer, seen = recipe_of(tiny_recipe, "train.steps=15", "optimizer.learning_rate=0.001"), Recorder()
    before = (finished / "recipe.toml").read_bytes()
    outcome = run_recipe(longer, finished, True, seen, allow_changes=True)
    assert outcome.position.step == 15
    assert [step for step, _ in seen.steps] == [12, 13, 14, 15], "of step 12 the validation is made again"
    assert (finished / "recipe-until-00000012.toml").read_bytes() == before
    assert read_recipe(finished / "recipe.toml", Recipe).train.steps == 15
    assert any(sentence.startswith("resuming with changed settings: train.steps is 15") for sentence in messages)


def test_fewer_steps_than_were_trained_are_refused(tiny_recipe: Path, finished: Path) -> None:
    before = (finished / "recipe.toml").read_bytes()
    with pytest.raises(RecipeError, match=r"train\.steps = 5: the run is at step 12 already; use that many or more"):
        run_recipe(recipe_of(tiny_recipe, "train.steps=5"), finished, True, allow_changes=True)
    assert (finished / "recipe.toml").read_bytes() == before


@pytest.mark.parametrize("final", ["last", "best"])
def test_the_model_folder_gets_the_last_or_the_best_weights(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final: str, messages: list[str]
) -> None:
    losses = iter([1.0, 2.0, 3.0])

    def scored(*arguments: Any, **options: Any) -> Score:
        return score(*arguments, **options)._replace(nats=100 * next(losses), tokens=100)

    monkeypatch.setattr(objectives, "score", scored)
    every = ("train.steps=6", "train.validate_every=2", "train.checkpoint_every=2")
    changes = (*every, f"train.final_model={final}", THREE_LAYERS)
    position = run_recipe(recipe_of(tiny_recipe, *changes), tmp_path / "run", False).position
    assert (position.best_step, position.best_loss) == (2, 1.0)
    expected = tmp_path / "run" / "checkpoints" / f"step-0000000{2 if final == 'best' else 6}" / "model.safetensors"
    assert load_file(tmp_path / "run" / "model" / "model.safetensors").keys() == load_file(expected).keys()
    assert all(
        torch.equal(tensor, load_file(expected)[name])
        for name, tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").items()
    )
    assert any("gets the weights of step 2" in sentence for sentence in messages) == (final == "best")


@pytest.mark.parametrize(
    "number",
    [errno.EIO, *(pytest.param(number, marks=pytest.mark.slow) for number in WRITING_FAILS if number != errno.EIO)],
)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "state.json", "step-"])
def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, messages: list[str]
) -> None:
    refusals, cause = [0], OSError(number, os.strerror(number))

    def refuse(path: object) -> None:
        if "00000002" in str(path) and name in str(path) and not refusals[0]:
            refusals[0] += 1
            raise cause if name != "model.safetensors" else SafetensorError(f"I/O error: (os error {number})")

    def hooked(owner: object, function: str, place: int) -> None:
        original = getattr(owner, function)
        monkeypatch.setattr(
            owner, function, lambda *given, **options: (refuse(given[place]), original(*given, **options))[1]
        )

    hooked(storage, "save_file", 1)
    hooked(Path, "write_text", 0)
    if name == "step-":
        hooked(Path, "rename", 1)
    recipe = recipe_of(tiny_recipe, "train.steps=5", "train.checkpoint_every=2", THREE_LAYERS)
    outcome = run_recipe(recipe, tmp_path / "run", False)
    assert refusals == [1]
    assert outcome.position.step == 5
    (told,) = [sentence for sentence in messages if "could not be written" in sentence]
    assert "step-00000002: " in told
    assert "earlier ones are kept and the run continues" in told
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000005", "step-00000004"]


@pytest.mark.parametrize(
    "number",
    [
        errno.EDQUOT,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.ENOSPC, errno.EFBIG, errno.EIO)),
    ],
)
def test_a_log_that_cannot_be_written_waits_and_is_told_once(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, messages: list[str]
) -> None:
    send, calls = os.pwrite, [0]

    def refuse(*given: Any) -> int:
        calls[0] += 1
        if 3 <= calls[0] <= 5:
            raise OSError(number, os.strerror(number))
        return send(*given)

    monkeypatch.setattr(metrics_module.os, "pwrite", refuse)
    run_recipe(recipe_of(tiny_recipe, "train.steps=6", THREE_LAYERS), tmp_path / "run", False)
    assert [line["step"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))
    assert sum("lines are buffered in memory, and the run continues" in sentence for sentence in messages) == 1


def test_a_log_that_is_lost_ends_the_run_with_a_sentence_and_the_model_written(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics_module.os, "pwrite", refuse)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: no space left on the device"):
        run_recipe(recipe_of(tiny_recipe, "train.steps=4", THREE_LAYERS), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert newest_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-00000004"


@pytest.mark.parametrize("skipped", [0, 3])
def test_an_update_that_breaks_the_weights_costs_one_checkpoint(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: int
) -> None:
    """They are finite and so large that no gradient is; the checkpoint before them is kept, also with one to keep."""
    step, updates = Optimizers.step, itertools.count(1)

    def breaking(optimizers: Optimizers) -> None:
        step(optimizers)
        if next(updates) == 3:
            for group in (group for each in optimizers._optimizers for group in each.param_groups):
                for parameter in group["params"]:
                    parameter.data.mul_(1e30)

    monkeypatch.setattr(Optimizers, "step", breaking)
    changes = ["train.steps=8", "train.keep_checkpoints=1", "train.checkpoint_every=1", "train.validate_every=8"]
    recipe = recipe_of(tiny_recipe, *changes, f"train.max_skipped_steps={skipped}", THREE_LAYERS)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="the weights are broken, and are not saved"):
        run_recipe(recipe, run)
    steps = [int(folder.name.removeprefix("step-")) for folder in checkpoints(run)]
    assert steps == [3 + skipped, 2]
    shutil.rmtree(checkpoints(run)[0])  # as the message says
    assert run_recipe(recipe, run, resume=True).position.step == 8
