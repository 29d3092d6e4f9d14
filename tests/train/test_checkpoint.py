import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gemmule
from damage import damaged
from gemmule.distributed import process_group
from gemmule.errors import CheckpointError, OutputError
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.run_folder import RunFolder
from gemmule.tokenizer import Tokenizer
from gemmule.train.checkpoint import (
    Saver,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
)
from gemmule.train.optim import OPTIMIZERS, Optimizers, OptimizerSettings
from gemmule.train.parallel import unwrapped
from gemmule.train.state import Position, TrainState
from tiny import greatest_difference, some_tokens, tiny_config

SHAPE = tiny_config(vocab_size=380)  # of the tiny tokenizer


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """Checkpoints are agreed on, if only with oneself."""
    with process_group(torch.device("cpu")):
        yield


def save_checkpoint(run: Path, state: TrainState, tokenizer: Tokenizer, position: Position) -> Path:
    """Write one and wait for it."""
    saver = Saver(RunFolder(run), state, tokenizer, keep=9)
    saver.save(position)
    saver.finish()
    return run / "checkpoints" / f"step-{position.step:08d}"


def trained(name: str = "muon", steps: int = 3) -> TrainState:
    model = Gemma3(SHAPE)
    init_weights(model, seed=0)
    optimizers = Optimizers(model, OptimizerSettings.model_validate({"name": name}))
    for step in range(steps):
        model(some_tokens(SHAPE, seed=step)).square().mean().backward()
        optimizers.step()
        optimizers.zero_grad()
    return TrainState(unwrapped(model), optimizers)


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Path:
    """A run with checkpoints of steps 3 and 4."""
    for steps in (3, 4):
        state = trained(steps=steps)
        save_checkpoint(tmp_path, state, tiny_tokenizer, Position(step=steps, tokens=10 * steps))
    return tmp_path


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_checkpoint_restores_everything_bit_for_bit(tmp_path: Path, tiny_tokenizer: Tokenizer, name: str) -> None:
    state = trained(name)
    position = Position(
        step=3, tokens=78, best_step=2, best_loss=1 / 3, seconds=0.1 + 0.2, metrics_bytes=17, samples_bytes=4
    )
    folder = save_checkpoint(tmp_path, state, tiny_tokenizer, position)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    fresh = trained(name, steps=0)
    load_checkpoint(folder, fresh)
    assert fresh.position == position
    weights, moments = fresh.parallel.model.state_dict(), fresh.optimizers.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in state.parallel.model.state_dict().items())
    assert moments.keys() == state.optimizers.state_dict().keys()
    assert all(torch.equal(value, moments[key]) for key, value in state.optimizers.state_dict().items())


def test_a_checkpoint_is_a_model_folder(run: Path, tiny_tokenizer: Tokenizer) -> None:
    model, tokenizer = gemmule.load(run / "checkpoints" / "step-00000003")
    expected = trained(steps=3).parallel.model
    tokens = some_tokens(SHAPE)
    assert greatest_difference(model(tokens), expected.eval()(tokens)) == 0
    assert tokenizer.encode("Tom found") == tiny_tokenizer.encode("Tom found")


def test_checkpoints_are_listed_newest_first(run: Path) -> None:
    (run / "checkpoints" / ".step-00000005.partial").mkdir()  # a kill leaves it
    for copy in ("step-best", "step-9", "step-00000009-copy", "step-0000000\u0669"):  # letters sort after digits
        shutil.copytree(run / "checkpoints" / "step-00000003", run / "checkpoints" / copy)
    assert [folder.name for folder in checkpoints(run)] == ["step-00000004", "step-00000003"]
    assert newest_checkpoint(run) == (run / "checkpoints" / "step-00000004", [])


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == (None, [])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_every_file_of_a_checkpoint_is_among_those_that_are_damaged_here(run: Path) -> None:
    assert sorted(file.name for file in (run / "checkpoints" / "step-00000004").iterdir()) == FILES


def test_a_damaged_checkpoint_is_named_and_passed_over(run: Path) -> None:
    newest, older = run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000003"
    cases = set()
    for name, how in damaged(newest, older):
        cases.add(f"{name}: {how}")
        with pytest.raises(CheckpointError, match="step-00000004"):
            verify_checkpoint(newest)
        good, sentences = newest_checkpoint(run)
        assert good == older, cases
        assert ["step-00000004" in sentence for sentence in sentences] == [True]
        assert name in sentences[0] or name == "state.json", "what is flipped there may be another file's name"
    assert len(cases) >= 100
    assert newest_checkpoint(run) == (newest, [])


def test_foreign_files_and_folders_are_named(run: Path) -> None:
    newest, older = run / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000003"
    shutil.copy(older / "model.safetensors", newest / "model-00002-of-00002.safetensors")  # would be read as a piece
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: is not of this checkpoint"):
        verify_checkpoint(newest)
    later = run / "checkpoints" / "step-00000005"
    shutil.copytree(newest, later)
    (later / "state.json").unlink()  # a model folder that somebody put there
    (run / "checkpoints" / "step-00000006").write_text("no folder")
    (run / "checkpoints" / "step-00000007").mkdir()
    good, sentences = newest_checkpoint(run)
    assert good == older
    assert [sentence.partition("step-0000000")[2][0] for sentence in sentences] == ["7", "6", "5", "4"]


def test_a_whole_checkpoint_of_another_model_is_refused(run: Path) -> None:
    other = Gemma3(SHAPE.replace(intermediate_size=44))
    state = TrainState(unwrapped(other), Optimizers(other, OptimizerSettings.model_validate({"name": "muon"})))
    with pytest.raises(CheckpointError, match="step-00000004: does not fit this run"):
        load_checkpoint(run / "checkpoints" / "step-00000004", state)


def test_no_changed_bit_of_the_state_goes_unnoticed(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004"
    state = newest / "state.json"
    whole, position = state.read_bytes(), verify_checkpoint(newest)
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1
        state.write_bytes(changed)
        try:
            assert verify_checkpoint(newest) == position
        except CheckpointError:
            continue


def test_when_all_checkpoints_are_damaged_each_is_named(run: Path) -> None:
    for folder in checkpoints(run):
        flip(folder / "model.safetensors")
    good, sentences = newest_checkpoint(run)
    assert good is None
    assert [name in sentence for name, sentence in zip(("4/model", "3/model"), sentences, strict=True)] == [True, True]


def test_loading_checks_first(run: Path) -> None:
    newest = run / "checkpoints" / "step-00000004"
    flip(newest / "optimizer.safetensors")
    state = trained(steps=0)
    model = state.parallel.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: damaged"):
        load_checkpoint(newest, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    def left(keep: int, best: int | None, step: int = 500, finite: int | None = None) -> list[int]:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        for saved in (100, 200, 300, 400, 500):
            (tmp_path / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True)
        prune_checkpoints(tmp_path, keep, Position(step=step, best_step=best, last_finite_step=finite))
        return sorted(int(folder.name.removeprefix("step-")) for folder in checkpoints(tmp_path))

    assert left(keep=2, best=None) == [400, 500]
    assert left(keep=2, best=None, finite=499) == [400, 500]
    assert left(keep=1, best=None, finite=499) == [400, 500], "weights of the newest may be broken"
    assert left(keep=1, best=None, finite=250) == [200, 500], "steps from 251 on were skipped"
    assert left(keep=1, best=None, finite=500) == [500]
    assert left(keep=2, best=200) == [200, 400, 500]
    assert left(keep=2, best=500) == [400, 500]
    assert left(keep=1, best=50) == [500]
    assert left(keep=9, best=200) == [100, 200, 300, 400, 500]
    # 400 and 500 were damaged, so that the run went back to 200 and has come to 300 again.
    assert left(keep=1, best=None, step=300) == [300, 400, 500]
    assert left(keep=2, best=100, step=300) == [100, 200, 300, 400, 500]


def test_a_full_disk_keeps_the_checkpoint_before(
    run: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = trained(steps=5)
    monkeypatch.setattr(os, "fsync", refuse)
    for step in (4, 5):  # over one that is there, and anew
        with pytest.raises(OutputError, match="no space left on the device"):
            save_checkpoint(run, state, tiny_tokenizer, Position(step=step))
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert verify_checkpoint(run / "checkpoints" / "step-00000004").tokens == 40


def test_a_checkpoint_takes_the_place_of_a_damaged_one(run: Path, tiny_tokenizer: Tokenizer) -> None:
    flip(run / "checkpoints" / "step-00000004" / "model.safetensors")
    state = trained(steps=4)
    save_checkpoint(run, state, tiny_tokenizer, Position(step=4))
    assert newest_checkpoint(run) == (run / "checkpoints" / "step-00000004", [])


def test_nothing_of_a_checkpoint_is_pickled(run: Path) -> None:
    for file in (run / "checkpoints" / "step-00000004").iterdir():
        assert file.suffix in (".json", ".safetensors")
