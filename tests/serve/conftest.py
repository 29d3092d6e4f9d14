"""A server on loopback with a tiny model, in a thread of this process, shared by the tests of a module."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Served, save_model, serving

from gemmule.tokenizer import Tokenizer
from gemmule.train.checkpoint import checkpoints


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model folder that chats; what it says is nonsense."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Served]:
    """A server with the tiny model under the name "tiny"."""
    with serving(model_folder, chat=True) as served:
        yield served


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model that goes on for long."""
    return save_model(tmp_path_factory.mktemp("models") / "story", tiny_tokenizer, context=4096)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "other", tiny_tokenizer, context=4096, seed=7)


@pytest.fixture(scope="module")
def stage(story: Path, other: Path) -> Iterator[Served]:
    """Two models that chat."""
    with serving(story, other, chat=True) as served:
        yield served


@pytest.fixture
def may_load() -> Callable[[str], bool]:
    """Whether an address is the server's; tests without a server of their own load nothing else."""
    return lambda url: url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:")) or url == "data:,"


@pytest.fixture
def may_say() -> Callable[[str], bool]:
    """Chromium itself reports requests that fail, which the tests of keys and of a stopped server cause."""
    return lambda line: line.startswith("Failed to load resource") and ("401" in line or "ERR_CONNECTION" in line)


@pytest.fixture
def young_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run that has its oldest checkpoint alone; the others lie beside it."""
    copy = tmp_path / "young"
    shutil.copytree(tiny_run, copy)
    for checkpoint in checkpoints(copy)[:-1]:
        checkpoint.rename(tmp_path / checkpoint.name)
    return copy
