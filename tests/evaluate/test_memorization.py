"""What a model copies from its training text, beside held-out text: counted by hand, and of two models."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from gemmule.data.dataset import Dataset
from gemmule.data.encode import EncodedText
from gemmule.data.report import CorpusReport
from gemmule.errors import DatasetError
from gemmule.evaluate.memorization import (
    Comparison,
    CopiedText,
    Memorization,
    generate_texts,
    memorization_of_run,
    training_data,
)
from gemmule.evaluate.overlap import Spans, Vocabulary, words_of
from gemmule.evaluate.results import read_evaluations
from gemmule.evaluate.text import EncodedDocuments
from gemmule.run_folder import RunFolder
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import lively_model, tiny_config

RECIPE = """
[tokenizer]
vocab_size = 320

[model]
hidden_size = 48
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 24
sliding_window = 64

[train]
steps = 120
batch_size = 8
context = 64
validate_every = 15
checkpoint_every = 120
sample_tokens = 4
device = "cpu"
precision = "fp32"

[optimizer]
name = "muon"
learning_rate = 0.02
adamw_learning_rate = 0.01
"""

WORDS = (
    ("Mia", "Tom", "the owl", "Ana", "the miller", "a fox"),
    ("found", "lost", "hid", "carried", "painted", "sold"),
    ("a red kite", "the silver key", "two eggs", "a drum", "the old boat", "a blue hat"),
    ("in the garden", "by the river", "at the market", "on the hill", "under the bridge", "near the mill"),
)


def documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    sentences = [" ".join(map(draw.choice, WORDS)) for _ in range(3 * count)]
    return [f"{'. '.join(sentences[at : at + 3])}." for at in range(0, len(sentences), 3)]


@pytest.fixture(scope="module")
def memorized(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run that repeated four documents some two hundred times, and what was printed meanwhile."""
    folder = tmp_path_factory.mktemp("memorized")
    for name, texts in (("train", documents(4, seed=0)), ("valid", documents(40, seed=1))):
        (folder / f"{name}.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    data = f'[data]\ntrain = "{folder / "train.txt"}"\nvalidation = "{folder / "valid.txt"}"\n'
    (folder / "recipe.toml").write_text(data + RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # whose curves nobody looks at
        ended = gemmule("train", folder / "recipe.toml", "--out", folder / "run")
    assert ended.code == 0, ended.err
    return RunFolder(folder / "run"), ended.err


def test_a_model_that_repeats_its_documents_is_found_out(memorized: tuple[RunFolder, str], tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(memorized[0].path, tmp_path / "run")))
    found = memorization_of_run(run, device="cpu")
    assert found.texts == 20
    assert found.generated.share is not None
    assert found.held_out.share is not None
    assert found.generated.share > 0.8
    assert found.held_out.share < 0.2
    assert found.generated.longest_span > 2 * found.held_out.longest_span > 0
    assert found.more_than_held_out
    assert any(found.generated.span in " ".join(words_of(text)) for text in documents(4, seed=0))
    assert found.held_out.words == found.generated.words
    (kept,) = read_evaluations(run)
    assert (kept["kind"], kept["model"]) == ("memorization", "model")
    assert kept["memorization"]["generated"]["longest_span"] == found.generated.longest_span
    assert kept["memorization"]["more_than_held_out"] is True


def test_overfitting_is_reported_while_it_happens(memorized: tuple[RunFolder, str]) -> None:
    lines = memorized[1].splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("overfitting: "))
    assert "train.early_stopping" in lines[at]
    assert any(line.startswith("step 120/120") for line in lines[at:])
    assert any(line.startswith("step 105/120") for line in lines[at:]), "and not at its end alone"


def test_a_model_that_has_learned_nothing_has_memorized_nothing(memorized: tuple[RunFolder, str]) -> None:
    run = memorized[0]
    dataset = training_data(run)
    model = lively_model(tiny_config(vocab_size=dataset.tokenizer.vocab_size))
    texts = generate_texts(model, dataset.tokenizer, run)
    found = Comparison([f"{text} and nothing of this is in the text" for text in texts], dataset).search()
    assert (found.texts, found.generated.copied_ngrams, found.generated.longest_span) == (20, 0, 0)
    assert found.held_out.longest_span > 5
    assert found.more_than_held_out is False
    assert str(found).startswith("memorization: 0.0% of the 8-grams in 20 generated texts occur in the training text (")
    assert str(found).endswith("; the share is not above that of held-out text")


@pytest.fixture
def dataset_of(tiny_tokenizer: Tokenizer) -> Callable[[list[str], list[str]], Dataset]:
    """Make a dataset in memory of training and validation documents."""

    def made(train: list[str], valid: list[str]) -> Dataset:
        rows = (tiny_tokenizer.encode_documents(texts) for texts in (train, valid))
        one, other = (EncodedDocuments([EncodedText(ids, 0, 0, True) for ids in split]) for split in rows)
        return Dataset(one, other, tiny_tokenizer, cast(CorpusReport, None), None, ())

    return made


DatasetOf = Callable[[list[str], list[str]], Dataset]
TRAIN = ["one two three four five six seven eight nine ten eleven twelve", "the cat sat on the mat"]


def test_figures_are_those_of_a_count_by_hand(dataset_of: DatasetOf) -> None:
    valid = ["a b c d e f g h i j one two three four five six seven eight nine", "a b c d e f", "g h"]
    dataset = dataset_of(TRAIN, valid)
    texts = ["Well, two three four five six seven eight nine ten! And so on it went.", "The cat sat on the mat", "no"]
    found = Comparison(texts, dataset).search()
    # 15 words with 8 spans of 8, of which 2 occur: "two ... nine" and "three ... ten"; the others have 6 words and 1.
    assert found.generated == CopiedText(22, 8, 2, 9, "two three four five six seven eight nine ten")
    # 15 words of the first document have 8 spans, and none occurs; 6 of the second, 1 of the third.
    assert found.held_out == CopiedText(22, 8, 0, 5, "one two three four five")
    assert found.difference is not None
    assert (found.difference.difference, found.difference.interval) == (0.25, None)
    assert (found.more_than_held_out, found.searched) == (None, 1.0)
    assert str(found) == (
        "memorization: 25.0% of the 8-grams in 3 generated texts occur in the training text (0.0% of those in held-out "
        "text); the longest copied span has 9 words (5 in held-out text); "
        "whether that is more than in held-out text is not known: it "
        "needs 10 texts of 8 words"
    )


def test_held_out_text_is_as_long_and_begins_with_documents_of_its_own(dataset_of: DatasetOf) -> None:
    letters = [f"{letter}{number}" for letter in "abcdefgh" for number in range(10)]
    valid = [" ".join(letters[at : at + 10]) for at in range(0, 80, 10)]
    dataset = dataset_of(TRAIN, valid)

    def held_out(*lengths: int) -> list[str]:
        return Comparison([" ".join(["x"] * length) for length in lengths], dataset).texts[len(lengths) :]

    assert held_out(3, 4) == ["a0 a1 a2", "e0 e1 e2 e3"], "from all over the split"
    assert held_out(12, 4) == [valid[0], "e0 e1", "e2 e3 e4 e5"], "no text reaches from one document into the next"
    assert sum(len(text.split()) for text in held_out(*[8] * 10)) == 80, "what is left of documents is used as well"
    assert [len(text.split()) for text in held_out(*[10] * 16)] == [5] * 16, "shorter ones where the split is smaller"
    assert held_out() == held_out(0) == []


def test_one_pass_serves_other_spans_as_well(dataset_of: DatasetOf) -> None:
    dataset = dataset_of(TRAIN, ["some other text"])
    vocabulary, steps = Vocabulary(), list[str]()
    spans = Spans(vocabulary)
    for text in (f"{TRAIN[0]} the end", " ".join(TRAIN)):
        spans.add(text)
    Comparison([TRAIN[1]], dataset, vocabulary).search(lambda label, *_: steps.append(label), spans)
    assert spans.overlapping().tolist() == [False, False], "12 words are too few"
    assert steps == ["searching the training data"]


def test_what_cannot_be_compared_is_said(dataset_of: DatasetOf) -> None:
    dataset = dataset_of(TRAIN, ["some other text"])
    short = Comparison(["the cat sat on"] * 12, dataset).search()
    assert str(short) == (
        "memorization: not measured, for 12 generated texts without 8 words in a row have nothing to compare"
    )
    assert (short.figures()["generated"]["share"], short.difference, short.more_than_held_out) == (None, None, None)
    alone = Comparison([TRAIN[0]] * 12, dataset).search()
    assert str(alone) == (
        "memorization: 100.0% of the 8-grams in 12 generated texts occur in the training text (held-out text is too "
        "short to compare with); the longest copied span has 12 words (fewer than 5 in held-out text)"
    )
    assert str(Comparison([], dataset).search()).endswith(
        "the tokenizer begins no text with bos, from which to generate one"
    )


def test_a_run_without_its_training_data_says_so(memorized: tuple[RunFolder, str], tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(memorized[0].path, tmp_path / "run")))
    shutil.rmtree(run.data)
    with pytest.raises(
        DatasetError, match=r"memorization: not measured, for the training data of .*run is not at hand"
    ):
        memorization_of_run(run)
    assert not run.evaluation.exists()


def test_training_data_is_found_where_the_recipe_names_a_prepared_dataset(
    memorized: tuple[RunFolder, str], tmp_path: Path
) -> None:
    run = RunFolder(Path(shutil.copytree(memorized[0].path, tmp_path / "run")))
    run.data.rename(tmp_path / "prepared")
    recipe = run.recipe.read_text(encoding="utf-8").splitlines()
    lines = [line for line in recipe if not line.startswith(("validation = ", "train = "))]
    lines.insert(lines.index("[data]") + 1, f'train = "{tmp_path / "prepared"}"')
    run.recipe.write_text("\n".join(lines), encoding="utf-8")
    assert training_data(run).train.documents == 4


@pytest.mark.parametrize(
    ("shares", "said"), [((0.5, 0.1), " percentage points above that of held-out text"), ((0.1, 0.1), "is not above")]
)
def test_more_is_said_only_where_the_interval_tells(
    shares: tuple[float, float], said: str, dataset_of: DatasetOf
) -> None:
    draw = random.Random(0)
    spans = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(8)) for _ in range(200)]
    new = [" ".join(f"n{draw.randrange(10**6)}" for _ in range(8)) for _ in range(400)]

    def texts(share: float) -> list[str]:
        return [
            " ".join(spans[draw.randrange(200)] if draw.random() < share else new.pop() for _ in range(5))
            for _ in range(20)
        ]

    generated, held_out = map(texts, shares)
    found = Comparison(generated, dataset_of(spans, held_out)).search()
    assert said in str(found)
    assert found.more_than_held_out == (shares[0] > shares[1])


def test_the_figures_are_plain_json() -> None:
    nothing = CopiedText(0, 0, 0, 0, "")
    assert Memorization(0, nothing, nothing, None, 1.0).figures()["held_out"] == {
        "share": None, "words": 0, "ngrams": 0, "copied_ngrams": 0, "longest_span": 0, "span": "",
    }  # fmt: skip
