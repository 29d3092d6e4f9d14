"""The training loop: batch, forward, backward, clip, step, log, in that order."""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from gemmule.data.batches import Batch, PackedRows
from gemmule.errors import TrainingError
from gemmule.model.attention import KERNELS
from gemmule.model.gemma3 import Gemma3
from gemmule.recipe import Problem, Settings
from gemmule.runtime import Precision, autocast, seed_everything
from gemmule.train.checkpoint import Position
from gemmule.train.loss import summed_loss
from gemmule.train.metrics import Stopwatch
from gemmule.train.optim import Updater
from gemmule.train.schedule import ScheduleSettings, learning_rate_factor
from gemmule.train.validation import Score

Count = Annotated[int, Field(gt=0)]


class TrainSettings(Settings):
    """How long, on how much at a time, and what is looked at on the way."""

    # Optimizer steps; with `minutes`, at most so many.
    steps: Count
    # Minutes of training: the machine's speed is measured before step 0 and `steps` lowered to what fits.
    minutes: Annotated[float, Field(gt=0)] | None = None
    # Sequences per optimizer step, and how many of them go through the model at once (all, if not set).
    batch_size: Count = 64
    micro_batch_size: Count | None = None
    # Tokens per sequence.
    context: Count = 256
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    attention: str = "sdpa"
    # Compile each block; where the machine cannot, the run says so and goes on without.
    compile: bool = False
    # Start the norms after attention and MLP at gain 1/sqrt(2 L) instead of 1.
    damp_branches: bool = False
    log_every: Count = 10
    validate_every: Count = 500
    # Validation tokens that are measured; all of them, if not set.
    validation_tokens: Count | None = None
    sample_prompts: tuple[str, ...] = Field(default=("Once upon a time",), strict=False)
    sample_tokens: Count = 200
    checkpoint_every: Count = 500
    # Newest checkpoints that are kept, beside the best of those whose step was also validated.
    keep_checkpoints: Count = 2

    def problems(self) -> Iterator[Problem]:
        """Yield micro-batches that do not divide the batch, and kernels that do not exist."""
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            advice = f"must divide train.batch_size ({self.batch_size})"
            yield Problem("micro_batch_size", self.micro_batch_size, advice)
        if self.attention not in KERNELS:
            yield Problem("attention", self.attention, f"no such kernel; there are {', '.join(KERNELS)}")


class Hooks(NamedTuple):
    """What the loop calls by name on its way; plain functions, so that it knows neither files nor screens."""

    record: Callable[[dict[str, Any]], None]
    validate: Callable[[], Score]
    sample: Callable[[int], None]
    save: Callable[[Position], None]
    stop_requested: Callable[[], bool]


def train(
    model: Gemma3,
    updater: Updater,
    rows: PackedRows,
    settings: TrainSettings,
    schedule: ScheduleSettings,
    precision: Literal["bf16", "fp32"],
    start: Position,
    hooks: Hooks,
) -> Position:
    """Train from `start` to the last step, or to the end of the step in which a stop is requested."""
    position, clock = start, Stopwatch(start.seconds)
    model.train()
    for step in range(start.step, settings.steps):
        seed_everything(settings.seed, "step", step)
        factor = learning_rate_factor(step, settings.steps, schedule)
        batch = rows.rows(step * settings.batch_size, settings.batch_size)
        loss = accumulate_gradients(model, batch, settings, precision)
        if step == 0:
            check_first_step(model, loss)
        norm = updater.update(factor).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was learned from this step. "
                "Lower optimizer.learning_rate or raise schedule.warmup_share"
            )
        clock.add(batch.trained)
        position = position.replace(step=step + 1, tokens=position.tokens + batch.trained)
        stop = hooks.stop_requested()
        last = step + 1 == settings.steps
        validating = (step + 1) % settings.validate_every == 0 or last
        saving = (step + 1) % settings.checkpoint_every == 0 or last or stop
        record: dict[str, Any] = {}
        if step == 0 or (step + 1) % settings.log_every == 0 or validating:
            record = {"loss": loss, "lr": updater.learning_rate, "grad_norm": norm, "tokens_per_second": clock.rate()}
        with clock.paused():
            if validating:
                score = hooks.validate()
                record |= {f"val_{name}": value for name, value in score.figures().items()}
                if saving and (position.best_loss is None or score.loss < position.best_loss):
                    position = position.replace(best_loss=score.loss, best_step=position.step)
            if record:
                hooks.record({"step": position.step, "tokens": position.tokens, **record, "seconds": clock.seconds})
            if validating:
                hooks.sample(position.step)
            if saving:
                hooks.save(position.replace(seconds=clock.seconds))
        if stop:
            break
    return position


def accumulate_gradients(
    model: Gemma3, batch: Batch, settings: TrainSettings, precision: Literal["bf16", "fp32"]
) -> float:
    """Add up the gradients of the mean loss over all trained targets of the batch; return that mean in nats.

    Every micro-batch is divided by the whole batch's count, so the result does not depend on how it is cut.
    """
    device = model.embedding.weight.device
    total = torch.zeros((), device=device)
    for part in batch.split(settings.micro_batch_size or settings.batch_size):
        here = part.to(device)
        with autocast(device, precision):
            loss = model(here.tokens, documents=here.documents, readout=summed_loss(here.targets)) / batch.trained
        loss.backward()
        total += loss.detach()
    return total.item()


def check_first_step(model: Gemma3, loss: float) -> None:
    """Raise TrainingError unless an untrained model is what it should be: ignorant, every parameter listening."""
    config = model.config
    # Logits of variance s^2 cost s^2/2 above even guessing.
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    if not abs(loss - expected) < 1:
        raise TrainingError(f"step 0: the loss is {loss:.2f} nats where an untrained model has about {expected:.2f}")
    deaf = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    if deaf:
        raise TrainingError(f"step 0: no gradient reaches {', '.join(deaf[:5])}" + (" ..." if len(deaf) > 5 else ""))
