"""The training loop: batch, forward, backward, clip, step, log, in that order."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from gemmule.data.batches import Batch, MixedRows, PackedRows
from gemmule.errors import TrainingError
from gemmule.model.attention import KERNELS
from gemmule.model.gemma3 import Gemma3
from gemmule.recipe import Problem, Settings
from gemmule.runtime import Precision, autocast, seed_everything, whole
from gemmule.train.checkpoint import Position
from gemmule.train.loss import summed_loss
from gemmule.train.metrics import Stopwatch
from gemmule.train.optim import Updater
from gemmule.train.parallel import Parallel
from gemmule.train.probe import AUTO
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
    # A kernel of model/attention.py, or "auto": the one that a short trial before the run finds the fastest.
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
    # Steps whose loss or gradient is not finite that are skipped and counted; at the next one the run stops.
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0

    def problems(self) -> Iterator[Problem]:
        """Yield micro-batches that do not divide the batch, and kernels that do not exist."""
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            advice = f"must divide train.batch_size ({self.batch_size})"
            yield Problem("micro_batch_size", self.micro_batch_size, advice)
        if self.attention not in (AUTO, *KERNELS):
            yield Problem("attention", self.attention, f"no such kernel; there are {', '.join((AUTO, *KERNELS))}")


class Hooks(NamedTuple):
    """What the loop calls by name on its way; plain functions, so that it knows neither files nor screens."""

    record: Callable[[dict[str, Any]], None]
    warn: Callable[[str], None]
    validate: Callable[[], Score]
    sample: Callable[[int], None]
    save: Callable[[Position], None]
    stop_requested: Callable[[], bool]


def train(
    parallel: Parallel,
    updater: Updater,
    rows: PackedRows | MixedRows,
    settings: TrainSettings,
    schedule: ScheduleSettings,
    precision: Literal["bf16", "fp32"],
    start: Position,
    hooks: Hooks,
) -> Position:
    """Train from `start` to the last step, or to the end of the step in which a stop is requested of any process."""
    position, clock = start, Stopwatch(start.seconds)
    world, model = parallel.world, parallel.model
    model.train()
    here = settings.batch_size // world.size
    first = start.step * settings.batch_size + world.rank * here
    batch = rows.rows(first, here)
    for step in range(start.step, settings.steps):
        factor = learning_rate_factor(step, settings.steps, schedule)
        (trained,) = world.total(batch.trained)
        mine = accumulate_gradients(parallel, batch, int(trained), first, settings, precision)
        measured = updater.norm()
        first += settings.batch_size
        batch = rows.rows(first, here)  # the next one, while the device is busy with this one
        loss, stop = world.total(mine.item(), hooks.stop_requested())
        if step == 0:
            check_first_step(model, loss)
        norm = updater.update(factor, measured)
        learned = math.isfinite(loss) and math.isfinite(norm)
        if not learned:
            excuse_or_stop(position, loss, norm, settings, hooks)
        clock.add(int(trained))
        spike = learned and position.level.is_spike(loss)
        if spike:
            hooks.warn(
                f"step {step}: the loss jumped to {loss:.3f} from about {position.level.mean:.3f} "
                f"({_place(step, settings)})"
            )
        position = position.replace(
            step=step + 1,
            tokens=position.tokens + int(trained) * learned,
            skipped=position.skipped + (not learned),
            level=position.level.after(loss) if learned else position.level,
        )
        last = step + 1 == settings.steps
        validating = (step + 1) % settings.validate_every == 0 or last
        saving = (step + 1) % settings.checkpoint_every == 0 or last or bool(stop)
        record: dict[str, Any] = {}
        if step == 0 or (step + 1) % settings.log_every == 0 or validating or spike or not learned:
            record = {"loss": loss, "grad_norm": norm} if learned else {}
            record |= {"lr": updater.learning_rate, "tokens_per_second": clock.rate()}
            record |= {"skipped_steps": position.skipped} if position.skipped else {}
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
    parallel: Parallel,
    batch: Batch,
    trained: int,
    first_row: int,
    settings: TrainSettings,
    precision: Literal["bf16", "fp32"],
) -> Tensor:
    """Add up the gradients of the mean loss over all `trained` targets of the step; return this process's part of it.

    The part is in nats, on the device, and not waited for; those of all processes add up to the mean. Every micro-batch
    is divided by the whole step's count, and draws its dropout by its first row in the stream, so neither depends on
    how the batch is cut or shared.
    """
    device = parallel.model.embedding.weight.device

    def learn(here: Batch, divisor: Tensor) -> Tensor:
        with autocast(device, precision):
            readout = summed_loss(here.targets, settings.compile)
            loss = parallel.forward(here.tokens, documents=here.documents, readout=readout) / divisor
        torch.autograd.backward(loss * parallel.world.size)  # the mean over processes becomes their sum
        return loss.detach()

    total, divisor = torch.zeros((), device=device), torch.full((), float(trained), device=device)
    size = min(settings.micro_batch_size or len(batch.tokens), len(batch.tokens))
    parts = list(batch.split(size))
    recorder = parallel.recorder if len(parts) == 1 else None
    run = learn if recorder is None else partial(recorder.learn, learn)
    for number, part in enumerate(parts):
        seed_everything(settings.seed, "rows", first_row + number * size)
        with parallel.micro_batch(number == len(parts) - 1):
            total += run(part.to(device), divisor)
    return total


def excuse_or_stop(position: Position, loss: float, norm: float, settings: TrainSettings, hooks: Hooks) -> None:
    """Pass over a step from which nothing could be learned, or save what was before it and raise TrainingError."""
    sentence = (
        f"step {position.step}: the loss is {loss} and the gradient's norm {norm}; nothing was learned from this step "
        f"({_place(position.step, settings)})"
    )
    if position.skipped < settings.max_skipped_steps:
        hooks.warn(f"{sentence}; skipped, as train.max_skipped_steps = {settings.max_skipped_steps} allows")
        return
    hooks.save(position)
    raise TrainingError(
        f"{sentence}. The state before it is saved: the same command with --resume repeats it. Lower "
        "optimizer.learning_rate or raise schedule.warmup_share; train.max_skipped_steps passes over such batches"
    )


def _place(step: int, settings: TrainSettings) -> str:
    first = step * settings.batch_size
    return f"rows {first} to {first + settings.batch_size - 1} of the training stream"


def check_first_step(model: Gemma3, loss: float) -> None:
    """Raise TrainingError unless an untrained model is what it should be: ignorant, every parameter listening."""
    config = model.config
    # Logits of variance s^2 cost s^2/2 above even guessing.
    expected = math.log(config.vocab_size) + config.hidden_size * config.initializer_range**2 / 2
    if not abs(loss - expected) < 1:
        raise TrainingError(f"step 0: the loss is {loss:.2f} nats where an untrained model has about {expected:.2f}")
    deaf = [name for name, p in model.named_parameters() if p.grad is None or not bool(whole(p.grad.norm()))]
    if deaf:
        raise TrainingError(f"step 0: no gradient reaches {', '.join(deaf[:5])}" + (" ..." if len(deaf) > 5 else ""))
