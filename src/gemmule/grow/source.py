"""What is known of a text: its size before it is read, and beginnings of its documents afterwards."""

from collections.abc import Iterator, Sequence

from gemmule.data.corpus import Corpus
from gemmule.data.dataset import Dataset
from gemmule.data.discovery import find_files
from gemmule.data.sources import LocalSource, StorybookSource, parse_source

_STORY_BYTES = 800
_PROMPT_TOKENS, _PROMPTS = 8, 2


def size_of(sources: Sequence[str]) -> int | None:
    """Return the bytes of the files of SOURCEs, as they are stored; None where that is unknown before they are read."""
    total = 0
    for text in sources:
        source = parse_source(text)
        if isinstance(source, LocalSource):
            total += sum(file.stat().st_size for file in find_files(source.path))
        elif isinstance(source, StorybookSource):
            total += _STORY_BYTES * source.stories("train")
        else:
            return None
    return total


def choose_prompts(dataset: Dataset) -> list[str]:
    """Return the first words of a few held-out documents, for samples during training."""
    found = dict.fromkeys(text for text in _beginnings(dataset.validation, dataset) if text)
    return list(found)[:_PROMPTS]


def _beginnings(corpus: Corpus, dataset: Dataset) -> Iterator[str]:
    step = max(1, corpus.documents // (4 * _PROMPTS))
    for number in range(0, corpus.documents, step):
        tokens = corpus.read(number, 0, _PROMPT_TOKENS).tolist()
        text = dataset.tokenizer.decode(tokens).splitlines()
        yield text[0].strip() if text else ""
