"""A server on loopback with a tiny model, in a thread of this process, shared by the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served, save_model, serving

from gemmule.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A model folder that chats; what it says is nonsense."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Served]:
    """A server with the tiny model under the name "tiny"."""
    with serving(model_folder, chat=True) as served:
        yield served
