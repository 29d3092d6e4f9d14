import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gemmule.data.batches import IGNORED, Batch, PackedRows
from gemmule.data.corpus import Corpus
from gemmule.errors import RecipeError, TrainingError
from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import initialise
from gemmule.recipe import check_recipe
from gemmule.runtime import derive_seed
from gemmule.train.checkpoint import Position
from gemmule.train.loop import Hooks, TrainSettings, accumulate_gradients, check_first_step, train
from gemmule.train.optim import OptimizerSettings, Updater
from gemmule.train.parallel import alone
from gemmule.train.recorder import Learn, Recorder
from gemmule.train.schedule import ScheduleSettings, learning_rate_factor
from gemmule.train.validation import Score
from tiny import lively_model, some_tokens, tiny_config

BOS = 2


def uneven_batch(rows: int = 6) -> Batch:
    """Rows of two documents each, whose numbers of trained targets differ, from none to all."""
    tokens = some_tokens(tiny_config(), rows)
    targets = some_tokens(tiny_config(), rows, seed=2)
    for row in range(rows):
        targets[row, : 2 * row + 1] = IGNORED
    documents = (torch.arange(tokens.shape[1]) > 4).int().expand_as(tokens)
    return Batch(tokens, targets, documents)


def gradients_of(model: Gemma3) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4, None])
def test_micro_batches_of_any_size_make_the_gradient_of_the_mean_over_all_targets(rows_at_once: int | None) -> None:
    batch = uneven_batch()
    assert (batch.targets[5] == IGNORED).sum() > (batch.targets[0] == IGNORED).sum()
    model, whole = lively_model(tiny_config()), lively_model(tiny_config())
    settings = TrainSettings(steps=1, batch_size=6, micro_batch_size=rows_at_once)
    loss = accumulate_gradients(alone(model), batch, batch.trained, 0, settings, "fp32").item()
    logits = whole(batch.tokens, documents=batch.documents)
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())  # the mean over what is trained
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    wanted = gradients_of(whole)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rows_at_once", "handed"), [(None, 1), (6, 1), (3, 0)])
def test_a_step_of_one_micro_batch_is_handed_to_the_recorder(rows_at_once: int | None, handed: int) -> None:
    class Spy(Recorder):
        seen = 0

        def learn(self, learn: Learn, batch: Batch, trained: Tensor) -> Tensor:
            self.seen += 1
            return learn(batch, trained)

    batch, model, settings = uneven_batch(), lively_model(tiny_config()), TrainSettings(steps=1, batch_size=6)
    wanted = accumulate_gradients(alone(model), batch, batch.trained, 0, settings, "fp32").item()
    settings, recorder = settings.replace(micro_batch_size=rows_at_once), Spy(model)
    found = accumulate_gradients(
        alone(model)._replace(recorder=recorder), batch, batch.trained, 0, settings, "fp32"
    ).item()
    assert recorder.seen == handed
    assert found == pytest.approx(wanted, rel=1e-6)


def untrained_model(**changes: Any) -> Gemma3:
    model = Gemma3(tiny_config(**changes))
    initialise(model, seed=0)
    return model


def first_loss(model: Gemma3) -> float:
    batch, settings = uneven_batch(), TrainSettings(steps=1, batch_size=6)
    return accumulate_gradients(alone(model), batch, batch.trained, 0, settings, "fp32").item()


def test_first_step_of_a_fresh_model_passes() -> None:
    check_first_step(model := untrained_model(), first_loss(model))


def test_first_step_refuses_a_model_that_is_not_ignorant() -> None:
    model = untrained_model()
    with torch.no_grad():
        model.embedding.weight.mul_(50)
    with pytest.raises(
        TrainingError, match=r"step 0: the loss is \d+\.\d+ nats where an untrained model has about 3\.8"
    ):
        check_first_step(model, first_loss(model))
    with pytest.raises(TrainingError, match="the loss is nan nats"):
        check_first_step(model, math.nan)


def test_first_step_refuses_a_deaf_parameter() -> None:
    model = untrained_model()
    model.blocks[3].mlp.up.weight.requires_grad_(False)  # no gradient at all
    with torch.no_grad():
        model.blocks[5].attention.value.weight.zero_()  # a gradient of zero, for query and key
    with pytest.raises(TrainingError, match="step 0: no gradient reaches") as caught:
        check_first_step(model, first_loss(model))
    for name in ("blocks.3.mlp.up.weight", "blocks.5.attention.query.weight"):
        assert name in str(caught.value)
    assert "blocks.5.attention.value.weight" not in str(caught.value)


class Log:
    """Hooks that write down what the loop calls."""

    def __init__(self, losses: list[float] | None = None, stop_after: int | None = None) -> None:
        self.calls: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.saved: list[Position] = []
        self.warnings: list[str] = []
        self._losses = iter(losses or [])
        self._steps_left = stop_after or 10**9

    def validate(self) -> Score:
        self.calls.append("validate")
        return Score(100 * next(self._losses, 1.0), 100, 300)

    def record(self, line: dict[str, Any]) -> None:
        self.calls.append(f"record {line['step']}")
        self.records.append(line)

    def save(self, position: Position) -> None:
        self.calls.append(f"save {position.step}")
        self.saved.append(position)

    def stop_requested(self) -> bool:
        self._steps_left -= 1
        return self._steps_left == 0

    @property
    def hooks(self) -> Hooks:
        return Hooks(
            self.record,
            self.warnings.append,
            self.validate,
            lambda step: self.calls.append(f"sample {step}"),
            self.save,
            self.stop_requested,
        )


class Run:
    """A model, its optimizers and its rows; `go` trains on."""

    def __init__(self, corpus: Corpus, **changes: Any) -> None:
        defaults = {"steps": 10, "batch_size": 4, "context": 8, "log_every": 3, "validate_every": 4}
        self.settings = TrainSettings.model_validate(defaults | {"checkpoint_every": 5} | changes)
        self.model = untrained_model(dropout=0.1)
        self.updater = Updater(self.model, OptimizerSettings(name="muon", learning_rate=0.01, adamw_learning_rate=0.01))
        self.rows = PackedRows(corpus, self.settings.context, seed=0, bos_id=BOS)

    def go(self, log: Log, start: Position = Position()) -> Position:  # noqa: B008 - frozen
        parallel = alone(self.model)
        return train(parallel, self.updater, self.rows, self.settings, ScheduleSettings(), "fp32", start, log.hooks)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_things_happen_at_their_steps_and_in_order(corpus: Corpus) -> None:
    Run(corpus).go(log := Log())
    assert log.calls == [
        "record 1",
        "record 3",
        *("validate", "record 4", "sample 4"),
        "save 5",
        "record 6",
        *("validate", "record 8", "sample 8"),
        "record 9",
        *("validate", "record 10", "sample 10", "save 10"),
    ]


def test_a_record_holds_what_the_metrics_promise(corpus: Corpus) -> None:
    run, log = Run(corpus), Log([3.0, 2.0, 1.0])
    end = run.go(log)
    for line in log.records:
        assert set(line) >= {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        assert ("val_loss" in line) == (line["step"] in (4, 8, 10))
        assert line["lr"] == pytest.approx(0.01 * learning_rate_factor(line["step"] - 1, 10, ScheduleSettings()))
        assert line["tokens"] == sum(run.rows.rows(step * 4, 4).trained for step in range(line["step"]))
    last = log.records[-1]
    assert (last["val_loss"], last["val_bits_per_byte"]) == (1.0, pytest.approx(100 / math.log(2) / 300))
    assert last["val_perplexity"] == pytest.approx(math.e)
    seconds = [line["seconds"] for line in log.records]
    assert seconds == sorted(seconds), "the clock never goes back"
    assert (end.step, end.tokens) == (10, last["tokens"])


def test_loss_falls(corpus: Corpus) -> None:
    Run(corpus, steps=60, log_every=1, validate_every=60).go(log := Log())
    losses = [line["loss"] for line in log.records]
    assert losses[0] == pytest.approx(math.log(48), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


def test_the_best_of_the_checkpoints_is_remembered(corpus: Corpus) -> None:
    end = Run(corpus, validate_every=2, checkpoint_every=4).go(log := Log([3.0, 2.0, 1.0, 1.5, 1.75]))
    assert [position.step for position in log.saved] == [4, 8, 10]
    assert [position.best_step for position in log.saved] == [4, 8, 8], "step 6 was better, but was not saved"
    assert (end.best_step, end.best_loss) == (8, 1.5)


def test_a_stop_ends_the_run_after_the_step_with_a_checkpoint(corpus: Corpus) -> None:
    end = Run(corpus).go(log := Log(stop_after=3))
    assert end.step == 3
    assert log.calls == ["record 1", "record 3", "save 3"]


def test_ten_steps_equal_three_and_seven(corpus: Corpus) -> None:
    whole, parts = Run(corpus), Run(corpus)
    whole.go(straight := Log())
    parts.go(first := Log(stop_after=3))
    torch.manual_seed(99)  # what else a process draws at random makes no difference
    parts.go(second := Log(), first.saved[-1])
    assert equal(whole.weights(), parts.weights())
    timeless = [
        [{key: value for key, value in line.items() if "second" not in key} for line in records]
        for records in (straight.records, first.records + second.records)
    ]
    assert timeless[0] == timeless[1]


def test_another_seed_learns_otherwise(corpus: Corpus) -> None:
    one, other = Run(corpus), Run(corpus, seed=1)
    for run in (one, other):
        run.go(Log())
    assert not equal(one.weights(), other.weights())


def poison(run: Run, monkeypatch: pytest.MonkeyPatch, wrong: float, steps: set[int]) -> dict[str, Tensor]:
    """Multiply the loss of some steps by something; return the weights that they began with, once they have."""
    kept: dict[str, Tensor] = {}
    forward: Callable[..., Tensor] = run.model.forward
    seeds = {derive_seed(run.settings.seed, "rows", step * run.settings.batch_size) for step in steps}

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        if torch.initial_seed() in seeds:
            kept.update(run.weights())
            return forward(*arguments, **options) * wrong
        return forward(*arguments, **options)

    monkeypatch.setattr(run.model, "forward", poisoned)
    return kept


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_and_leaves_the_weights(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    run, log = Run(corpus), Log()
    kept = poison(run, monkeypatch, wrong, {6})
    place = "rows 24 to 27 of the training stream"
    with pytest.raises(TrainingError, match=rf"step 6: the loss is {wrong} and .*{place}.* optimizer\.learning_rate"):
        run.go(log)
    assert kept
    assert equal(run.weights(), kept)
    assert log.saved[-1].step == 6, "the state before the step, so that a resumed run repeats it"
    monkeypatch.undo()
    run.go(repeated := Log(), log.saved[-1])
    straight = Run(corpus)
    straight.go(Log())
    assert repeated.records[-1]["step"] == 10
    assert equal(run.weights(), straight.weights())


def test_steps_that_are_not_finite_are_skipped_and_counted_as_often_as_allowed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log = Run(corpus, max_skipped_steps=2, log_every=1), Log()
    poison(run, monkeypatch, math.nan, {3, 6})
    end = run.go(log)
    assert (end.step, end.skipped) == (10, 2)
    assert ["skipped, as train.max_skipped_steps = 2 allows" in warning for warning in log.warnings] == [True, True]
    counts = {line["step"]: line.get("skipped_steps", 0) for line in log.records}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}
    assert [line["step"] for line in log.records if "loss" not in line] == [4, 7]
    assert log.records[-1]["tokens"] == end.tokens < sum(run.rows.rows(step * 4, 4).trained for step in range(10))
    again = Run(corpus, max_skipped_steps=1)
    poison(again, monkeypatch, math.nan, {3, 6})
    with pytest.raises(TrainingError, match="step 6: the loss is nan"):
        again.go(Log())


def test_a_jump_of_the_loss_is_reported_with_its_rows(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    run, log = Run(corpus, steps=80, log_every=100, validate_every=80), Log()
    poison(run, monkeypatch, 2.0, {70})
    run.go(log)
    (warning,) = log.warnings
    assert "step 70: the loss jumped to " in warning
    assert "rows 280 to 283" in warning
    assert [line["step"] for line in log.records] == [1, 71, 80]


def complaint(table: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(table, TrainSettings, "tiny.toml")
    return str(caught.value)


def test_settings_that_cannot_work_are_refused() -> None:
    assert complaint({"steps": 1, "batch_size": 6, "micro_batch_size": 4}).endswith(
        "micro_batch_size = 4: must divide train.batch_size (6)"
    )
    message = complaint({"steps": 1, "attention": "flash"})
    assert message.endswith('attention = "flash": no such kernel; there are auto, reference, sdpa, folded, flex')
    assert "steps = 0: value should be greater than 0" in complaint({"steps": 0})
