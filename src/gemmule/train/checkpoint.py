"""Checkpoints: everything a run needs to go on as if it had never stopped, written aside and renamed.

A checkpoint is a model folder with two more kinds of files: what the optimizers remember, and `state.json`, where the
run stands and the sha256 of every file. Data order and dropout are pure functions of (seed, step), so the step is all
that has to be kept of them. Tensors go through torch.distributed.checkpoint (`storage.py`), so any number of processes
reads what any other number wrote.
"""

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from gemmule.errors import CheckpointError, OutputError
from gemmule.files import aside_of, put_in_place, sha256
from gemmule.formats.config_json import write_json
from gemmule.formats.folder import save_settings
from gemmule.formats.names import foreign_names
from gemmule.formats.safetensors_reader import INDEX, split_piece_name
from gemmule.recipe import Settings
from gemmule.tokenizer import Tokenizer
from gemmule.train.metrics import Level
from gemmule.train.optim import Updater
from gemmule.train.parallel import Parallel
from gemmule.train.storage import Reader, Writer, headers, kind_of


class Position(Settings):
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    # Targets trained on so far.
    tokens: int = 0
    # Steps whose loss or gradient was not finite, and from which nothing was learned.
    skipped: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float = 0.0
    # What the loss has been lately.
    level: Level = Level()
    # How much of metrics.jsonl belongs to the steps up to here.
    metrics_bytes: int = 0
    samples_bytes: int = 0


class _State(Settings):
    format: Literal[2] = 2
    position: Position
    # Of the position as JSON, and of every other file by its name.
    position_sha256: str
    sha256: dict[str, str]


class Saver:
    """Writes the checkpoints of a run, one at a time, while training goes on.

    Every process of the world calls the same methods in the same order.
    """

    def __init__(
        self,
        run: Path,
        parallel: Parallel,
        tokenizer: Tokenizer,
        updater: Updater,
        keep: int,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._parallel, self._tokenizer, self._updater = run, parallel, tokenizer, updater
        self._keep, self._say = keep, say
        self._writing: tuple[int, Future[Any]] | None = None

    def save(self, position: Position) -> None:
        """Copy the state of this moment and begin to write `checkpoints/step-00000500`, whole or not at all.

        The one before it is finished first; where it failed for want of space or rights, the run is told and goes on.
        """
        try:
            self.finish()
        except OutputError as error:
            self._say(f"a checkpoint could not be written, the ones before it are kept and the run goes on: {error}")
        folder = _folder(self._run, position.step)
        if self._parallel.world.first:
            shutil.rmtree(aside_of(folder), ignore_errors=True)  # a process that was killed may have left it
        writer = Writer(folder, partial(self._complete, folder, position))
        state = _contents(self._parallel, self._updater)
        future = async_save(state, storage_writer=writer, process_group=self._parallel.world.patient)
        assert isinstance(future, Future)
        self._writing = (position.step, future)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole; OutputError where it could not be."""
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except CheckpointException as error:
            if self._parallel.world.first:
                shutil.rmtree(aside_of(_folder(self._run, step)), ignore_errors=True)
            reasons = [failure[0] for failure in error.failures.values()]
            raise next((reason for reason in reasons if isinstance(reason, OutputError)), reasons[0]) from error

    def _complete(self, folder: Path, position: Position, digests: dict[str, str]) -> None:
        """Add what is not a tensor, give the folder its name, and remove what need not be kept."""
        aside = aside_of(folder)
        save_settings(self._parallel.model, self._tokenizer, aside)
        if not (aside / "model.safetensors").exists():
            place = {name: file.name for file, name, *_ in headers(aside) if kind_of(name) == "model"}
            write_json(aside / INDEX, {"metadata": {}, "weight_map": place})
        digests |= {file.name: sha256(file) for file in sorted(aside.iterdir()) if file.name not in digests}
        state = _State(position=position, position_sha256=_digest(position), sha256=digests)
        (aside / "state.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        put_in_place(aside, folder)
        prune_checkpoints(self._run, self._keep, position)


def load_checkpoint(folder: Path, parallel: Parallel, updater: Updater) -> Position:
    """Put model and optimizers where the checkpoint left them; CheckpointError if a file is missing or damaged."""
    world = parallel.world
    position = world.agree(verify_checkpoint(folder) if world.first else Position())
    try:
        names = {split_piece_name(stored)[0] for _, stored, *_ in headers(folder)}
        updater.expect(name for name in sorted(names) if kind_of(name) == "optimizer")
        state = _contents(parallel, updater)
        load(state, storage_reader=Reader(folder), process_group=world.patient)
    except (SafetensorError, OSError, KeyError, CheckpointException) as error:
        raise CheckpointError(f"{folder}: does not fit this run ({error})") from None
    return position


def _contents(parallel: Parallel, updater: Updater) -> dict[str, Tensor]:
    """Name every tensor of a run: weights as Hugging Face does, what optimizers remember as `parameter/quantity`."""
    model = parallel.model
    names = dict(foreign_names(model.config.num_hidden_layers, model.config.tie_word_embeddings))
    weights = {names[ours]: parameter.detach() for ours, parameter in model.named_parameters()}
    return weights | updater.state()


def verify_checkpoint(folder: Path) -> Position:
    """Check every file of a checkpoint against its sha256 and return where the run stands."""
    try:
        state = _State.model_validate_json((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint, it has no state.json") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: damaged: {error}") from None
    if _digest(state.position) != state.position_sha256:
        raise CheckpointError(f"{folder / 'state.json'}: damaged, its position does not fit its sha256")
    for name, expected in state.sha256.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing from the checkpoint")
        if sha256(file) != expected:
            raise CheckpointError(f"{file}: damaged, its sha256 is not the one in state.json")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in state.sha256:
            raise CheckpointError(f"{file}: is not of this checkpoint, state.json does not name it")
    return state.position


def checkpoints(run: Path) -> list[Path]:
    """List a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and what is wrong with each newer one."""
    damage: list[str] = []
    for folder in checkpoints(run):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            damage.append(str(error))
        else:
            return folder, damage
    return None, damage


def prune_checkpoints(run: Path, keep: int, position: Position) -> None:
    """Of a run's checkpoints up to a position, remove all but the newest `keep` and the best one.

    Those beyond it are damaged, or the run would stand there; counting them could cost the good ones.
    """
    past = [folder for folder in checkpoints(run) if folder <= _folder(run, position.step)]
    for folder in past[keep:]:
        if position.best_step is None or folder != _folder(run, position.best_step):
            shutil.rmtree(folder, ignore_errors=True)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _digest(position: Position) -> str:
    return hashlib.sha256(position.model_dump_json().encode()).hexdigest()
