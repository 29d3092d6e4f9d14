"""What the kind of data decides: the training rows, the objective, and the validation of a run."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemmule.data.batches import RowStream
from gemmule.data.dataset import Dataset
from gemmule.data.packing import MixedRows, PackedConversations, PackedRows, WholeDocuments
from gemmule.errors import RecipeError
from gemmule.runtime import Runtime
from gemmule.settings import Problem
from gemmule.train.objective import NextToken, Objective
from gemmule.train.preferences import LOSSES, PreferenceRows, Preferences, score_preferences
from gemmule.train.recipe import Recipe
from gemmule.train.reference import Reference, open_reference
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
    corpora, tokenizer = dataset.mixture(recipe.data.weights), dataset.tokenizer
    packed: list[RowStream] = []
    for corpus, _ in corpora:
        if recipe.data.kind == "text":
            packed.append(PackedRows(corpus, context, seed, masked, tokenizer.bos_id))
        elif recipe.data.kind == "preferences":
            pairs = PackedConversations(corpus, context, seed, tokenizer.pad_id, group=2)
            packed.append(PreferenceRows(pairs, reference and reference.train))
        else:
            packed.append(PackedConversations(corpus, context, seed, tokenizer.pad_id))
    return MixedRows(packed, [weight for _, weight in corpora]) if recipe.data.weights else packed[0]


def check_kind(dataset: Dataset, recipe: Recipe) -> None:
    """Raise RecipeError where a dataset was prepared for another kind of data than the recipe trains on."""
    masked = dataset.train.shards[0].mask is not None
    if masked != (recipe.data.kind != "text"):
        prepared = "has a loss mask, so it is no text" if masked else "is text, without a loss mask"
        raise RecipeError(str(Problem("data.kind", recipe.data.kind, f"the dataset {prepared}; prepare it again")))


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
