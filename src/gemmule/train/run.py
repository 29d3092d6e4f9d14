"""A whole run, from recipe to model folder; everything it writes is in one run folder."""

import logging
import os
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.compiler import rebuilding
from gemmule.data.dataset import DATASET_FILE, Dataset, open_dataset, prepared_folder
from gemmule.distributed import World, full_tensor, process_group
from gemmule.errors import CheckpointError, GemmuleError, OutputError, RecipeError
from gemmule.files import atomic_folder, atomic_write
from gemmule.formats.adapter import CONFIG as ADAPTER_CONFIG
from gemmule.formats.adapter import adapter_tensors, save_adapter
from gemmule.formats.folder import save_folder
from gemmule.model.gemma3 import Gemma3
from gemmule.run_folder import RunFolder
from gemmule.runtime import Runtime, choose_device, derive_seed, interruptible
from gemmule.settings import Problem, read_comments, read_recipe, write_recipe
from gemmule.tokenizer import Tokenizer
from gemmule.tracking import Tracking, TrackingSettings
from gemmule.train.checkpoint import Saver, checkpoints, load_checkpoint, newest_checkpoint, prune_checkpoints
from gemmule.train.environment import log_environment
from gemmule.train.loop import Callbacks, train
from gemmule.train.lora import Adapter
from gemmule.train.memory import out_of_memory_explained
from gemmule.train.metrics import ChosenRepliesWatch, JsonLines, OverfittingWatch
from gemmule.train.objectives import check_kind, find_reference, identity, implied_epochs, open_job
from gemmule.train.observer import Observer, SampleFunction
from gemmule.train.open_run import Extension, claim_run, differences, keep_recipe, remove_leftovers
from gemmule.train.parallel import gather_model
from gemmule.train.recipe import Recipe
from gemmule.train.reference import Reference
from gemmule.train.resolve import ResolvedRecipe, build, check_ranks, resolve
from gemmule.train.rollouts import ReplyFunction
from gemmule.train.start import Start, open_start
from gemmule.train.state import Position, TrainState

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a run ended."""

    recipe: ResolvedRecipe
    position: Position
    dataset: Dataset
    model: Gemma3 | None  # on the main rank

    @property
    def finished(self) -> bool:
        """Whether the run has ended, and was not stopped on the way."""
        return self.position.is_over(self.recipe.train, self.recipe.schedule)


def run_recipe(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    observer: Observer | None = None,
    sample: SampleFunction | None = None,
    allow_changes: bool = False,
    extend: Extension | None = None,
    reply: ReplyFunction | None = None,
) -> Outcome:
    """Prepare the data, train from the start or from the newest good checkpoint, and write the model folder.

    Every process that torchrun started calls this; one that torchrun restarts resumes. A stop requested by Ctrl-C or
    SIGTERM ends the run after a checkpoint; `position.step` is how far it came. `sample` continues the sample
    prompts after each validation. `allow_changes` lets a resumed run change the optimizer's constants, the schedule or
    the number of steps; `extend` trains it longer, with a schedule that begins anew where it was to end. `reply`
    answers prompts, which rewards need.
    """
    run, device, observer = RunFolder(out), choose_device(recipe.train.device), observer or Observer()
    with process_group(device) as world:
        runtime = Runtime(device, world=world)
        # Each machine's torchrun counts its own restarts, and a machine that joined later has counted none.
        resume = resume or extend is not None or world.all_reduce_sum(world.restarts) != [0]
        claim = claim_run(recipe, out, resume, allow_changes, extend) if world.is_main else nullcontext(recipe)
        with claim as recipe:
            recipe, attempts = world.broadcast(recipe), count()

            def attempt() -> Outcome:
                return _run(recipe, run, resume or next(attempts) > 0, runtime, observer, sample, reply)

            return rebuilding(attempt, retry=world.size == 1)


def _run(
    recipe: Recipe,
    run: RunFolder,
    resume: bool,
    runtime: Runtime,
    observer: Observer,
    sample: SampleFunction | None,
    reply: ReplyFunction | None,
) -> Outcome:
    is_main = runtime.world.is_main
    if is_main:
        remove_leftovers(run)
    check_ranks(recipe.train.batch_size, runtime.world)
    start = _start(recipe, run, runtime.world)
    if start is not None:
        recipe = start.adopt(recipe)
        log.info(f"starting from the weights of {start.name}")
    dataset = _prepared_dataset(recipe, run, runtime.world, observer, start)
    with out_of_memory_explained(recipe, runtime.device):
        check_kind(dataset, recipe)
        adapter = None if start is None else start.adapter(recipe)
        resolved, runtime = resolve(recipe, dataset, runtime, observer.on_progress, adapter)
        if resolved.data.kind != "prompts":
            log.info(implied_epochs(dataset, resolved))
        folder = prepared_folder(resolved.data) or run.data
        reference = find_reference(resolved, dataset, folder, runtime, observer.on_progress)
        state = build(resolved, runtime, start, adapter)
        start = None  # its weights need no memory any more
        if resume:
            _restore(run, state, identity(dataset, reference))
        if state.position.step > resolved.train.steps:
            advice = f"the run is at step {state.position.step:,} already; use that many or more"
            raise RecipeError(str(Problem("train.steps", resolved.train.steps, advice)))
        if is_main:
            _write_resolved(resolved, run, state.position)
            log_environment(run, state.position.step, runtime)
        observer.on_train_begin(resolved)
        failures = _train(resolved, run, dataset, reference, state, observer, sample, reply)
        if is_main:  # the last validation may have changed which checkpoint is the best
            prune_checkpoints(run.path, resolved.train.keep_checkpoints, state.position)
        if resolved.train.final_model == "best" and state.position.is_over(resolved.train, resolved.schedule):
            _load_best(run, state)
    if state.adapter is not None:
        _save_adapter(run, state, state.adapter, dataset.tokenizer)
    model = gather_model(state.parallel, resolved.train.attention)
    if model is not None:
        with atomic_folder(run.model, replace=True, last="config.json") as folder:
            save_folder(model.eval(), dataset.tokenizer, folder)
    if failures:
        raise failures[0]
    return Outcome(resolved, state.position, dataset, model)


def _save_adapter(run: RunFolder, state: TrainState, adapter: Adapter, tokenizer: Tokenizer) -> None:
    """Write the folder of the adapter, which names its base; every rank calls it."""
    tensors = adapter_tensors(state.parallel.model, full_tensor)
    if state.parallel.world.is_main:
        with atomic_folder(run.adapter, replace=True, last=ADAPTER_CONFIG) as folder:
            save_adapter(adapter.lora, tensors, adapter.base, folder)
            tokenizer.save(folder)


def _start(recipe: Recipe, run: RunFolder, world: World) -> Start | None:
    """Open the model that the run starts from; None where there is none, or a checkpoint takes its place.

    Checkpoints of an adapter do not have the weights of its base.
    """
    if recipe.lora.rank is None and world.broadcast(bool(checkpoints(run.path))):
        return None
    if not world.is_main:  # which may have to download it
        world.barrier()
    start = open_start(recipe)
    if world.is_main:
        world.barrier()
    return start


def _prepared_dataset(recipe: Recipe, run: RunFolder, world: World, observer: Observer, start: Start | None) -> Dataset:
    """Open the prepared dataset; where the recipe names none, the main rank prepares it in the run folder.

    The tokenizer is that of the model that the run starts from, if there is one.
    """
    prepared = prepared_folder(recipe.data)
    if prepared and recipe.data.validation:
        log.info(f"data.validation is not read: {prepared} has validation documents of its own")
    if world.is_main and not prepared and not (run.data / DATASET_FILE).is_file():
        from gemmule.data.prepare import prepare_dataset

        observer.on_prepare_data()
        vocabulary = recipe.tokenizer if start is None else start.tokenizer
        prepare_dataset(recipe.data, vocabulary, run.data, observer.on_progress, workers=None)
    dataset = open_dataset(world.broadcast(prepared or run.data))
    if start is not None:
        start.check_dataset(dataset, recipe)
    log.info(str(dataset.report))
    return dataset


def _restore(run: RunFolder, state: TrainState, data: str) -> None:
    """Load the newest good checkpoint and log what is wrong with newer ones; CheckpointError if all are damaged."""
    world = state.parallel.world
    folder, damage = world.broadcast(newest_checkpoint(run.path, data) if world.is_main else (None, []))
    for sentence in damage:
        log.warning(f"skipped a damaged checkpoint: {sentence}")
    if folder is None and damage:
        raise CheckpointError(
            f"{run.path}: all of its {len(damage)} checkpoints are damaged, and nothing is overwritten; restore one, "
            "or name another folder to start again"
        )
    if folder is None:
        log.info(f"{run.path} has no checkpoint yet: starting from step 0")
        return
    load_checkpoint(folder, state, data)
    log.info(f"resuming from {folder}, after step {state.position.step:,}")


def _write_resolved(recipe: ResolvedRecipe, run: RunFolder, position: Position) -> None:
    """Write the recipe that repeats the run; where a resumed run changes it, keep the one of the steps before."""
    before = read_recipe(run.recipe, Recipe)
    if position.step and differences(recipe, before):
        keep_recipe(run, position.step)
    comments = _comments_that_hold(recipe, before, read_comments(run.recipe))
    with atomic_write(run.recipe) as temporary:
        write_recipe(recipe, temporary, "The recipe of this run, resolved: it repeats the run.", comments=comments)


def _comments_that_hold(recipe: ResolvedRecipe, before: Recipe, comments: dict[str, str]) -> dict[str, str]:
    """Return the comments on settings that resolving has not changed."""
    held = {}
    for key, comment in comments.items():
        section, _, name = key.partition(".")
        one, other = (getattr(getattr(each, section, None), name, None) for each in (before, recipe))
        if one == other:
            held[key] = comment
    return held


def _train(
    recipe: ResolvedRecipe,
    run: RunFolder,
    dataset: Dataset,
    reference: Reference | None,
    state: TrainState,
    observer: Observer,
    sample: SampleFunction | None,
    reply: ReplyFunction | None,
) -> list[OutputError]:
    """Train to the end, with checkpoints, metrics and samples in the run folder; return what could not be written."""
    job = open_job(recipe, dataset, state, reference, reply)
    saver = Saver(run, state, dataset.tokenizer, recipe.train.keep_checkpoints, identity(dataset, reference))
    logs = RunLogs(recipe, run, state, observer, job.floor, sample, dataset.tokenizer)

    def save(position: Position) -> None:
        metrics_bytes, samples_bytes = logs.sync()
        saver.save(position.replace(metrics_bytes=metrics_bytes, samples_bytes=samples_bytes))

    def stop_requested() -> bool:  # not between steps that share their replies, which are not saved
        return interrupt.requested and (state.position.step + 1) % recipe.rewards.steps_per_rollout == 0

    failures: list[OutputError] = []
    with interruptible() as interrupt:
        callbacks = Callbacks(logs.log_metrics, job.validate, logs.sample, save, saver.wait_for_save, stop_requested)
        try:
            if recipe.train.compile:
                observer.on_progress("compiling", 0, None)
            train(state, job.rows, recipe.train, recipe.schedule, callbacks, job.objective)
        finally:
            job.close()
            logs.stop_tracking()
            for end in (saver.finish, logs.metrics.close, logs.samples.close):
                try:
                    end()
                except OutputError as error:
                    failures.append(error)
                    log.error(str(error))
            logs.finish_tracking()
    return failures


class RunLogs:
    """metrics.jsonl and samples.jsonl of a run, its trackers and its observer."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        run: RunFolder,
        state: TrainState,
        observer: Observer,
        floor: float | None,
        sample: SampleFunction | None,
        tokenizer: Tokenizer,
    ) -> None:
        """Open the logs where the state's position left them; on other ranks than the main one they go nowhere."""
        self._recipe, self._run, self._state, self._observer = recipe, run, state, observer
        self._floor, self._sample, self._tokenizer = floor, sample, tokenizer
        is_main, position, nowhere = state.parallel.world.is_main, state.position, Path(os.devnull)
        self.metrics = JsonLines(run.metrics if is_main else nowhere, position.metrics_bytes)
        self.samples = JsonLines(run.samples if is_main else nowhere, position.samples_bytes)
        self._tracking = Tracking(recipe.tracking if is_main else TrackingSettings(to=()), run, position.step)
        self._watches = (OverfittingWatch(), ChosenRepliesWatch())
        for line in run.read_metrics() if is_main else ():
            for watch in self._watches:
                watch.note(line)

    def log_metrics(self, line: dict[str, Any]) -> None:
        """Log a line of metrics."""
        if "val_loss" in line and self._floor is not None:
            line["val_floor"] = self._floor
        self.metrics.write(line)
        self._tracking.log_metrics(line)
        self._observer.on_metrics(line, self._recipe.train.steps)
        for watch in self._watches:
            if warning := watch.note(line):
                log.warning(warning)

    def sample(self, step: int) -> None:
        """Continue the sample prompts with the model as it is, and log the texts."""
        settings = self._recipe.train
        model = gather_model(self._state.parallel, settings.attention)
        if model is not None and self._sample is not None:
            prompts, seed = settings.sample_prompts, derive_seed(settings.seed, "sample")
            try:
                texts = self._sample(model.eval(), self._tokenizer, prompts, settings.sample_tokens, seed)
            except GemmuleError as error:
                log.warning(f"no samples after step {step}: {error}")
                texts = []
            model.train()
            for index, (prompt, text) in enumerate(zip(prompts, texts, strict=bool(texts))):
                self.samples.write({"step": step, "prompt": prompt, "text": text})
                self._tracking.log_text(f"sample/{index}", text, step)
            self._observer.on_samples(step, texts)
        self._state.parallel.world.barrier()  # collectives of a step have a short timeout

    def stop_tracking(self) -> None:
        """Give the trackers the loss curves, where they were drawn, and let them end."""
        if self._run.curves.is_file():
            self._tracking.log_image("loss", self._run.curves, self._state.position.step)
        self._tracking.stop()

    def finish_tracking(self) -> None:
        """Close the trackers."""
        self._tracking.finish()

    def sync(self) -> tuple[int, int]:
        """Flush both logs to disk and return their sizes in bytes."""
        self.metrics.sync()
        self.samples.sync()
        return self.metrics.size, self.samples.size


def _load_best(run: RunFolder, state: TrainState) -> None:
    """Load the weights of the best validated checkpoint."""
    position = state.position
    if position.best_step is None or position.best_step == position.step:
        return
    load_checkpoint(run.checkpoint(position.best_step), state)
    state.position = position
    log.info(f"the model folder gets the weights of step {position.best_step:,}, the best validated checkpoint")
