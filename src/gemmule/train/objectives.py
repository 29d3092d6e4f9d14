"""What the kind of data decides: the training rows, the objective, and the validation of a run."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemmule.data.batches import RowStream
from gemmule.data.conversation_packing import PackedConversations
from gemmule.data.dataset import Dataset
from gemmule.data.loss_mask import check_loss_mask
from gemmule.data.packing import MixedRows, PackedRows, WholeDocuments
from gemmule.data.rendering import DOCUMENTS_PER_ROW
from gemmule.data.report import describe_epochs
from gemmule.errors import RecipeError
from gemmule.runtime import Runtime
from gemmule.settings import Problem
from gemmule.train.objective import NextToken, Objective
from gemmule.train.preferences import LOSSES, PreferenceRows, Preferences, score_preferences
from gemmule.train.recipe import Recipe
from gemmule.train.reference import Reference, open_reference
from gemmule.train.rollouts import ReplyFunction, open_rewards
from gemmule.train.start import open_start
from gemmule.train.state import TrainState
from gemmule.train.validation import Scored, score


def build_objective(recipe: Recipe) -> Objective:
    """Return what a recipe minimizes."""
    if recipe.data.kind == "preferences":
        return Preferences(recipe.preferences)
    return NextToken(recipe.train.compile)


def training_rows(dataset: Dataset, recipe: Recipe, reference: Reference | None = None) -> RowStream:
    """Return the packed training rows: of all documents, or mixed from sources by `data.weights`.

    Rows of preferences have 0 for what a reference is not given for, as trials need no more.
    """
    context, seed, masked = recipe.train.context, recipe.train.seed, recipe.data.mask_documents
    corpora = dataset.mixture(recipe.data.weights)
    packed: list[RowStream] = []
    if recipe.data.kind == "text":
        packed += [PackedRows(corpus, context, seed, masked, dataset.tokenizer.bos_id) for corpus, _ in corpora]
    elif recipe.data.kind == "preferences":
        packed += [PreferenceRows(pairs, reference and reference.train) for pairs in pack(dataset, recipe)]
    else:
        packed += pack(dataset, recipe)
    return MixedRows(packed, [weight for _, weight in corpora]) if recipe.data.weights else packed[0]


def pack(dataset: Dataset, recipe: Recipe) -> list[PackedConversations]:
    """Pack the conversations or pairs to train on: of all sources together, or with `data.weights` of each."""
    context, seed, pad_id = recipe.train.context, recipe.train.seed, dataset.tokenizer.pad_id
    group, drop_turns = DOCUMENTS_PER_ROW.get(recipe.data.kind, 1), recipe.data.too_long == "drop_turns"
    corpora = dataset.mixture(recipe.data.weights)
    return [PackedConversations(corpus, context, seed, pad_id, group, drop_turns) for corpus, _ in corpora]


def implied_epochs(dataset: Dataset, recipe: Recipe) -> str:
    """Describe how much a recipe trains on, and how many epochs of the dataset or of each source that is."""
    steps, rows = recipe.train.steps, recipe.train.steps * recipe.train.batch_size
    corpora = dataset.mixture(recipe.data.weights)
    names, weights = [source.source for source in dataset.report.sources], [weight for _, weight in corpora]
    if recipe.data.kind == "text":
        sizes, tokens = [corpus.tokens for corpus, _ in corpora], rows * recipe.train.context
        return f"{steps:,} steps: {tokens:,} tokens, {describe_epochs(names, sizes, weights, tokens)}"
    if recipe.data.kind == "prompts":
        return f"{steps:,} steps"
    packed = pack(dataset, recipe)
    epochs = describe_epochs(names, [each.rows_per_epoch for each in packed], weights, rows)
    return "\n".join([f"{steps:,} steps: {rows:,} rows, {epochs}", *(each.describe() for each in packed)])


def check_kind(dataset: Dataset, recipe: Recipe) -> None:
    """Raise RecipeError where a dataset was prepared for another kind of data than the recipe trains on.

    DatasetError where a loss mask teaches nothing, or no end of a reply.
    """
    if dataset.kind != recipe.data.kind:
        advice = f'the dataset was prepared as "{dataset.kind}"; set that, or prepare it again'
        raise RecipeError(str(Problem("data.kind", recipe.data.kind, advice)))
    if recipe.data.kind in ("conversations", "preferences"):
        check_loss_mask(dataset.train, dataset.tokenizer, "train")
        check_loss_mask(dataset.validation, dataset.tokenizer, "validation")


def find_reference(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    runtime: Runtime,
    on_progress: Callable[[str, int, int | None], None],
) -> Reference | None:
    """Return the reference of a run on preferences, whose figures are kept in the dataset's folder; None where none is.

    It is the model that training starts from; every rank calls this.
    """
    if recipe.data.kind != "preferences" or not LOSSES[recipe.preferences.loss].needs_reference:
        return None
    start = open_start(recipe) if runtime.world.is_main else None
    return open_reference(start and start.model, dataset, folder, runtime, on_progress)


def identity(dataset: Dataset, reference: Reference | None) -> str:
    """Return what a run trains on, and beside which reference, as a hash that its checkpoints keep."""
    if reference is None:
        return dataset.identity
    return hashlib.sha256(f"{dataset.identity} {reference.fingerprint}".encode()).hexdigest()


class FixedValidation(NamedTuple):
    """The validation of a run, and its entropy floor where that is known (nats per token)."""

    score: Callable[[], Scored]
    floor: float | None


def fixed_validation(
    dataset: Dataset, recipe: Recipe, state: TrainState, reference: Reference | None = None
) -> FixedValidation:
    """Choose the documents to validate on, the same each time."""
    settings, pad_id = recipe.train, dataset.tokenizer.pad_id
    model, runtime = state.parallel.model, state.parallel.runtime
    rows_at_once = settings.micro_batch_size or settings.batch_size
    if recipe.data.kind == "preferences":
        pairs = PackedConversations(dataset.validation, settings.context, 0, pad_id, group=2)
        rows = PreferenceRows(pairs, reference and reference.validation)
        objective = Preferences(recipe.preferences)
        return FixedValidation(lambda: score_preferences(model, rows, rows_at_once, objective, runtime), None)
    documents = WholeDocuments(
        dataset.validation, settings.context, rows_at_once, pad_id or 0, settings.validation_tokens
    )
    complete = documents.documents == dataset.validation.documents
    floor = dataset.floor_nats / documents.targets if dataset.floor_nats is not None and complete else None
    text_bytes = documents.bytes if dataset.lossless else None
    return FixedValidation(lambda: score(model, documents, text_bytes, runtime), floor)


class Job(NamedTuple):
    """What a run trains on and minimizes, and how it is validated."""

    rows: RowStream
    objective: Objective
    validate: Callable[[], Scored]
    floor: float | None = None  # of the validation loss, where it is known
    close: Callable[[], None] = lambda: None


def open_job(
    recipe: Recipe, dataset: Dataset, state: TrainState, reference: Reference | None, reply: ReplyFunction | None
) -> Job:
    """Open what the kind of data decides; `reply` answers prompts, whose replies earn rewards."""
    if recipe.data.kind != "prompts":
        validation = fixed_validation(dataset, recipe, state, reference)
        rows = training_rows(dataset, recipe, reference)
        return Job(rows, build_objective(recipe), validation.score, validation.floor)
    assert reply is not None, "rewards need a function that answers prompts"
    start = open_start(recipe)
    assert start is not None, "rewards need a model to start from"
    rewards = open_rewards(recipe.rewards, recipe.train, dataset, state, start.model, reply)
    return Job(rewards.rows, rewards.objective, rewards.validate, close=rewards.close)
