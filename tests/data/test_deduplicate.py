import math
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemmule.data.clean import text_key
from gemmule.data.deduplicate import label_documents
from gemmule.data.intermediate import IntermediateShard, IntermediateWriter
from gemmule.data.labels import Label
from gemmule.data.settings import DataSettings

T, V, D, S, ND, NS, _ = Label


def settings(**chosen: object) -> DataSettings:
    return DataSettings.model_validate({"train": "unused", "validation": "unused", **chosen})


def write_part(folder: Path, name: str, texts: list[str], known: bool = False) -> IntermediateShard:
    with IntermediateWriter(folder, name, with_signatures=True) as part:
        for text in texts:
            part.append(text, text_key(text), -1.0 if known else None)
    return IntermediateShard(folder, name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def labels(folder: Path, held: list[list[str]], learned: list[list[str]], **chosen: object) -> list[int]:
    parts = [
        [write_part(folder, f"{split}-{number}", texts) for number, texts in enumerate(units)]
        for split, units in (("validation", held), ("train", learned))
    ]
    return label_documents(*parts, settings(**chosen)).tolist()


def test_duplicates_are_dropped_across_units_and_train_does_without_what_is_in_validation(folder: Path) -> None:
    validation, train = [["a", "b", "a"]], [["c", "b", "c"], ["c", "d", "a"]]
    assert labels(folder, validation, train) == [V, V, D, T, S, D, D, T, S]


@given(documents=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), cuts=st.sets(st.integers(0, 30)))
def test_fates_are_those_of_reading_in_order(folder: Path, documents: list[str], cuts: set[int]) -> None:
    border = len(documents) // 3
    places = sorted({0, border, len(documents), *(cut for cut in cuts if cut < len(documents))})
    units = [(start, documents[start:stop]) for start, stop in pairwise(places)]
    validation = [texts for start, texts in units if start < border]
    seen: dict[str, int] = {}
    expected = []
    for number, text in enumerate(documents):
        before = seen.setdefault(text, number)
        kept, shared = (V, D) if number < border else (T, S if before < border else D)
        expected.append(kept if before == number else shared)
    assert labels(folder, validation, [texts for start, texts in units if start >= border]) == expected


def test_what_is_held_out_is_decided_by_the_text_and_leaves_no_copy_in_train(folder: Path) -> None:
    texts = [f"story {number}" for number in range(500)]
    found = labels(folder, [], [texts, texts[::-1]], validation=None, holdout=0.2)
    assert 70 < found.count(V) < 130
    assert found[500:] == [D] * 500


def test_texts_of_known_probability_are_kept_as_often_as_they_come(folder: Path) -> None:
    told = write_part(
        folder, "known", ["a", "a", "once upon a time there was", "once upon a time there is"], known=True
    )
    plain = write_part(folder, "plain", ["a", "b"])
    chosen = settings(near_duplicates=0.6)
    assert label_documents([], [told, plain], chosen).tolist() == [T, T, T, T, D, T]
    assert label_documents([plain], [told], chosen).tolist() == [V, V, S, S, T, T]


def story(draw: random.Random, words: int = 120) -> list[str]:
    return ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(words)]


def changed(words: list[str], places: list[int]) -> str:
    return " ".join("other" if place in places else word for place, word in enumerate(words))


def test_near_duplicates_and_what_nearly_is_in_validation_are_dropped(folder: Path) -> None:
    draw = random.Random(1)
    one, two, three = story(draw), story(draw), story(draw)
    near, far = [60], [*range(0, 120, 3)]
    validation = [[changed(one, []), changed(one, near)]]
    train = [[changed(two, []), changed(one, [20])], [changed(two, near), changed(two, far), changed(three, [])]]
    assert labels(folder, validation, train, near_duplicates=0.8) == [V, ND, T, NS, ND, T, T]
    assert labels(folder, validation, train) == [V, V, T, T, T, T, T]


def test_a_near_duplicate_is_never_held_out_while_train_has_the_other(folder: Path) -> None:
    draw = random.Random(2)
    pairs = [(changed(words, []), changed(words, [7])) for words in (story(draw) for _ in range(100))]
    found = labels(
        folder, [], [[a for a, _ in pairs], [b for _, b in pairs]], validation=None, holdout=0.5, near_duplicates=0.8
    )
    assert found.count(V) > 20
    assert found[100:] == [ND] * 100


def test_nearly_all_near_duplicates_are_found_and_nothing_else(folder: Path) -> None:
    """Groups of like texts among texts that share words: recall at the threshold's far side, precision on the near."""
    draw = random.Random(3)
    texts, group = [], []
    for number in range(150):
        words = story(draw)
        for _ in range(3):
            texts.append(changed(words, [draw.randrange(120)]))  # a similarity of about 0.86
            group.append(number)
        texts.append(changed(words, list(range(0, 120, 2))))  # far from them
        group.append(-1)
    found = labels(folder, [], [texts], near_duplicates=0.75)
    kept: defaultdict[int, int] = defaultdict(int)
    for owner, label in zip(group, found, strict=True):
        kept[owner] += label == T
    assert kept.pop(-1) == 150
    assert sum(kept.values()) <= 150 * 1.05
    assert min(kept.values()) == 1


def test_a_part_gives_back_what_was_written(folder: Path) -> None:
    texts = ["one", "zwölf", "", "three\nlines"]
    with IntermediateWriter(folder, "back", with_signatures=False) as writer:
        for number, text in enumerate(texts):
            writer.append(text, number, None if number % 2 else -float(number))
    part = IntermediateShard(folder, "back")
    assert [d.text for d in part.texts(np.ones(4, bool))] == texts
    assert [d.text for d in part.texts(np.array([False, True, False, True]))] == ["zwölf", "three\nlines"]
    assert part.sizes().tolist() == [3, 6, 0, 11]
    assert (writer.documents, writer.bytes) == (4, 20)
    assert [math.isnan(chance) for chance in part.log_probabilities()] == [False, True, False, True]
