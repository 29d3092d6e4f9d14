"""The training loop: next batch, forward, backward, all-reduce, check finite, clip, step, zero grad, log, save."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmule.data.batches import Batch, RowStream
from gemmule.distributed import full_tensor
from gemmule.runtime import seed_everything
from gemmule.train.initial_checks import check_causal, check_first_step
from gemmule.train.nonfinite import check_finite_weights, rows_of_step, skip_or_abort_nonfinite_step
from gemmule.train.objective import Objective
from gemmule.train.parallel import Parallel
from gemmule.train.schedule import ScheduleSettings, lr_scale
from gemmule.train.settings import TrainSettings
from gemmule.train.state import Position, TrainState
from gemmule.train.stopwatch import Stopwatch
from gemmule.train.validation import Scored

log = logging.getLogger(__name__)


class Callbacks(NamedTuple):
    """What the loop leaves to its caller: logs, validation, samples, checkpoints and signals."""

    log_metrics: Callable[[dict[str, Any]], None]
    validate: Callable[[], Scored]
    sample: Callable[[int], None]
    # Start writing a checkpoint of this position.
    save: Callable[[Position], None]
    # Wait for the checkpoint that is being written; whether it was written completely.
    wait_for_save: Callable[[], bool]
    stop_requested: Callable[[], bool]


def train(
    state: TrainState,
    rows: RowStream,
    settings: TrainSettings,
    schedule: ScheduleSettings,
    callbacks: Callbacks,
    objective: Objective,
) -> Position:
    """Train from the state's position to the last step, to early stopping, or to a step in which a stop is wanted."""
    parallel, optimizers = state.parallel, state.optimizers
    world, clock = parallel.world, Stopwatch(state.position.seconds)
    if state.position.pending is not None:
        with clock.paused():
            validate_and_sample(state, state.position.pending, callbacks)
    parallel.model.train()
    batches = RankBatches(rows, settings.batch_size, world.rank, world.size, state.position.step)
    while not state.position.is_over(settings, schedule):
        step = state.position.step
        optimizers.set_learning_rate(lr_scale(step, settings.steps, schedule))
        batch, first_row = batches.next()
        num_targets, count = map(int, world.all_reduce_sum(batch.num_targets, objective.begin_step(batch)))
        if step == 0:
            with clock.paused():
                check_causal(parallel, batch)
        local_loss = forward_backward(parallel, batch, count, first_row, settings, objective)  # and all-reduce
        grad_norm = optimizers.grad_norm()
        if not objective.on_policy:
            batches.prefetch()  # while the device is busy
        loss, stop = world.all_reduce_sum(local_loss.item(), callbacks.stop_requested())
        norm = full_tensor(grad_norm).item()
        step_ok = math.isfinite(loss) and math.isfinite(norm)
        if step_ok:
            if step == 0 and (norm or not objective.on_policy):
                check_first_step(parallel.model, loss, batch.targets, pretrained=settings.start is not None)
            optimizers.clip_grad_norm(grad_norm)
            optimizers.step()
        optimizers.zero_grad()
        if not step_ok:
            state.position = state.position.replace(seconds=clock.seconds)
            other = partial(measure_step, state, batches.peek(), first_row + settings.batch_size, settings, objective)
            skip_or_abort_nonfinite_step(state, loss, norm, other, settings, callbacks.save)

        clock.add(num_targets)
        spike = step_ok and state.position.level.detects_spike(loss)
        if spike:
            _warn_of_spike(state.position, loss, settings)
        state.position = state.position.after_step(loss, num_targets) if step_ok else state.position.after_skipped()
        last = step + 1 == settings.steps
        validating = (step + 1) % settings.validate_every == 0 or last
        saving = (step + 1) % settings.checkpoint_every == 0 or last or bool(stop)
        logging_now = step == 0 or (step + 1) % settings.log_every == 0 or validating or spike or not step_ok
        metrics: dict[str, Any] = {}
        if logging_now:
            metrics = {"loss": loss, "grad_norm": norm} if step_ok else {}
            metrics |= {"lr": optimizers.learning_rate, "tokens_per_second": clock.rate()}
            metrics |= {"skipped_steps": state.position.skipped} if state.position.skipped else {}
            metrics |= {"spike": 1} if spike else {}
            metrics |= objective.metrics(world) if step_ok else {}
        with clock.paused():
            metrics |= {"seconds": clock.seconds} if logging_now else {}
            if logging_now and not validating:
                callbacks.log_metrics({"step": step + 1, "tokens": state.position.tokens, **metrics})
            if saving or validating:
                check_finite_weights(parallel, step + 1)
            if saving:  # before what may fail; a run that is resumed from here repeats that
                pending = metrics if validating else None
                state.position = state.position.replace(seconds=clock.seconds, pending=pending)
                callbacks.save(state.position)
            if validating:
                validate_and_sample(state, metrics, callbacks, saving)
        if stop:
            break
    position = state.position
    if position.step < settings.steps and position.is_over(settings, schedule):
        log.info(
            f"early stopping after step {position.step}: {settings.early_stopping} validations in a row were no better "
            f"than that of step {position.best_step}"
        )
    return position


def forward_backward(
    parallel: Parallel, batch: Batch, count: float, first_row: int, settings: TrainSettings, objective: Objective
) -> Tensor:
    """Accumulate the gradients of the step's mean loss over micro-batches; return this rank's part of the loss.

    The part is on the device, and not waited for; the parts of all ranks add up to the mean over the `count` of the
    step, such as its number of targets. Each micro-batch is divided by the whole step's count, and its dropout is
    seeded by its first row in the stream, so the result does not depend on how the batch is cut or shared. Backward of
    the last micro-batch all-reduces the gradients.
    """
    device = parallel.runtime.device

    def micro_batch_step(micro_batch: Batch, divisor: Tensor) -> Tensor:
        with parallel.runtime.autocast():
            loss = objective.summed_loss(parallel.forward, micro_batch) / divisor
        torch.autograd.backward(loss * parallel.world.size)  # data parallelism averages over ranks: make it the sum
        return loss.detach()

    total = torch.zeros((), dtype=torch.float32, device=device)
    divisor = torch.full((), float(count), dtype=torch.float32, device=device)
    size = min(settings.micro_batch_size or len(batch.tokens), len(batch.tokens))
    micro_batches = list(batch.split(size))
    graphed = parallel.cuda_graph is not None and len(micro_batches) == 1
    run = partial(parallel.cuda_graph, micro_batch_step) if graphed and parallel.cuda_graph else micro_batch_step
    for number, micro_batch in enumerate(micro_batches):
        seed_everything(settings.seed, "rows", first_row + number * size)
        with parallel.micro_batch(number == len(micro_batches) - 1):
            total += run(micro_batch.to(device), divisor)
    return total


def measure_step(
    state: TrainState, batch: Batch, first_row: int, settings: TrainSettings, objective: Objective
) -> tuple[float, float]:
    """Return the loss and the gradient norm of a step without updating weights."""
    world = state.parallel.world
    (count,) = world.all_reduce_sum(objective.begin_step(batch))
    local_loss = forward_backward(state.parallel, batch, count, first_row, settings, objective)
    norm = full_tensor(state.optimizers.grad_norm()).item()
    state.optimizers.zero_grad()
    return world.all_reduce_sum(local_loss.item())[0], norm


def validate_and_sample(state: TrainState, metrics: dict[str, Any], callbacks: Callbacks, saving: bool = True) -> None:
    """Validate, complete and log the step's metrics, and sample; a saved step with the lowest loss becomes the best."""
    score = callbacks.validate()
    position = state.position.replace(pending=None)
    if saving and (position.best_loss is None or score.loss < position.best_loss) and callbacks.wait_for_save():
        position = position.replace(best_loss=score.loss, best_step=position.step)
    state.position = position
    validation = {f"val_{name}": value for name, value in score.figures().items()}
    metrics = dict(metrics)
    seconds = metrics.pop("seconds")
    callbacks.log_metrics(
        {"step": position.step, "tokens": position.tokens, **metrics, **validation, "seconds": seconds}
    )
    callbacks.sample(position.step)


class RankBatches:
    """This rank's share of the batch of each step, read ahead by one step (prefetch)."""

    def __init__(self, rows: RowStream, batch_size: int, rank: int, ranks: int, step: int) -> None:
        """Start at a step of `batch_size` rows over all ranks."""
        self._rows, self._batch_size, self._size = rows, batch_size, batch_size // ranks
        self._first_row = step * batch_size + rank * self._size
        self._ahead: Batch | None = None

    def next(self) -> tuple[Batch, int]:
        """Return the batch of the next step and its first row in the stream."""
        batch, first_row = self.peek(), self._first_row
        self._ahead, self._first_row = None, first_row + self._batch_size
        return batch, first_row

    def prefetch(self) -> None:
        """Read the batch of the next step."""
        self.peek()

    def peek(self) -> Batch:
        """Return the batch of the next step and stay before it."""
        if self._ahead is None:
            self._ahead = self._rows.rows(self._first_row, self._size)
        return self._ahead


def _warn_of_spike(position: Position, loss: float, settings: TrainSettings) -> None:
    rows = rows_of_step(position.step, settings)
    log.warning(f"step {position.step}: the loss jumped to {loss:.3f} from about {position.level.mean:.3f} ({rows})")
