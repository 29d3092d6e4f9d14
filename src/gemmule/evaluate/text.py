"""How well a model predicts a text, document by document."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from gemmule.data import Corpus, DataSettings
from gemmule.data.batches import Batch, WholeDocuments
from gemmule.data.corpus import CorpusWriter, open_corpus
from gemmule.data.sources import read_sources
from gemmule.errors import SourceError
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import choose_precision
from gemmule.tokenizer import Tokenizer
from gemmule.train.validation import score

_AT_ONCE = 256  # documents that are encoded together
_LONGEST_ROW = 2048  # tokens, where nobody says otherwise: attention takes memory with the square


def score_text(
    model: Gemma3,
    tokenizer: Tokenizer,
    settings: DataSettings,
    documents: int | None = None,
    context: int | None = None,
    batch_size: int = 16,
    progress: Callable[[str, int, int | None], None] = lambda *_: None,
) -> dict[str, float | int]:
    """Score the documents of `settings.train` (all, or the first so many), each one on its own; in fp32 on a CPU.

    Documents longer than `context` (by default the longest one, up to 2048) are cut into pieces.
    Returns loss in nats per token, bits_per_byte, perplexity, and the tokens, bytes and documents they are means of.
    """
    device = model.embedding.weight.device
    precision = "fp32" if device.type == "cpu" else choose_precision("auto", device)
    with TemporaryDirectory() as folder:
        corpus = _encode(_texts(settings, documents), tokenizer, Path(folder))
        if corpus is None:
            raise SourceError(f"{', '.join(settings.train)}: there is no text to predict")
        reach = context or min(int(corpus.lengths.max()) - 1, model.config.max_position_embeddings, _LONGEST_ROW)
        batches = WholeDocuments(corpus, reach, batch_size, tokenizer.pad_id)

        def watched() -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                progress("predicting", number, len(batches))
                yield batch

        result = score(model, watched(), batches.bytes, precision)
    return {**result.figures(), "tokens": result.tokens, "bytes": result.bytes, "documents": corpus.documents}


def _texts(settings: DataSettings, count: int | None) -> Iterator[str]:
    for document in islice(read_sources(settings.train, settings, "validation"), count):
        if not isinstance(document.text, str):
            raise SourceError(
                f"{', '.join(settings.train)}: a document is not UTF-8; `gemmule prepare` would leave it out"
            )
        if document.text.strip():
            yield document.text.strip()


def _encode(texts: Iterator[str], tokenizer: Tokenizer, folder: Path) -> Corpus | None:
    """Write the texts, if there are any, to a corpus on disk, so that memory does not grow with them."""
    first_bytes = tokenizer.token_bytes()
    with CorpusWriter(folder, "text", tokenizer.fingerprint, tokenizer.vocab_size) as writer:
        while portion := list(islice(texts, _AT_ONCE)):
            for text, ids in zip(portion, tokenizer.encode_documents(portion), strict=True):
                writer.append(ids, len(text.encode()) - first_bytes[ids[0]])
    return open_corpus(folder, writer.names, tokenizer.fingerprint) if writer.names else None
