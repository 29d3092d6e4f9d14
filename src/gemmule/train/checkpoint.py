"""Checkpoints: everything a run needs to go on as if it had never stopped, written aside and renamed.

A checkpoint is a model folder with two more files: `optimizer.safetensors`, what the optimizers remember, and
`state.json`, where the run stands and the sha256 of every file. Data order and dropout are pure functions of
(seed, step), so the step is all that has to be kept of them.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemmule.errors import CheckpointError
from gemmule.files import folder_written_aside
from gemmule.formats.folder import read_tensors, save_folder
from gemmule.model.gemma3 import Gemma3
from gemmule.recipe import Settings
from gemmule.tokenizer import Tokenizer
from gemmule.train.optim import Updater


class Position(Settings):
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    # Targets trained on so far.
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float = 0.0
    # How much of metrics.jsonl belongs to the steps up to here.
    metrics_bytes: int = 0
    samples_bytes: int = 0


class _State(Settings):
    format: Literal[1] = 1
    position: Position
    # Of the position as JSON, and of every other file by its name.
    position_sha256: str
    sha256: dict[str, str]


def save_checkpoint(run: Path, model: Gemma3, tokenizer: Tokenizer, updater: Updater, position: Position) -> Path:
    """Write `checkpoints/step-00000500` of a run folder, whole or not at all, and return it."""
    folder = _folder(run, position.step)
    with folder_written_aside(folder) as aside:
        save_folder(model, tokenizer, aside)
        save_file({key: tensor.cpu() for key, tensor in updater.state().items()}, aside / "optimizer.safetensors")
        digests = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        state = _State(position=position, position_sha256=_digest(position), sha256=digests)
        (aside / "state.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


def load_checkpoint(folder: Path, model: Gemma3, updater: Updater) -> Position:
    """Put model and optimizers where the checkpoint left them; CheckpointError if a file is missing or damaged."""
    position = verify_checkpoint(folder)
    try:
        remembered = load_file(folder / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / 'optimizer.safetensors'}: cannot be read: {error}") from None
    model.load_state_dict(read_tensors(folder, model))
    updater.restore(remembered)
    return position


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
        if _sha256(file) != expected:
            raise CheckpointError(f"{file}: damaged, its sha256 is not the one in state.json")
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


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
