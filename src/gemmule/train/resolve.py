"""Resolving a recipe: everything it leaves open is decided once, before the first step, the same on every rank."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from gemmule.data.batches import RowStream
from gemmule.data.dataset import Dataset
from gemmule.distributed import World, full_tensor
from gemmule.errors import RecipeError
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights, meta_model
from gemmule.model.lora import add_lora, init_lora
from gemmule.runtime import Runtime, choose_precision, derive_seed
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.train.autotune import Trial, tune
from gemmule.train.loop import forward_backward
from gemmule.train.lora import Adapter, describe_adapter
from gemmule.train.objectives import build_objective, training_rows
from gemmule.train.optim import Optimizers
from gemmule.train.parallel import parallelize
from gemmule.train.recipe import Recipe, gives_vocabulary
from gemmule.train.settings import AUTO
from gemmule.train.start import Start
from gemmule.train.state import TrainState

log = logging.getLogger(__name__)


class ResolvedRecipe(Recipe):
    """A recipe that leaves nothing open: vocabulary, steps, precision, compilation and attention kernel are set."""

    def problems(self) -> Iterator[Problem]:
        """Yield settings that are still open."""
        yield from super().problems()
        open_settings = {
            "train.precision": self.train.precision == AUTO,
            "train.attention": self.train.attention == AUTO,
            "train.minutes": self.train.minutes is not None,
            "model.vocab_size": not gives_vocabulary(self.model),
        }
        for key, is_open in open_settings.items():
            if is_open:
                section, _, name = key.partition(".")
                yield Problem(key, getattr(getattr(self, section), name), "is not resolved")


def resolve(
    recipe: Recipe,
    dataset: Dataset,
    runtime: Runtime,
    on_progress: Callable[[str, int, int | None], None],
    adapter: Adapter | None = None,
) -> tuple[ResolvedRecipe, Runtime]:
    """Settle what a recipe leaves open; also return the runtime in the precision that was chosen.

    The vocabulary follows the tokenizer. Precision, compilation and attention kernel are measured on the main rank, the
    time of a step (for `train.minutes`) on all of them. RecipeError for settings that do not fit the dataset.
    """
    recipe = resolve_vocabulary(recipe, dataset.tokenizer.vocab_size)
    check_prompts(recipe, dataset.tokenizer)
    rows = training_rows(dataset, recipe) if recipe.data.kind != "prompts" else None  # a corpus may be too short
    if runtime.world.is_main:
        on_progress("comparing number formats and attention kernels", 0, None)
        recipe = recipe.replace(train=tune(trial_of(recipe, runtime.device, runtime.world.size), recipe.train))
    recipe = runtime.world.broadcast(recipe)
    runtime = runtime._replace(precision=choose_precision(recipe.train.precision, runtime.device))
    log.info(describe(recipe, runtime))
    if adapter is not None:
        log.info(describe_adapter(recipe.model, adapter, base_dtype(recipe, runtime.precision)))
    if recipe.train.minutes is not None and rows is not None:
        recipe = resolve_steps(recipe, rows, runtime, on_progress, adapter)
    return ResolvedRecipe.model_validate(recipe.model_dump(exclude_unset=True)), runtime


def check_ranks(batch_size: int, world: World) -> None:
    """Raise RecipeError where ranks cannot have equal shares of a step, or machines equally many ranks."""
    if batch_size % world.size:
        nearest = max(world.size, batch_size // world.size * world.size)
        advice = f"must be a multiple of the {world.size} processes, such as {nearest}"
        raise RecipeError(str(Problem("train.batch_size", batch_size, advice)))
    if world.size % world.local_size:
        raise RecipeError(
            f"{world.size} processes on machines of {world.local_size}: start equally many on each machine"
        )


def resolve_vocabulary(recipe: Recipe, ids: int | None = None) -> Recipe:
    """Follow the tokenizer, of so many ids, where vocabulary sizes are open; RecipeError where the recipe sets others.

    Without `ids` it is a tokenizer that is still to be trained, as the recipe says.
    """
    if recipe.train.start is not None:  # the model decided
        return recipe
    section, model = recipe.tokenizer, recipe.model
    ids = section.vocab_size if ids is None else ids
    if section.path is None and gives_vocabulary(section) and section.vocab_size != ids:
        raise RecipeError(
            f"tokenizer.vocab_size = {section.vocab_size}: the dataset {recipe.data.train[0]} was prepared with {ids}; "
            "leave it out to follow that"
        )
    entries = model.vocab_size if gives_vocabulary(model) else ids
    if entries < ids:
        raise RecipeError(f"model.vocab_size = {entries}: the tokenizer has {ids} ids; use {ids}, or leave it out")
    section = section if section.path else section.replace(vocab_size=ids)
    return recipe.replace(model=model.replace(vocab_size=entries), tokenizer=section)


def check_prompts(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise RecipeError for a sample prompt that the model could not continue, before the first step."""
    longest = recipe.model.max_position_embeddings
    for prompt in recipe.train.sample_prompts:
        count = len(tokenizer.encode(prompt))
        if not count:
            advice = "is empty, and this tokenizer adds no bos token; give it a word"
        elif count >= longest:
            advice = f"has {count} tokens; model.max_position_embeddings is {longest}, so use a shorter one"
        else:
            continue
        raise RecipeError(str(Problem("train.sample_prompts", prompt, advice)))


def trial_of(recipe: Recipe, device: torch.device, ranks: int = 1) -> Trial:
    """Return what a rank of a run computes with, whose vocabulary is resolved."""
    per_rank = recipe.train.batch_size // ranks
    rows = min(recipe.train.micro_batch_size or per_rank, per_rank)
    return Trial(recipe.model, rows, recipe.train.context, recipe.data.masks_documents, device)


def resolve_steps(
    recipe: Recipe,
    rows: RowStream,
    runtime: Runtime,
    on_progress: Callable[[str, int, int | None], None],
    adapter: Adapter | None = None,
) -> Recipe:
    """Turn `train.minutes` into steps by timing a few steps of a model that is then discarded."""
    settings, world = recipe.train, runtime.world
    minutes = settings.minutes
    assert minutes is not None
    on_progress("compiling" if settings.compile else "measuring the time per step", 0, None)
    state = build(recipe, runtime, adapter=adapter)
    state.parallel.model.train()
    objective = build_objective(recipe)
    batch = rows.rows(0, settings.batch_size // world.size)
    times: list[float] = []
    # The first three steps also compile and warm up caches.
    while world.broadcast(len(times) < 8 or (sum(times[3:]) < 4 and len(times) < 30)):
        began = time.perf_counter()
        forward_backward(state.parallel, batch, objective.begin_step(batch) * world.size, 0, settings, objective)
        state.optimizers.clip_grad_norm(state.optimizers.grad_norm())
        state.optimizers.set_learning_rate(1e-3)
        state.optimizers.step()
        state.optimizers.zero_grad()
        times.append(time.perf_counter() - began)
    # The lower quartile: other work on the machine makes steps slower, never faster.
    seconds = world.broadcast(statistics.quantiles(times[3:], n=4)[0])
    first = recipe.schedule.restart_step
    steps = max(1, min(settings.steps - first, int(60 * minutes / seconds)))
    unit = "minute" if minutes == 1 else "minutes"
    log.info(f"one step takes {seconds:.3f} s on this machine: {steps:,} steps fit into {minutes:g} {unit}")
    return recipe.replace(train=settings.replace(steps=first + steps, minutes=None))


def build(recipe: Recipe, runtime: Runtime, start: Start | None = None, adapter: Adapter | None = None) -> TrainState:
    """Build a model on every rank, and its optimizers; its weights are those of `start`, or drawn by the seed.

    With an adapter these are frozen, and it alone learns.
    """
    settings = recipe.train
    model = meta_model(recipe.model, settings.attention)
    if adapter is not None:
        add_lora(model.to(base_dtype(recipe, runtime.precision)), adapter.lora)

    def init(model: Gemma3, copy: Callable[[Tensor, Tensor], object]) -> None:
        if start is None or start.adds_layers(model.config):
            init_weights(model, derive_seed(settings.seed, "weights"), settings.damp_branches, copy)
        if start is not None:
            start.copy_weights(model, copy)
        if adapter is not None:
            init_lora(model, derive_seed(settings.seed, "lora"), copy, full_tensor)

    parallel = parallelize(model, recipe.parallel, settings.compile, runtime, init)
    optimizers = Optimizers(parallel.model, recipe.optimizer, runtime.precision)
    return TrainState(parallel, optimizers, adapter=adapter)


def base_dtype(recipe: Recipe, precision: Literal["bf16", "fp32"]) -> torch.dtype:
    """Return the dtype of the frozen weights below an adapter; sharded weights are fp32, and gathered in bf16."""
    half = recipe.lora.base_precision == "auto" and precision == "bf16" and recipe.parallel.strategy == "ddp"
    return torch.bfloat16 if half or recipe.lora.base_precision == "bf16" else torch.float32


def describe(recipe: Recipe, runtime: Runtime) -> str:
    """Describe in two lines what is trained, and where."""
    config, settings = recipe.model, recipe.train
    parameters = sum(p.numel() for p in meta_model(config).parameters())
    embedding = config.vocab_size * config.hidden_size
    ranks = runtime.world.size
    return (
        f"Gemma 3 with {parameters:,} parameters ({embedding:,} in the embedding): {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, MLP {config.intermediate_size}, {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} key/value heads of {config.head_dim}; sliding window {config.sliding_window}\n"
        f"on {runtime.device} in {runtime.precision}, {settings.batch_size} x {settings.context} tokens per step"
        + (f", {ranks} processes by {recipe.parallel.strategy}" if ranks > 1 else "")
    )
