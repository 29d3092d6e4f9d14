import math
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gemmule.data.batches import IGNORED, Batch
from gemmule.data.corpus import Corpus
from gemmule.data.packing import PackedRows
from gemmule.errors import RecipeError, TrainingError
from gemmule.model.attention import KERNELS
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.runtime import Runtime, derive_seed
from gemmule.settings import check_recipe
from gemmule.train.cuda_graph import CudaGraphStep, ForwardBackward
from gemmule.train.initial_checks import check_causal, check_first_step, expected_first_loss
from gemmule.train.loop import Callbacks, forward_backward, train
from gemmule.train.loss import summed_loss
from gemmule.train.objective import NextToken, Objective
from gemmule.train.optim import Optimizers, OptimizerSettings
from gemmule.train.parallel import unwrapped
from gemmule.train.schedule import ScheduleSettings, lr_scale
from gemmule.train.settings import TrainSettings
from gemmule.train.state import Position, TrainState
from gemmule.train.validation import Score
from tiny import lively_model, shallow_config, some_tokens

BOS = 2


def uneven_batch(rows: int = 6) -> Batch:
    """Rows of two documents each, whose numbers of trained targets differ, from none to all."""
    tokens = some_tokens(shallow_config(), rows)
    targets = some_tokens(shallow_config(), rows, seed=2)
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
    model, whole = lively_model(shallow_config()), lively_model(shallow_config())
    settings = TrainSettings(steps=1, batch_size=6, micro_batch_size=rows_at_once)
    loss = forward_backward(unwrapped(model), batch, batch.num_targets, 0, settings, NextToken()).item()
    logits = whole(batch.tokens, documents=batch.documents)
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())  # the mean over what is trained
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    wanted = gradients_of(whole)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rows_at_once", "handed"), [(None, 1), (6, 1), (3, 0)])
def test_a_step_of_one_micro_batch_may_be_captured_as_a_cuda_graph(rows_at_once: int | None, handed: int) -> None:
    class Spy(CudaGraphStep):
        seen = 0

        def __call__(self, forward_backward: ForwardBackward, batch: Batch, num_targets: Tensor) -> Tensor:
            self.seen += 1
            return forward_backward(batch, num_targets)

    batch, model, settings = uneven_batch(), lively_model(shallow_config()), TrainSettings(steps=1, batch_size=6)
    wanted = forward_backward(unwrapped(model), batch, batch.num_targets, 0, settings, NextToken()).item()
    settings, graph = settings.replace(micro_batch_size=rows_at_once), Spy(model)
    found = forward_backward(
        unwrapped(model)._replace(cuda_graph=graph), batch, batch.num_targets, 0, settings, NextToken()
    ).item()
    assert graph.seen == handed
    assert found == pytest.approx(wanted, rel=1e-6)


def untrained_model(**changes: Any) -> Gemma3:
    model = Gemma3(shallow_config(**changes))
    init_weights(model, seed=0)
    return model


def first_step(model: Gemma3, batch: Batch | None = None) -> float:
    """Compute the first step's gradients and check them; return the loss."""
    batch = batch or uneven_batch()
    settings = TrainSettings(steps=1, batch_size=len(batch.tokens))
    loss = forward_backward(unwrapped(model), batch, batch.num_targets, 0, settings, NextToken()).item()
    check_first_step(model, loss, batch.targets)
    return loss


def test_first_step_of_a_fresh_model_passes(caplog: pytest.LogCaptureFixture) -> None:
    first_step(untrained_model())
    assert not caplog.messages


def rows_of(tokens: Tensor) -> Batch:
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


@pytest.mark.parametrize("damped", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 1024, 2048])
def test_healthy_models_of_any_width_pass_the_first_step(
    width: int, tied: bool, damped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied head prefers the token just read, the more the wider the model: 11 to 17 nats are healthy."""
    model = Gemma3(shallow_config(hidden_size=width, num_hidden_layers=2, vocab_size=400, tie_word_embeddings=tied))
    init_weights(model, 0, damped)
    loss = first_step(model, rows_of(torch.randint(400, (4, 65))))
    assert not caplog.messages
    if damped and width >= 1024:
        assert (loss > math.log(400) + 1.5) == tied


@pytest.mark.parametrize("text", ["bits", "zeros"])
def test_text_of_low_entropy_passes_the_first_step(text: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Gemma3(shallow_config(hidden_size=512, num_hidden_layers=2, vocab_size=400))
    init_weights(model, 0)
    tokens = torch.randint(5, 7, (4, 65)) if text == "bits" else torch.full((4, 65), 5)
    first_step(model, rows_of(tokens))
    assert not caplog.messages


def test_an_implausible_first_loss_is_a_warning(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    """It may have learned already, or be initialized otherwise; only what cannot train stops."""
    run, log = Run(corpus), Log()
    with torch.no_grad():
        run.model.embedding.weight.mul_(50)
    assert run.go(log).step == 10
    warning = caplog.messages[0]
    assert re.match(
        r"step 0: the loss is \d+\.\d\d nats per token where an untrained model .* about \d\.\d\d on", warning
    )
    assert "is the entropy of their tokens" in warning


@pytest.mark.parametrize("drawn", ["evenly", "by Zipf's law", "two words"])
@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 1024])
def test_the_expected_first_loss_knows_tied_heads_and_damped_branches(
    width: int, tied: bool, damped: bool, drawn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied head of width 1,024 costs several nats more than guessing where branches are damped: that is no fault."""
    config = Gemma3Config(
        vocab_size=512, hidden_size=width, num_hidden_layers=3, num_attention_heads=width // 64, num_key_value_heads=1,
        head_dim=64, intermediate_size=width // 4, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Gemma3(config)
    init_weights(model, 0, damped)
    ranks = torch.arange(1, config.vocab_size + 1)
    frequencies = {"evenly": ranks > 0, "by Zipf's law": 1 / ranks, "two words": ranks < 3}[drawn].float()
    row = torch.multinomial(frequencies, 129, replacement=True, generator=torch.Generator().manual_seed(0))
    tokens, targets = row[None, :-1], row[None, 1:]
    loss = summed_loss(targets, False)
    mean = model(tokens, output_head=loss) / targets.numel()
    mean.backward()
    check_first_step(model, mean.item(), targets)
    assert not caplog.messages
    assert mean.item() == pytest.approx(expected_first_loss(model, targets), abs=1.0 if drawn == "two words" else 0.3)


def test_first_step_refuses_a_parameter_without_a_gradient() -> None:
    model = untrained_model()
    model.blocks[1].mlp.up.weight.requires_grad_(False)  # no gradient at all
    with torch.no_grad():
        model.blocks[2].attention.value.weight.zero_()  # a gradient of zero, for query and key
    with pytest.raises(TrainingError, match="step 0: no gradient reaches") as caught:
        first_step(model)
    for name in ("blocks.1.mlp.up.weight", "blocks.2.attention.query.weight"):
        assert name in str(caught.value)
    assert "blocks.2.attention.value.weight" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_causal_model_passes_the_first_batch(precision: Literal["bf16", "fp32"]) -> None:
    model = untrained_model(dropout=0.5).train()
    check_causal(unwrapped(model, Runtime(torch.device("cpu"), precision)), uneven_batch())
    assert model.training


def test_a_model_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        return query + value.mean(dim=(1, 2), keepdim=True)

    monkeypatch.setitem(KERNELS, "sdpa", leaky)
    with pytest.raises(TrainingError, match="step 0: the model is not causal: changing the tokens from position 6 on"):
        check_causal(unwrapped(untrained_model()), uneven_batch())


class Log:
    """Callbacks that record what the loop calls."""

    def __init__(
        self, losses: list[float] | None = None, stop_after: int | None = None, unwritable: tuple[int, ...] = ()
    ) -> None:
        self.calls: list[str] = []
        self._unwritable = unwritable
        self.records: list[dict[str, Any]] = []
        self.saved: list[Position] = []
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

    def saved_is_whole(self) -> bool:
        return not self.saved or self.saved[-1].step not in self._unwritable

    def stop_requested(self) -> bool:
        self._steps_left -= 1
        return self._steps_left == 0

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(
            self.record,
            self.validate,
            lambda step: self.calls.append(f"sample {step}"),
            self.save,
            self.saved_is_whole,
            self.stop_requested,
        )


SCHEDULE = ScheduleSettings()


class Run:
    """A model, its optimizers and its rows; `go` trains on."""

    def __init__(self, corpus: Corpus, **changes: Any) -> None:
        defaults = {"steps": 10, "batch_size": 4, "context": 8, "log_every": 3, "validate_every": 4}
        self.settings = TrainSettings.model_validate(defaults | {"checkpoint_every": 5} | changes)
        self.model = untrained_model(dropout=0.1)
        settings = OptimizerSettings(name="muon", learning_rate=0.01, adamw_learning_rate=0.01)
        self.state = TrainState(unwrapped(self.model), Optimizers(self.model, settings))
        self.rows = PackedRows(corpus, self.settings.context, seed=0, bos_id=BOS)

    def go(self, log: Log, start: Position = Position(), objective: Objective | None = None) -> Position:  # noqa: B008 - frozen
        self.state.position = start
        return train(self.state, self.rows, self.settings, SCHEDULE, log.callbacks, objective or NextToken())

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
        *("save 10", "validate", "record 10", "sample 10"),
    ]


@pytest.mark.parametrize("failing", ["validate", "log_metrics", "sample"])
def test_what_may_fail_comes_after_the_save_and_is_made_up_for(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    straight, run = Run(corpus), Run(corpus)
    straight.go(whole := Log([3.0, 2.0, 1.0]))
    log, again = Log([3.0, 2.0, 1.0]), Log([1.0])

    def fail(line: object = 10) -> None:
        if line == 10 or (isinstance(line, dict) and line["step"] == 10):
            raise OSError("out of luck")

    callbacks = log.callbacks._replace(**{failing: fail})
    settings = run.settings.replace(validate_every=10)
    with pytest.raises(OSError, match="out of luck"):
        train(run.state, run.rows, settings, SCHEDULE, callbacks, NextToken())
    assert log.saved[-1].step == 10
    end = run.go(again, log.saved[-1])
    assert again.calls == ["validate", "record 10", "sample 10"]
    timeless = [{k: v for k, v in log_.records[-1].items() if "second" not in k} for log_ in (whole, again)]
    assert timeless[0] == timeless[1]
    assert (end.best_step, end.pending) == (10, None)


def test_a_record_holds_what_the_metrics_promise(corpus: Corpus) -> None:
    run, log = Run(corpus), Log([3.0, 2.0, 1.0])
    end = run.go(log)
    for line in log.records:
        assert set(line) >= {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        assert ("val_loss" in line) == (line["step"] in (4, 8, 10))
        assert line["lr"] == pytest.approx(0.01 * lr_scale(line["step"] - 1, 10, ScheduleSettings()))
        assert line["tokens"] == sum(run.rows.rows(step * 4, 4).num_targets for step in range(line["step"]))
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
    best = [position.best_step for position in log.saved]
    assert best == [None, 4, 8], (
        "its own validation is still to come, and that of step 6, which was better, is not kept"
    )
    assert (end.best_step, end.best_loss) == (8, 1.5)


def test_a_checkpoint_that_could_not_be_written_is_never_the_best(corpus: Corpus) -> None:
    log = Log([3.0, 1.0, 2.0, 4.0, 5.0], unwritable=(4,))
    end = Run(corpus, validate_every=2, checkpoint_every=2).go(log)
    assert (end.best_step, end.best_loss) == (6, 2.0), "step 4 was better, but its checkpoint is not there"


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
        if run.model.training and torch.initial_seed() in seeds:
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
    with pytest.raises(TrainingError, match=rf"step 6: the loss is {wrong} and .*{place}.* --resume --allow-changes"):
        run.go(log)
    assert kept
    assert equal(run.weights(), kept)
    assert log.saved[-1].step == 6, "the state before the step, so that a resumed run repeats it"
    assert log.saved[-1].seconds > log.records[-1]["seconds"], "the clock of a resumed run goes on"
    monkeypatch.undo()
    run.go(repeated := Log(), log.saved[-1])
    straight = Run(corpus)
    straight.go(Log())
    assert repeated.records[-1]["step"] == 10
    assert equal(run.weights(), straight.weights())


def test_steps_that_are_not_finite_are_skipped_and_counted_as_often_as_allowed(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, log = Run(corpus, max_skipped_steps=2, log_every=1), Log()
    poison(run, monkeypatch, math.nan, {3, 6})
    objective = NextToken()
    monkeypatch.setattr(objective, "metrics", lambda _world: {"entropy": 1.0})
    end = run.go(log, objective=objective)
    assert (end.step, end.skipped) == (10, 2)
    assert ["skipped, as train.max_skipped_steps = 2 allows" in warning for warning in caplog.messages] == [True, True]
    counts = {line["step"]: line.get("skipped_steps", 0) for line in log.records}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2}
    assert [line["step"] for line in log.records if "loss" not in line] == [4, 7]
    assert log.records[-1]["tokens"] == end.tokens < sum(run.rows.rows(step * 4, 4).num_targets for step in range(10))
    assert [line["step"] for line in log.records if "entropy" not in line] == [4, 7], "which may be no number either"
    again = Run(corpus, max_skipped_steps=1)
    poison(again, monkeypatch, math.nan, {3, 6})
    with pytest.raises(TrainingError, match="step 6: the loss is nan"):
        again.go(Log())


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize(
    ("growth", "sentence"),
    [
        (math.inf, r"norm\.weight has values that are not finite"),
        (1e30, r"The next rows give the same: the weights are broken, and are not saved"),
    ],
)
def test_weights_that_are_broken_are_never_saved(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, skipped: int, growth: float, sentence: str
) -> None:
    """An update may overflow though its gradient was finite; the checkpoint before it is then the newest."""
    run, log, update = Run(corpus, max_skipped_steps=skipped), Log(), Optimizers.step

    def overflow(optimizers: Optimizers) -> None:
        update(optimizers)
        if len(log.saved) == 1:
            with torch.no_grad():
                for parameter in run.model.parameters() if math.isfinite(growth) else [run.model.norm.weight]:
                    parameter.mul_(growth)

    monkeypatch.setattr(Optimizers, "step", overflow)
    with pytest.raises(TrainingError, match=sentence):
        run.go(log)
    assert [position.step for position in log.saved] == [5]


def test_a_spike_of_the_loss_is_reported_with_its_rows(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, log = Run(corpus, steps=60, log_every=100, validate_every=60), Log()
    poison(run, monkeypatch, 2.0, {57})
    run.go(log)
    (warning,) = caplog.messages
    assert "step 57: the loss jumped to " in warning
    assert "rows 228 to 231" in warning
    assert [line["step"] for line in log.records] == [1, 58, 60]


def complaint(table: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(table, TrainSettings, "tiny.toml")
    return str(caught.value)


def test_settings_that_cannot_work_are_refused() -> None:
    assert complaint({"steps": 1, "batch_size": 6, "micro_batch_size": 4}).endswith(
        "micro_batch_size = 4: must divide train.batch_size (6)"
    )
    message = complaint({"steps": 1, "attention": "flash"})
    assert message.endswith('attention = "flash": no such kernel; there are auto, reference, sdpa, block-local, flex')
    assert "steps = 0: must be a whole number from 1 to 1,000,000,000" in complaint({"steps": 0})
