import random
import shutil
from pathlib import Path

import pytest

from gemmule.data.corpus import Corpus, CorpusWriter, open_corpus

BOS, EOS = 2, 1


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Forty documents of 2 to 20 tokens out of the 48 that the tiny model knows; a token tells much about the next."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    with CorpusWriter(folder, "train", "ab" * 32, vocab_size=48) as writer:
        for _ in range(40):
            token = draw.randrange(3, 48)
            ids = [BOS] + [token := 3 + (2 * token + draw.randrange(3)) % 45 for _ in range(draw.randrange(19))] + [EOS]
            writer.append(ids, text_bytes=3 * (len(ids) - 2))
    return open_corpus(folder, writer.names, "ab" * 32)


@pytest.fixture(scope="module")
def start(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a trained model, which may be changed or removed."""
    return shutil.copytree(tiny_run / "model", tmp_path_factory.mktemp("start") / "model")
