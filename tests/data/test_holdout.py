"""What is held out where no validation text is given: documents, or the ends of a few long ones."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data import sources
from gemmule.data.dataset import Dataset
from gemmule.data.labels import divide_document
from gemmule.data.prepare import prepare_dataset
from gemmule.data.settings import DataSettings
from gemmule.errors import SourceError
from gemmule.tokenizer import Tokenizer, TokenizerSettings
from messages import logged

pytestmark = pytest.mark.usefixtures("without_plots")

VOCABULARY = TokenizerSettings(vocab_size=320)
WORDS = "the fox ran over hills and far away to find its little den warm dry under oak trees by a stream".split()  # noqa: SIM905


def book(paragraphs: int, seed: int = 0, between: str = "\n\n") -> str:
    draw = random.Random(seed)
    return between.join(f"{n} {' '.join(draw.choices(WORDS, k=draw.randint(20, 60)))}." for n in range(paragraphs))


def prepare(folder: Path, *texts: str, **settings: object) -> tuple[Dataset, list[str]]:
    (folder / "texts").mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    chosen = DataSettings.model_validate({"train": str(folder / "texts"), **settings})
    with logged() as said:
        return prepare_dataset(chosen, VOCABULARY, folder / f"out{len(list(folder.iterdir()))}"), said


def decoded(dataset: Dataset, split: str) -> list[str]:
    corpus = getattr(dataset, split)
    return [dataset.tokenizer.decode(corpus.read(number, 0, 10**7).tolist()) for number in range(corpus.documents)]


def test_the_end_of_a_single_book_is_held_out(tmp_path: Path) -> None:
    text = book(400)
    dataset, said = prepare(tmp_path, text)
    [train], [validation] = decoded(dataset, "train"), decoded(dataset, "validation")
    assert f"{train}\n\n{validation}" == text
    assert 0.01 * len(text) <= len(validation) <= 0.02 * len(text)
    assert said[-1] == "data.holdout = 0.01: 1 document, too few to hold out whole ones, so its end will be held out"
    report = dataset.report
    assert (report.train.read, report.train.kept, report.validation.read, report.validation.kept) == (1, 1, 1, 1)
    assert report.validation.source == "held out of train: the ends of 1 document"
    assert report.train.bytes + report.validation.bytes == len(text) - 2


def test_the_ends_of_a_few_long_files_are_held_out(tmp_path: Path) -> None:
    books = [book(80, seed) for seed in range(100, 117)]
    dataset, said = prepare(tmp_path, *books)
    train, validation = decoded(dataset, "train"), decoded(dataset, "validation")
    assert [[*one.split(), *other.split()] for one, other in zip(train, validation, strict=True)] == [
        text.split() for text in books
    ]
    assert "17 documents, too few to hold out whole ones, so the ends of 17 long ones will be held out" in said[-1]


def test_enough_documents_are_held_out_whole(tmp_path: Path) -> None:
    texts = [book(1, seed) for seed in range(300)]
    dataset, said = prepare(tmp_path, "<|endoftext|>".join(texts), holdout=0.05)
    assert sorted(decoded(dataset, "train") + decoded(dataset, "validation")) == sorted(texts)
    assert said == []


def test_far_more_than_the_share_is_not_held_out(tmp_path: Path) -> None:
    """A document that falls into the share by its text, and is most of the corpus, is divided instead."""
    parts = [book(120, seed) for seed in range(40, 43)]
    for share in (0.01, 0.1, 0.3, 0.5, 0.9):
        dataset, _ = prepare(tmp_path, *parts, holdout=share)
        held = dataset.report.validation.bytes / (dataset.report.validation.bytes + dataset.report.train.bytes)
        assert held <= min(10 * share, (1 + share) / 2) + 0.01, share
        assert dataset.report.train.kept > 0


def test_what_is_held_out_does_not_depend_on_who_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.txt").write_text(book(80, seed))
    settings = DataSettings(train=str(folder))
    monkeypatch.setattr(sources, "UNIT", 20_000)
    for name, workers in (("one", 1), ("two", 2)):
        prepare_dataset(settings, VOCABULARY, tmp_path / name, workers=workers)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@given(
    text=st.lists(st.sampled_from(["word", "a", "\n", "\n\n", " ", ". "]), min_size=1, max_size=80).map("".join),
    share=st.floats(0.001, 0.999),
)
def test_a_document_is_divided_where_something_ends(text: str, share: float) -> None:
    text = text.strip()
    if len(text) < 2:
        return
    train, validation = divide_document(text, share)
    assert train
    assert validation
    assert train == train.rstrip()
    assert validation == validation.lstrip()
    assert text.startswith(train)
    assert text.endswith(validation)
    assert not text[len(train) : len(text) - len(validation)].strip()


def test_paragraphs_are_preferred_to_lines_and_these_to_words() -> None:
    assert divide_document("aaaa bb\n\ncc\ndd", 0.4) == ("aaaa bb", "cc\ndd")
    assert divide_document("aaaa bb\ncc\ndd", 0.4) == ("aaaa bb", "cc\ndd")
    assert divide_document("aaaa bb cc dd", 0.3) == ("aaaa bb", "cc dd")
    assert divide_document("a" * 10, 0.3) == ("a" * 7, "a" * 3)


# What does not work says what does.


@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["one short document"] * 1, 0.01),
        ([book(1)], 0.01),
        ([book(1), book(1, 1)], 0.001),
        ([f"short text {n}" for n in range(4)], 0.0001),
        ([f"short text {n}" for n in range(2)], 0.999),
    ],
)
def test_a_share_that_is_advised_works(
    texts: list[str], share: float, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        prepare(tmp_path, *texts, holdout=share)
    sentence = str(caught.value)
    assert sentence.startswith(f"data.holdout = {share:g}: does not divide {len(texts)} document")
    assert "data.validation" in sentence
    assert "data.separator" in sentence
    if advised := re.search(r"use data\.holdout = ([\d.]+),", sentence):
        settings = DataSettings(train=str(tmp_path / "texts"), holdout=float(advised[1]))
        tiny_tokenizer.save(tmp_path / "tokenizer")
        vocabulary = TokenizerSettings(path=str(tmp_path / "tokenizer"))
        made = prepare_dataset(settings, vocabulary, tmp_path / "advised")
        assert made.train.documents
        assert made.validation.documents
    else:
        assert len(texts) == 1


def test_stories_of_known_probability_stay_whole(tmp_path: Path) -> None:
    settings = DataSettings(train="storybook:20", holdout=0.001)
    with pytest.raises(SourceError, match=r"does not divide 20 documents .* use data\.holdout = 0\.\d+, "):
        prepare_dataset(settings, VOCABULARY, tmp_path / "out")


@pytest.mark.parametrize("seed", range(2))
def test_of_a_hundred_short_documents_at_least_one_is_held_out(tmp_path: Path, seed: int) -> None:
    """Of which none may be chosen by its text alone, at 1 %: once in three times."""
    dataset, _ = prepare(tmp_path, *(book(3, 1000 * seed + number) for number in range(100)))
    assert 1 <= dataset.validation.documents <= 8
    assert dataset.train.documents + dataset.validation.documents == 100
