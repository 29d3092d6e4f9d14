"""What tests of several packages share; tiny models are in `tiny.py`, so that torch is loaded only where needed."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES

# A busy machine is not a failure.
settings.register_profile("gemmule", deadline=None)
settings.load_profile("gemmule")

# To models this small a second thread is no help, and on a busy machine the two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# nohup and a shell's background jobs ignore these, and child processes would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What Gemmule logs in the test, from INFO up."""
    logged: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("gemmule")
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A vocabulary of 380 ids trained on a few sentences."""
    return train_tokenizer(SENTENCES, vocab_size=380)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that trains a small model in a second."""
    import runs

    return runs.write_recipe_file(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """The run folder of `tiny_recipe`, trained to its end; shared, so leave it as it is."""
    import runs

    folder = tmp_path_factory.mktemp("run") / "tiny"
    assert runs.gemmule("train", tiny_recipe, "--out", folder).code == 0
    return folder
