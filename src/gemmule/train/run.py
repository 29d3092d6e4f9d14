"""A whole run, from recipe to model folder; what it writes lies in one run folder."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from gemmule.data import Dataset, DataSettings, open_dataset, prepared_folder
from gemmule.data.batches import MixedRows, PackedRows, WholeDocuments
from gemmule.data.dataset import DATASET_FILE
from gemmule.data.report import describe_epochs
from gemmule.errors import OutputError, RecipeError
from gemmule.files import aside_of, folder_written_aside, held, written_aside
from gemmule.formats.folder import save_folder
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.initialise import initialise, unfilled
from gemmule.recipe import Problem, Settings, read_recipe, write_recipe
from gemmule.runtime import (
    World,
    choose_device,
    choose_precision,
    derive_seed,
    interruptible,
    joined,
    reason_not_to_compile,
)
from gemmule.tokenizer import Tokenizer, TokenizerSettings
from gemmule.train.checkpoint import Position, Saver, load_checkpoint, newest_checkpoint, prune_checkpoints
from gemmule.train.loop import Hooks, TrainSettings, accumulate_gradients, train
from gemmule.train.memory import out_of_memory_explained
from gemmule.train.metrics import JsonLines
from gemmule.train.optim import OptimizerSettings, Updater
from gemmule.train.parallel import Parallel, ParallelSettings, gather, parallelise
from gemmule.train.probe import AUTO, flex_trains, time_kernels, tokens_of_a_trial
from gemmule.train.schedule import ScheduleSettings
from gemmule.train.validation import Score, score


class Recipe(Settings):
    """Everything that decides a run."""

    data: DataSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: Gemma3Config = Gemma3Config()
    train: TrainSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    parallel: ParallelSettings = ParallelSettings()

    def problems(self) -> Iterator[Problem]:
        """Yield sections that do not fit each other."""
        own = self.model.vocab_size if _gives_vocabulary(self.model) else None
        if own is not None and self.tokenizer.path is None and own < self.tokenizer.vocab_size:
            advice = f"must be at least tokenizer.vocab_size ({self.tokenizer.vocab_size}); leave it out to follow that"
            yield Problem("model.vocab_size", own, advice)
        if self.train.context > self.model.max_position_embeddings:
            advice = f"must be at most model.max_position_embeddings ({self.model.max_position_embeddings})"
            yield Problem("train.context", self.train.context, advice)


class Audience(NamedTuple):
    """Who is told of a run, and the parts that lie above training: plain functions."""

    say: Callable[[str], None]
    # (what is being done, how much is done, of how much if known)
    progress: Callable[[str, int, int | None], None]
    # A line of metrics.jsonl, and the number of steps of the run.
    record: Callable[[dict[str, Any], int], None]
    # (model, tokenizer, prompts, tokens, seed) -> the prompts continued
    tell: Callable[[Gemma3, Tokenizer, Sequence[str], int, int], list[str]]


# Of the processes that have nothing to say: all but the first.
SILENT = Audience(lambda _: None, lambda *_: None, lambda *_: None, lambda *_: [])


class Outcome(NamedTuple):
    """How a run ended."""

    recipe: Recipe
    position: Position
    dataset: Dataset
    model: Gemma3 | None  # on the first process of the run


def run_recipe(recipe: Recipe, out: Path, resume: bool, audience: Audience) -> Outcome:
    """Prepare the data, train from the start or from the newest good checkpoint, and write the model folder.

    Every process that torchrun started calls this; one that torchrun starts again resumes. A stop asked for by Ctrl-C
    or SIGTERM ends the run after a checkpoint; `position.step` tells how far it came.
    """
    device = choose_device(recipe.train.device)
    with joined(device) as world:
        # Each machine's torchrun counts for itself, and a machine that came later has counted none.
        again = resume or world.total(world.restarts) != [0]
        recipe = world.agree(claim_folder(recipe, out, again) if world.first else recipe)
        with held(out) if world.first else nullcontext():
            return _run(recipe, out, again, audience, device, world)


def _run(recipe: Recipe, out: Path, resume: bool, audience: Audience, device: torch.device, world: World) -> Outcome:
    precision = choose_precision(recipe.train.precision, device)
    _check_shares(recipe, world)
    dataset = _dataset(recipe, out, audience, world)
    tokenizer = dataset.tokenizer
    recipe = _settle_vocabulary(recipe, tokenizer)
    rows = training_rows(dataset, recipe)
    audience.say(describe(recipe, device, precision, world))
    if world.first:
        recipe = settle_attention(_settle_compile(recipe, device, audience), device, precision, audience.say)
    recipe = world.agree(recipe)
    with out_of_memory_explained(recipe.model, recipe.train, recipe.parallel, precision, device):
        recipe = _settle_steps(recipe, rows, device, precision, world, audience)
        audience.say(implied_epochs(dataset, recipe))
        parallel, updater = build(recipe, device, precision, world)
        position = _restore(out, parallel, updater, audience) if resume else Position()
        if world.first:
            with written_aside(out / "recipe.toml") as aside:
                write_recipe(recipe, aside, "The recipe of this run, resolved: it repeats the run.")
            prune_checkpoints(out, recipe.train.keep_checkpoints, position)  # a kill may have come before that
        position = _learn(recipe, out, dataset, rows, parallel, updater, precision, position, audience)
    model = gather(parallel, recipe.train.attention)
    if model is not None:
        with folder_written_aside(out / "model") as folder:
            save_folder(model.eval(), tokenizer, folder)
    return Outcome(recipe, position, dataset, model)


def _learn(
    recipe: Recipe,
    out: Path,
    dataset: Dataset,
    rows: PackedRows | MixedRows,
    parallel: Parallel,
    updater: Updater,
    precision: Literal["bf16", "fp32"],
    position: Position,
    audience: Audience,
) -> Position:
    """Train from `position` on, with checkpoints, metrics and samples in the run folder `out`."""
    saver = Saver(out, parallel, dataset.tokenizer, updater, recipe.train.keep_checkpoints, audience.say)
    measure = validation(dataset, recipe, parallel, precision)
    paper = out.joinpath if parallel.world.first else lambda _: Path(os.devnull)
    with (
        interruptible() as interrupt,
        JsonLines(paper("metrics.jsonl"), position.metrics_bytes) as metrics,
        JsonLines(paper("samples.jsonl"), position.samples_bytes) as samples,
    ):

        def record(line: dict[str, Any]) -> None:
            if "val_loss" in line and measure.floor is not None:
                line["val_floor"] = measure.floor
            metrics.write(line)
            audience.record(line, recipe.train.steps)

        def sample(step: int) -> None:
            model = gather(parallel, recipe.train.attention)
            if model is None:
                return
            prompts, tokens = recipe.train.sample_prompts, recipe.train.sample_tokens
            seed = derive_seed(recipe.train.seed, "sample")
            texts = audience.tell(model.eval(), dataset.tokenizer, prompts, tokens, seed)
            model.train()
            for prompt, text in zip(prompts, texts, strict=True):
                samples.write({"step": step, "prompt": prompt, "text": text})

        def save(now: Position) -> None:
            saver.save(now.replace(metrics_bytes=metrics.size, samples_bytes=samples.size))

        hooks = Hooks(record, audience.say, measure.score, sample, save, lambda: interrupt.requested)
        try:
            return train(parallel, updater, rows, recipe.train, recipe.schedule, precision, position, hooks)
        finally:
            saver.finish()


def claim_folder(recipe: Recipe, out: Path, resume: bool) -> Recipe:
    """Take `out` for this run and return the recipe to follow: the folder's own where a run is resumed.

    Raises OutputError where the folder holds something else.
    """
    stored = out / "recipe.toml"
    found = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if stored.name not in found and (found or (out.exists() and not out.is_dir())):
        raise OutputError(f"--out {out}: holds other files and no run; name a new or empty folder")
    if found <= {
        stored.name,
        aside_of(out / "data").name,
    }:  # nothing, or what a run left that failed before it had read its data
        with written_aside(stored) as aside:
            write_recipe(recipe, aside, "The recipe of this run, as given.", given_only=True)
        return recipe
    if not resume:
        raise OutputError(f"--out {out}: holds a run already; go on with it by --resume, or name another folder")
    known = read_recipe(stored, Recipe)
    differing = _differences(recipe, known)
    if differing:
        raise OutputError(f"--out {out}: holds a run of another recipe ({'; '.join(differing)}); name another folder")
    changes = {key: getattr(recipe.train, key) for key in _FREE}
    if changes["attention"] == AUTO:  # the run has chosen
        changes["attention"] = known.train.attention
    return known.replace(train=known.train.replace(**changes), parallel=recipe.parallel)


# Settings of [train] with which a run can be resumed on another machine: they decide how it is computed, not what.
_FREE = (
    "micro_batch_size", "device", "attention", "compile", "log_every", "keep_checkpoints", "max_skipped_steps",
)  # fmt: skip


def _differences(given: Recipe, stored: Recipe) -> list[str]:
    """List the settings that differ, apart from those that a run resolves for itself or can be resumed without."""
    resolved = {f"train.{key}" for key in _FREE} | {f"parallel.{key}" for key in type(given.parallel).model_fields}
    resolved |= {f"{name}.vocab_size" for name in ("model", "tokenizer") if not _gives_vocabulary(getattr(given, name))}
    if given.train.minutes is not None:
        resolved |= {"train.minutes", "train.steps"}
    new, old = (
        {f"{group}.{key}": value for group, table in r.model_dump().items() for key, value in table.items()}
        for r in (given, stored)
    )
    return [f"{key} is {new[key]!r}, was {old[key]!r}" for key in new if new[key] != old[key] and key not in resolved]


def _check_shares(recipe: Recipe, world: World) -> None:
    """Raise RecipeError where the processes cannot have equal shares of a step, or of the machines."""
    size, batch = world.size, recipe.train.batch_size
    if batch % size:
        advice = f"must be a multiple of the {size} processes, such as {max(size, batch // size * size)}"
        raise RecipeError(str(Problem("train.batch_size", batch, advice)))
    if size % world.local_size:
        raise RecipeError(f"{size} processes on machines of {world.local_size}: start equally many on each machine")


def _dataset(recipe: Recipe, out: Path, audience: Audience, world: World) -> Dataset:
    """Open the prepared data; where this run has none, its first process makes it, and the others wait."""
    prepared = prepared_folder(recipe.data)
    if prepared and recipe.data.validation:
        audience.say(f"data.validation is not read: {prepared} brings its own validation documents")
    folder = prepared or out / "data"
    if world.first and not (folder / DATASET_FILE).is_file():
        from gemmule.data.engines import available_cores
        from gemmule.data.prepare import prepare_dataset

        workers = available_cores()
        prepare_dataset(recipe.data, recipe.tokenizer, folder, audience.progress, workers=workers, say=audience.say)
    dataset = open_dataset(world.agree(folder))
    audience.say(str(dataset.report))
    return dataset


def training_rows(dataset: Dataset, recipe: Recipe) -> PackedRows | MixedRows:
    """Return the rows to train on: of all train documents, or of each source as its weight says."""
    context, seed, masked = recipe.train.context, recipe.train.seed, recipe.data.mask_documents
    corpora = dataset.mixture(recipe.data.weights)
    packed = [PackedRows(corpus, context, seed, masked, dataset.tokenizer.bos_id) for corpus, _ in corpora]
    return MixedRows(packed, [weight for _, weight in corpora]) if recipe.data.weights else packed[0]


def implied_epochs(dataset: Dataset, recipe: Recipe) -> str:
    """Say how many tokens a recipe trains on, and how often that goes through the dataset or each of its sources."""
    steps = recipe.train.steps
    seen = steps * recipe.train.batch_size * recipe.train.context
    corpora = dataset.mixture(recipe.data.weights)
    names = [source.source for source in dataset.report.sources]
    tokens, weights = [corpus.tokens for corpus, _ in corpora], [weight for _, weight in corpora]
    return f"{steps:,} steps: {seen:,} tokens, {describe_epochs(names, tokens, weights, seen)}"


def _settle_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """Follow the tokenizer where the recipe leaves sizes open; RecipeError where it asks for others."""
    ids, chosen, model = tokenizer.vocab_size, recipe.tokenizer, recipe.model
    if chosen.path is None and _gives_vocabulary(chosen) and chosen.vocab_size != ids:
        raise RecipeError(
            f"tokenizer.vocab_size = {chosen.vocab_size}: the dataset {recipe.data.train[0]} was prepared with {ids}; "
            "leave it out to follow that"
        )
    rows = model.vocab_size if _gives_vocabulary(model) else ids
    if rows < ids:
        raise RecipeError(f"model.vocab_size = {rows}: the tokenizer has {ids} ids; use {ids}, or leave it out")
    settled = chosen if chosen.path else chosen.replace(vocab_size=ids)
    return recipe.replace(model=model.replace(vocab_size=rows), tokenizer=settled)


def _gives_vocabulary(settings: Gemma3Config | TokenizerSettings) -> bool:
    return "vocab_size" in settings.model_fields_set


def describe(recipe: Recipe, device: torch.device, precision: str, world: World) -> str:
    """Say in two lines what will be trained, and where."""
    config, settings = recipe.model, recipe.train
    parameters = sum(p.numel() for p in unfilled(config).parameters())
    embedding = config.vocab_size * config.hidden_size
    return (
        f"Gemma 3 with {parameters:,} parameters ({embedding:,} in the embedding): {config.num_hidden_layers} layers "
        f"of width {config.hidden_size}, MLP {config.intermediate_size}, {config.num_attention_heads} heads and "
        f"{config.num_key_value_heads} of keys, each {config.head_dim}; window {config.sliding_window}\n"
        f"on {device} in {precision}, {settings.batch_size} x {settings.context} tokens a step"
        + (f", {world.size} processes by {recipe.parallel.strategy}" if world.size > 1 else "")
    )


def build(
    recipe: Recipe, device: torch.device, precision: Literal["bf16", "fp32"], world: World
) -> tuple[Parallel, Updater]:
    """Make a fresh model, in place on every process, and its optimizers."""
    seed, damp = derive_seed(recipe.train.seed, "weights"), recipe.train.damp_branches
    parallel = parallelise(
        unfilled(recipe.model, recipe.train.attention),
        recipe.parallel,
        recipe.train.compile,
        precision,
        device,
        world,
        lambda model, put: initialise(model, seed, damp, put),
    )
    return parallel, Updater(parallel.model, recipe.optimizer, precision)


def _settle_compile(recipe: Recipe, device: torch.device, audience: Audience) -> Recipe:
    """Give up compiling, and say so, where the machine cannot."""
    reason = reason_not_to_compile(device) if recipe.train.compile else None
    if reason is None:
        return recipe
    audience.say(f"train.compile: going on without, this machine cannot: {reason}")
    return recipe.replace(train=recipe.train.replace(compile=False))


def settle_attention(
    recipe: Recipe, device: torch.device, precision: Literal["bf16", "fp32"], say: Callable[[str], None]
) -> Recipe:
    """Put the fastest kernel in the place of `train.attention = "auto"`, and say why; RecipeError if none can do it."""
    if recipe.train.attention == "flex" and not flex_trains(recipe.model, device, recipe.train.compile):
        advice = (
            'needs a GPU, train.compile and no model.attention_dropout; "auto" takes the fastest that can train here'
        )
        raise RecipeError(str(Problem("train.attention", "flex", advice)))
    if recipe.train.attention != AUTO:
        return recipe
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    times = time_kernels(recipe.model, recipe.train.context, dtype, device, recipe.train.compile, say)
    best = min(times, key=lambda name: times[name], default="sdpa")
    if times:
        others = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
        tokens = tokens_of_a_trial(device)
        say(f"train.attention: {best} is the fastest here ({others} for {tokens:,} tokens of a local layer)")
    return recipe.replace(train=recipe.train.replace(attention=best))


def _settle_steps(
    recipe: Recipe,
    rows: PackedRows | MixedRows,
    device: torch.device,
    precision: Literal["bf16", "fp32"],
    world: World,
    audience: Audience,
) -> Recipe:
    """Turn `train.minutes` into steps by timing a few on a throw-away model."""
    minutes = recipe.train.minutes
    if minutes is None:
        return recipe
    settings = recipe.train
    parallel, updater = build(recipe, device, precision, world)
    parallel.model.train()
    batch = rows.rows(0, settings.batch_size // world.size)
    times: list[float] = []
    # The first steps also compile and fill caches.
    while world.agree(len(times) < 8 or (sum(times[3:]) < 4 and len(times) < 30)):
        began = time.perf_counter()
        accumulate_gradients(parallel, batch, batch.trained * world.size, 0, settings, precision)
        updater.update(1e-3)
        times.append(time.perf_counter() - began)
    # What else the machine does makes steps slower, never faster.
    seconds = world.agree(statistics.quantiles(times[3:], n=4)[0])
    steps = max(1, min(settings.steps, int(60 * minutes / seconds)))
    audience.say(f"one step takes {seconds:.3f} s here; {minutes:g} minutes were asked for")
    return recipe.replace(train=settings.replace(steps=steps, minutes=None))


def _restore(out: Path, parallel: Parallel, updater: Updater, audience: Audience) -> Position:
    """Go back to the newest checkpoint that is whole, saying what is wrong with newer ones."""
    world = parallel.world
    folder, damage = world.agree(newest_checkpoint(out) if world.first else (None, []))
    for sentence in damage:
        audience.say(f"passed over a checkpoint: {sentence}")
    if folder is None:
        audience.say(f"{out} has no checkpoint yet: starting from step 0")
        return Position()
    position = load_checkpoint(folder, parallel, updater)
    audience.say(f"going on from {folder}, after step {position.step:,}")
    return position


class Measure(NamedTuple):
    """The validation of a run, and the loss no model can beat on it where that is known (nats per token)."""

    score: Callable[[], Score]
    floor: float | None


def validation(dataset: Dataset, recipe: Recipe, parallel: Parallel, precision: Literal["bf16", "fp32"]) -> Measure:
    """Fix the documents to validate on."""
    settings = recipe.train
    documents = WholeDocuments(
        dataset.validation,
        settings.context,
        settings.micro_batch_size or settings.batch_size,
        dataset.tokenizer.pad_id or 0,
        settings.validation_tokens,
    )
    whole = documents.documents == dataset.validation.documents
    floor = dataset.floor_nats / documents.targets if dataset.floor_nats is not None and whole else None
    model, world = parallel.model, parallel.world
    return Measure(lambda: score(model, documents, documents.bytes, precision, world), floor)
