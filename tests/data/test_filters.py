import pytest

from gemmule.data.filters import FILTERS, QUALITY, reason_to_drop
from gemmule.data.report import SplitReport
from gemmule.data.settings import DataSettings
from gemmule.errors import RecipeError
from gemmule.settings import check_recipe
from gemmule.storybook import stories

PROSE = "Once upon a time there was a fox. It ran over the hills, far away, and found a den under an old oak tree."

BAD = {
    "few_letters": "12.5 17.25 | 19 20 21 2024-11-25 08:15 0.001 3 4 5 a b",
    "odd_words": "aGVsbG8gd29ybGQgdGhpcyBpcyBhIGtleQ MIIEvQIBADANBgkqhkiGw0BAQEFAASC",
    "many_symbols": "<div class=x> <p> hello #fox #den #hill {a: b} <br> read more </p> </div>",
    "repeated_lines": "\n".join(["Home", "About us", "Home", "Log in", "Home", "Log in", "Contact us today"]),
    "repeated_phrases": "I think that I know. " * 12,
}

GOOD = {
    "english": PROSE,
    "german": "Die Donaudampfschifffahrtsgesellschaft beschäftigt Kapitäne, die sehr freundlich und hilfsbereit sind.",
    "chinese": "从前有一只狐狸，它跑过山丘，去了很远的地方，在一棵老橡树下找到了一个温暖的窝。它很高兴。",
    "japanese": "昔々、あるところに狐がいました。狐は丘を越えて遠くへ走り、古い樫の木の下に巣を見つけました。",
    "thai": "กาลครั้งหนึ่งมีสุนัขจิ้งจอกตัวหนึ่ง มันวิ่งข้ามเนินเขาไปไกลและพบโพรงใต้ต้นโอ๊กเก่าแก่",
    "hindi": "एक समय की बात है, एक लोमड़ी थी। वह पहाड़ियों के पार दूर तक दौड़ी और एक पुराने पेड़ के नीचे घर मिला।",
    "russian": "Жила-была лиса. Она бежала через холмы, далеко-далеко, и нашла нору под старым дубом.",
    "poem": "The fox ran far,\nthe fox ran fast,\nand under the oak\nit slept at last.",
    "one word": "Hello",
}


def settings(**chosen: object) -> DataSettings:
    return check_recipe({"train": "unused", **chosen}, DataSettings, "here")


@pytest.mark.parametrize("reason", QUALITY)
def test_each_sign_of_bad_quality_is_seen(reason: str) -> None:
    assert reason_to_drop(BAD[reason], settings(quality=True)) == reason
    assert reason_to_drop(BAD[reason], settings()) is None


@pytest.mark.parametrize("language", GOOD)
def test_prose_of_any_language_is_good(language: str) -> None:
    assert reason_to_drop(GOOD[language], settings(quality=True)) is None


def test_stories_are_good() -> None:
    assert {reason_to_drop(story.text, settings(quality=True)) for story in stories(200, 0)} == {None}


def test_length_is_counted_in_characters() -> None:
    bounds = settings(min_characters=3, max_characters=5)
    found = [reason_to_drop("é" * length, bounds) for length in (2, 3, 5, 6)]
    assert found == ["too_short", None, None, "too_long"]


def test_patterns_keep_and_drop() -> None:
    assert reason_to_drop(PROSE, settings(drop_matching="o[ax]k")) == "unwanted"
    assert reason_to_drop(PROSE, settings(drop_matching="^oak")) is None
    assert reason_to_drop(PROSE, settings(keep_matching="fox|hare")) is None
    assert reason_to_drop(PROSE, settings(keep_matching="hare")) == "unwanted"


def test_every_filter_is_counted_in_the_report() -> None:
    assert {*FILTERS, *QUALITY} <= set(SplitReport.model_fields)
    assert set(BAD) == set(QUALITY)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"drop_matching": "(fox"}, r'drop_matching = "\(fox": is not a regular expression: missing \)'),
        ({"keep_matching": "*"}, "keep_matching = .*nothing to repeat"),
        ({"max_characters": 0}, "max_characters = 0: must be a whole number from 1"),
        ({"min_characters": 9, "max_characters": 5}, r"leaves no document; use more than min_characters \(9\)"),
        ({"near_duplicates": 0.3}, r"near_duplicates = 0\.3: must be a number from 0\.6 to 1"),
        ({"weights": [1, 2]}, None),
        ({"train": ["a", "b"], "weights": [1]}, "must have one number for each of the 2 SOURCEs"),
        ({"train": ["a", "b"], "weights": [1, 0]}, "must be numbers above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(wrong: dict[str, object], words: str | None) -> None:
    if words is None:  # a single SOURCE may be a prepared folder that holds several
        settings(**wrong)
        return
    with pytest.raises(RecipeError, match=words):
        settings(**wrong)
