import math
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
from torch.nn import functional

from gemmule.data.settings import DataSettings
from gemmule.errors import RecipeError, SourceError
from gemmule.evaluate import log_probabilities
from gemmule.evaluate import text as text_module
from gemmule.evaluate.text import Progress, Window, score_text
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES
from tiny import lively_model, tiny_config


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return lively_model(tiny_config(vocab_size=380, max_position_embeddings=256))


@pytest.fixture
def text(tmp_path: Path) -> DataSettings:
    """Documents of uneven length, one of them blank, spaced so that only stripping makes them what they are."""
    documents = [" ".join(SENTENCES[: 1 + number % 3]) for number in range(9)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([*documents[:4], "  ", *documents[4:]]) + "\n")
    return DataSettings(train=str(tmp_path / "text.txt"))


def figures_of(
    model: Gemma3,
    tokenizer: Tokenizer,
    settings: DataSettings,
    documents: int | None = None,
    progress: Progress = lambda *_: None,
    **window: int,
) -> dict[str, float]:
    """Score a text; return the figures over all of it."""
    scores = score_text(model, tokenizer, settings, documents, Window(**window), progress)
    figures = scores.figures() | {"dropped": scores.dropped}
    return {name: figure for name, figure in figures.items() if name not in ("ends", "without_ends")}


def documents_of(settings: DataSettings) -> list[str]:
    texts = Path(settings.train[0]).read_text().split(settings.separator)
    return [text.strip() for text in texts if text.strip()]


def nats_by_hand(model: Gemma3, ids: list[int]) -> float:
    """Predict every id but the first from all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))
    return functional.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="sum").item()


def test_each_document_is_predicted_alone_from_bos_to_eos(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    rows = tiny_tokenizer.encode_documents(documents_of(text))
    figures = figures_of(model, tiny_tokenizer, text, batch_size=3)
    nats = sum(nats_by_hand(model, ids) for ids in rows)
    tokens, size = sum(len(ids) - 1 for ids in rows), sum(len(each.encode()) for each in documents_of(text))
    assert (figures["documents"], figures["tokens"], figures["bytes"]) == (9, tokens, size)
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_longer_documents_are_cut_and_every_token_still_counts(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    rows = tiny_tokenizer.encode_documents(documents_of(text))
    figures = figures_of(model, tiny_tokenizer, text, context=10)
    pieces = [ids[start : start + 11] for ids in rows for start in range(0, len(ids) - 1, 10)]
    assert figures["tokens"] == sum(len(ids) - 1 for ids in rows)
    expected = sum(nats_by_hand(model, piece) for piece in pieces) / figures["tokens"]
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)


def test_without_a_context_the_model_is_not_asked_beyond_its_reach(
    tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    short = lively_model(tiny_config(vocab_size=380, max_position_embeddings=16))
    assert figures_of(short, tiny_tokenizer, text) == pytest.approx(figures_of(short, tiny_tokenizer, text, context=16))


def test_a_whole_book_is_cut_before_it_takes_all_memory(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("\n".join(SENTENCES * 2))
    book = DataSettings(train=str(tmp_path / "book.txt"))
    model = lively_model(tiny_config(vocab_size=380, max_position_embeddings=100_000, num_hidden_layers=2))
    lengths: set[int] = set()

    def watch(_module: Gemma3, arguments: tuple[torch.Tensor, ...]) -> None:
        lengths.add(arguments[0].shape[1])

    model.register_forward_pre_hook(watch)
    tokens = len(tiny_tokenizer.encode_documents([(tmp_path / "book.txt").read_text()])[0])
    assert figures_of(model, tiny_tokenizer, book)["tokens"] == tokens - 1 > 2048
    assert lengths == {2048}


def test_the_first_documents_are_taken(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    figures = figures_of(model, tiny_tokenizer, text, documents=2)
    assert figures["documents"] == 2
    assert figures["bytes"] == sum(len(each.encode()) for each in documents_of(text)[:2])


def test_progress_counts_batches(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    seen: list[tuple[str, int, int | None]] = []
    figures_of(model, tiny_tokenizer, text, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [("predicting", number, None) for number in range(len(seen))]
    assert len(seen) > 1


def test_a_text_in_portions_costs_what_it_does_in_one(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = figures_of(model, tiny_tokenizer, text)
    seen: list[int] = []
    monkeypatch.setattr(text_module, "_PORTION", 60)
    portions = figures_of(model, tiny_tokenizer, text, progress=lambda _, batch, __: seen.append(batch))
    assert portions == pytest.approx(whole, rel=1e-6)
    assert seen == list(range(len(seen)))
    assert len(seen) > 1


# Cleaned as for training.


def test_text_is_cleaned_as_for_training_and_what_is_dropped_is_said(
    messages: list[str], model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clean = [f"Mia said it\u2019s so, {number} times.\nAnd so it was." for number in range(200)]
    (tmp_path / "clean.txt").write_text("<|endoftext|>".join(clean), encoding="utf-8")
    dirty = [text.replace("\n", "\r\n").encode() for text in clean]
    dirty[7] = clean[7].encode().decode("cp1252").encode()  # read wrongly, once
    dirty[9:9] = [b" \r\n ", b"\xff"]
    (tmp_path / "dirty.txt").write_bytes(b"\r\n<|endoftext|>\r\n".join(dirty))
    expected, found = (
        figures_of(model, tiny_tokenizer, DataSettings(train=str(tmp_path / name)))
        for name in ("clean.txt", "dirty.txt")
    )
    assert found == expected | {"dropped": 2}
    assert messages == ["of 202 documents, dropped: 1 not UTF-8, 1 empty; 1 repaired: cp1252 mojibake"]


def test_filters_apply_as_they_do_in_training(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    longest = max(map(len, documents_of(text)))
    figures = figures_of(model, tiny_tokenizer, text.replace(min_characters=longest))
    assert (figures["documents"], figures["dropped"]) == (3, 7)
    with pytest.raises(SourceError, match=r"there is no text to predict \(dropped: 1 empty, 9 too short\)"):
        figures_of(model, tiny_tokenizer, text.replace(min_characters=10_000))


def test_text_in_another_encoding_is_refused(model: Gemma3, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"good\n<|endoftext|>\nb\xe4d\n")
    with pytest.raises(SourceError, match=r"text\.txt: not UTF-8: 1 of 2 documents, the first at byte 20"):
        figures_of(model, tiny_tokenizer, DataSettings(train=str(tmp_path / "text.txt")))


def test_a_separator_that_does_not_occur_is_said(
    messages: list[str], model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings
) -> None:
    figures_of(model, tiny_tokenizer, text.replace(separator="%"), context=64)
    assert messages == [f"the separator '%' does not occur in {text.train[0]}: it is read as one document"]


# Bits per byte.


def lossy(normalizer: tokenizers.normalizers.Normalizer) -> Tokenizer:
    """Return a byte-level tokenizer that changes the text first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({token: n for n, token in enumerate([*alphabet, "</s>"])}, []))
    library.normalizer = normalizer
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    return Tokenizer(library.to_str(), {})


@pytest.mark.parametrize("change", [tokenizers.normalizers.Lowercase(), tokenizers.normalizers.NFKC()])
def test_a_tokenizer_that_changes_text_has_no_bits_per_byte(
    messages: list[str], change: tokenizers.normalizers.Normalizer, model: Gemma3, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("all the same<|endoftext|>A \ufb01ne day<|endoftext|>\ufb01ne", encoding="utf-8")
    figures = figures_of(model, lossy(change), DataSettings(train=str(tmp_path / "text.txt")))
    assert figures["bits_per_byte"] is None
    assert math.isfinite(figures["loss"])
    changed = 1 if isinstance(change, tokenizers.normalizers.Lowercase) else 2
    assert messages[-1].startswith(f"no bits per byte: the tokenizer changes {changed} of 3 documents")
    (tmp_path / "text.txt").write_text("all the same<|endoftext|>and this", encoding="utf-8")
    assert figures_of(model, lossy(change), DataSettings(train=str(tmp_path / "text.txt")))["bits_per_byte"] > 0


# Rows.


def test_a_context_beyond_the_model_is_refused(model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings) -> None:
    with pytest.raises(RecipeError, match=r"--context = 257: the model reads at most 256 tokens"):
        figures_of(model, tiny_tokenizer, text, context=257)


def test_rows_are_as_long_as_documents_need_and_batches_have_few_of_long_ones(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = " ".join(SENTENCES[:4])
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([document] * 30 + SENTENCES[:40]))
    data = DataSettings(train=str(tmp_path / "text.txt"))
    longest = len(tiny_tokenizer.encode_documents([document])[0]) - 1
    model = lively_model(tiny_config(vocab_size=380, max_position_embeddings=1_000_000))
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    monkeypatch.setattr(text_module, "_SHORT", 0)
    monkeypatch.setattr(text_module, "_TOKENS_ON_CPU", 5 * longest + 1)
    expected = figures_of(model, tiny_tokenizer, data, context=100_000)
    assert set(shapes[:-1]) == {(5, longest)}
    shapes.clear()
    assert figures_of(model, tiny_tokenizer, data, batch_size=9) == pytest.approx(expected, rel=1e-5)
    assert set(shapes[:-1]) == {(9, longest)}


def test_short_documents_share_longer_rows_and_cost_the_same(
    model: Gemma3, tiny_tokenizer: Tokenizer, text: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: set[int] = set()
    handle = model.register_forward_pre_hook(lambda _, given: shapes.add(given[0].shape[1]))
    shared = score_text(model, tiny_tokenizer, text, window=Window(context=20))
    monkeypatch.setattr(text_module, "_SHORT", 0)
    alone = score_text(model, tiny_tokenizer, text, window=Window(context=20))
    handle.remove()
    assert shapes == {30, 20}
    assert shared.nats == pytest.approx(alone.nats, rel=1e-5)


def test_rows_read_in_chunks_cost_what_they_do_read_at_once(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>".join([" ".join(SENTENCES[:9]), *SENTENCES[:40]]))
    data = DataSettings(train=str(tmp_path / "text.txt"))
    model = lively_model(tiny_config(vocab_size=380, max_position_embeddings=1000))
    whole = figures_of(model, tiny_tokenizer, data)
    monkeypatch.setattr(log_probabilities, "LONGEST_ROW", 50)
    monkeypatch.setattr(log_probabilities, "_CHUNK", 37)
    assert figures_of(model, tiny_tokenizer, data, context=1000) == pytest.approx(whole, rel=1e-5)


# The model is replaced, as what it takes does not depend on the text: it finds every token certain.
MEMORY = """
import sys
sys.path[:0] = sys.argv[3:]
import numpy as np
import torch
from pathlib import Path
from gemmule.data.settings import DataSettings
from gemmule.evaluate import text as text_module
from gemmule.evaluate.log_probabilities import TargetScores
from gemmule.processes import peak_memory
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

def certain(model, batches):
    for batch in batches:
        targets = int((batch.targets >= 0).sum())
        yield TargetScores(np.zeros(targets, dtype=np.float32), np.ones(targets, dtype=bool))

torch.set_num_threads(1)
text_module.score_batches = certain
model = lively_model(tiny_config(vocab_size=393, max_position_embeddings=256, num_hidden_layers=1))
settings = DataSettings(train=sys.argv[1])
figures = text_module.score_text(model, Tokenizer.load(Path(sys.argv[2])), settings).figures()
print(figures["documents"], figures["tokens"], peak_memory() >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_text_takes_little_more_memory_than_a_small_one(tmp_path: Path) -> None:
    words = [letter * 32 for letter in string.ascii_lowercase[:20]]  # soon one token each
    train_tokenizer([" ".join(words) + " 0123456789\n"] * 2, 262 + 31 + 5 * 20).save(tmp_path)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}  # whose memory varies
    found = []
    for documents in (10_000, 20_000):
        with (tmp_path / "text.txt").open("w") as file:
            for number in range(documents):
                file.write(
                    f"{SENTENCES[number % len(SENTENCES)]}\n{SENTENCES[number % 7] * 2} {number % 1000}\n{number}"
                )
                file.write("<|endoftext|>")
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "text.txt"), str(tmp_path), *sys.path]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(Measured(*map(int, ended.stdout.split())))
    small, large = found
    assert (large.documents, large.tokens > 5e6) == (20_000, True)
    # One MiB more was seen: 73 where the whole text was encoded at once, 90 where its tokens were kept as lists, and 18
    # where they were kept in int64.
    assert large.mebibytes < small.mebibytes + 10, found


class Measured(NamedTuple):
    documents: int
    tokens: int
    mebibytes: int
