"""Checkpoints: everything that an exact resume needs, written atomically in the background.

A checkpoint is a model folder, or of a run that trains an adapter the folder of that, with two more kinds of files: the
optimizer state, and `state.json` with the position and the sha256 of every file. Data order and dropout are pure
functions of (seed, step), so the step is all that they need. Tensors go through torch.distributed.checkpoint
(`storage.py`), so a checkpoint written by any number of ranks is read by any other number.
"""

import hashlib
import logging
import re
import shutil
from concurrent.futures import Future
from contextlib import suppress
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
from gemmule.files import as_output_error, atomic_replace, partial_folder, reason_of, remove, sha256
from gemmule.formats.adapter import adapter_tensors, base_sha256, save_adapter_config
from gemmule.formats.config_json import write_json
from gemmule.formats.folder import save_settings
from gemmule.formats.names import tensor_name_pairs
from gemmule.formats.safetensors_reader import INDEX, split_slice_name
from gemmule.run_folder import RunFolder
from gemmule.settings import Settings
from gemmule.tokenizer import Tokenizer
from gemmule.train.state import Position, TrainState
from gemmule.train.storage import Reader, Writer, headers, kind_of

log = logging.getLogger(__name__)


class _State(Settings):
    format: Literal[2, 3] = 3
    position: Position
    # What the run trains on (`Dataset.identity`); not known of checkpoints of format 2.
    data: str | None = None
    # Of the position as JSON, and of every other file by its name.
    position_sha256: str
    sha256: dict[str, str]


class Saver:
    """Writes the checkpoints of a run in the background, one at a time, while training continues.

    Every rank calls the same methods in the same order.
    """

    def __init__(
        self, run: RunFolder, state: TrainState, tokenizer: Tokenizer, keep: int, data: str | None = None
    ) -> None:
        self._run, self._state, self._tokenizer = run, state, tokenizer
        self._keep, self._data = keep, data
        self._writing: tuple[int, Future[Any]] | None = None
        self._failure: OutputError | None = None  # of the newest checkpoint

    def wait_for_save(self) -> bool:
        """Wait for the checkpoint that is being written; log an error and return False where it failed."""
        try:
            self._wait()
        except OutputError as error:
            self._failure = error
            log.error(f"a checkpoint could not be written; earlier ones are kept and the run continues: {error}")
            return False
        return True

    def save(self, position: Position) -> None:
        """Copy the state and start writing `checkpoints/step-00000500`, which appears atomically.

        Waits for the checkpoint before it; where that one failed, an error is logged and the run continues.
        """
        self.wait_for_save()
        self._failure = None
        folder = self._run.checkpoint(position.step)
        if self._state.parallel.world.is_main:
            with suppress(OSError):  # a process that was killed may have left it
                remove(partial_folder(folder))
        writer = Writer(folder, partial(self._complete, folder, position))
        state = _tensors(self._state)
        future = async_save(state, storage_writer=writer, process_group=self._state.parallel.world.checkpoint_group)
        assert isinstance(future, Future)
        self._writing = (position.step, future)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole; OutputError where the newest could not be."""
        self._wait()
        if self._failure is not None:
            raise self._failure

    def _wait(self) -> None:
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except CheckpointException as error:
            if self._state.parallel.world.is_main:
                shutil.rmtree(partial_folder(self._run.checkpoint(step)), ignore_errors=True)
            reasons = [failure[0] for failure in error.failures.values()]
            raise next((reason for reason in reasons if isinstance(reason, OutputError)), reasons[0]) from error
        except OSError as error:  # of torch's own, before anything is written
            raise OutputError(f"{self._run.checkpoint(step)}: {reason_of(error)}") from error

    def _complete(self, folder: Path, position: Position, digests: dict[str, str]) -> None:
        """Add what is not a tensor, give the folder its name, and remove what need not be kept."""
        temporary = partial_folder(folder)
        with as_output_error(folder):
            if (adapter := self._state.adapter) is not None:
                save_adapter_config(adapter.lora, adapter.base, temporary)
                self._tokenizer.save(temporary)
            else:
                save_settings(self._state.parallel.model, self._tokenizer, temporary)
            if adapter is None and not (temporary / "model.safetensors").exists():
                files = {name: file.name for file, name, *_ in headers(temporary) if kind_of(name) == "model"}
                write_json(temporary / INDEX, {"metadata": {}, "weight_map": files})
            digests |= {file.name: sha256(file) for file in sorted(temporary.iterdir()) if file.name not in digests}
            position = Position.model_validate(position.model_dump())  # so that every field counts as set
            state = _State(position=position, data=self._data, position_sha256=_digest(position), sha256=digests)
            (temporary / "state.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
            atomic_replace(temporary, folder, replace=True)
        prune_checkpoints(self._run.path, self._keep, position)


def load_checkpoint(folder: Path, state: TrainState, data: str | None = None) -> None:
    """Load weights, optimizer state and position of a checkpoint into `state`.

    CheckpointError if a file is missing or damaged, or if the run trained on other data than `data` until then.
    """
    world = state.parallel.world
    position = world.broadcast(verify_checkpoint(folder, data) if world.is_main else Position())
    if (adapter := state.adapter) is not None and (known := base_sha256(folder)) != adapter.base.sha256:
        raise CheckpointError(
            f"{folder}: its adapter was trained on another base than train.start leads to now (SHA-256 {known}, not "
            f"{adapter.base.sha256}); bring that back, or name another folder for a new run"
        )
    try:
        names = {split_slice_name(stored)[0] for _, stored, *_ in headers(folder)}
        state.optimizers.allocate_state(name for name in sorted(names) if kind_of(name) == "optimizer")
        load(_tensors(state), storage_reader=Reader(folder), process_group=world.checkpoint_group)
    except (SafetensorError, OSError, KeyError, CheckpointException) as error:
        raise CheckpointError(f"{folder}: does not fit this run ({error})") from None
    state.position = position


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Name every tensor of a run: weights as Hugging Face does, optimizer state as `parameter/quantity`."""
    model = state.parallel.model
    if state.adapter is not None:
        return adapter_tensors(model) | state.optimizers.state_dict()
    names = dict(tensor_name_pairs(model.config.num_hidden_layers, model.config.tie_word_embeddings))
    weights = {names[ours]: parameter.detach() for ours, parameter in model.named_parameters()}
    return weights | state.optimizers.state_dict()


def verify_checkpoint(folder: Path, data: str | None = None, weights_only: bool = False) -> Position:
    """Check the files of a checkpoint against their sha256 and return its position; optimizer state is optional.

    CheckpointError names what is missing or damaged; OtherDataError where the run trained on other data than `data`.
    """
    try:
        state = _State.model_validate_json((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint, it has no state.json") from None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: damaged: {error}") from None
    if _digest(state.position) != state.position_sha256:
        raise CheckpointError(f"{folder / 'state.json'}: damaged, its position does not fit its sha256")
    for name, expected in state.sha256.items():
        if weights_only and name.startswith("optimizer"):
            continue
        file = folder / name
        try:
            found = sha256(file)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: is missing from the checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if found != expected:
            raise CheckpointError(f"{file}: damaged, its sha256 is not the one in state.json")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in state.sha256:
            raise CheckpointError(f"{file}: is not of this checkpoint, state.json does not name it")
    if data is not None and state.data is not None and state.data != data:
        raise OtherDataError(
            f"{folder}: the run was trained on other data, with another tokenizer, or beside another reference "
            "(train.start) than now; bring those back, or name another folder for a new run"
        )
    return state.position


class OtherDataError(CheckpointError):
    """The prepared data of a run were replaced; no older checkpoint would help."""


def checkpoints(run: Path) -> list[Path]:
    """List a run's checkpoints, newest first; folders of other names, such as copies, do not count."""
    entries = _entries(RunFolder(run).checkpoints)
    found = [(int(name[1]), folder) for folder in entries if (name := _NAME.fullmatch(folder.name))]
    return [folder for _, folder in sorted(found, reverse=True)]


_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def newest_checkpoint(run: Path, data: str | None = None, weights_only: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest good checkpoint, and what is wrong with each newer one; `weights_only` ignores optimizer state.

    OtherDataError where the run trained on other data than `data`.
    """
    damage: list[str] = []
    for folder in checkpoints(run):
        try:
            verify_checkpoint(folder, data, weights_only)
        except OtherDataError:
            raise
        except CheckpointError as error:
            damage.append(str(error))
        else:
            return folder, damage
    return None, damage


def prune_checkpoints(run: Path, keep: int, position: Position) -> None:
    """Of a run's checkpoints up to a position, keep the newest `keep`, the best one and the newest known to be finite.

    Weights may be finite and so large that no gradient is, which the next step shows; the one before is then needed.
    Checkpoints beyond the position are damaged, or the run would stand there; counting them could cost the good ones.
    """
    steps = {int(folder.name.removeprefix("step-")): folder for folder in checkpoints(run)}
    past = [step for step in steps if step <= position.step]
    finite = [step for step in past if position.last_finite_step is not None and step <= position.last_finite_step]
    for step in {*past[keep:]} - {position.best_step, *finite[:1]}:
        shutil.rmtree(steps[step], ignore_errors=True)


def _digest(position: Position) -> str:
    # Of what the file says alone, so that fields that a later version adds change nothing.
    return hashlib.sha256(position.model_dump_json(exclude_unset=True).encode()).hexdigest()
