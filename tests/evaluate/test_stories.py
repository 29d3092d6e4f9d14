import math
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import RecipeError
from gemmule.evaluate import stories
from gemmule.evaluate.overlap import copied_spans
from gemmule.evaluate.stories import Story, Suite, judge_stories, judge_suite, open_suite, tell_suite
from gemmule.inference.sampling import STORYTELLING, SamplingSettings
from gemmule.storybook import tell_story
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config


def test_stories_are_told_from_the_prompt_and_each_is_judged(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer
) -> None:
    whole = tell_story(seed=1, index=0).text
    monkeypatch.setattr(stories, "complete", lambda *_: [whole, whole[: len(whole) // 2], "Nonsense."])
    judged = judge_stories(lively_model(tiny_config()), tiny_tokenizer, "Once", 3, STORYTELLING, seed=0)
    assert [story.verdict.good for story in judged] == [story.possible for story in judged] == [True, False, False]
    assert judged[0].text == whole


def test_a_seed_repeats_the_stories(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    one, again, other = (
        judge_stories(model, tiny_tokenizer, "Once upon", 3, SamplingSettings(), seed, max_new_tokens=8)
        for seed in (1, 1, 2)
    )
    assert one == again != other
    assert len(one) == 3
    assert all(story.text.startswith("Once upon") for story in one)
    assert len({story.text for story in one}) == 3, "the stories differ among themselves"


def told(text: str, ended: bool = True) -> Story:
    return Story("Once", 1, text, len(text.split()), ended)


def test_a_suite_is_told_alike_whatever_is_generated_at_once(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(tiny_config(vocab_size=380))
    suite = Suite(prompts=("Once upon", "The owl"), count=5, seed=3, max_new_tokens=8)
    steps: list[tuple[str, int, int | None]] = []
    whole = tell_suite(model, tiny_tokenizer, suite, lambda *step: steps.append(step))
    monkeypatch.setattr(stories, "_AT_ONCE", 2)
    assert tell_suite(model, tiny_tokenizer, suite) == whole
    assert steps == [("telling stories", 5, 5)]
    assert [story.prompt for story in whole] == ["Once upon", "The owl", "Once upon", "The owl", "Once upon"]
    assert [story.seed for story in whole] == [3, 4, 5, 6, 7]
    assert all(story.text.startswith(story.prompt) and 0 < story.tokens <= 8 for story in whole)
    assert all(story.ended or story.tokens == 8 for story in whole)


def test_a_suite_says_what_each_story_shows_and_how_sure_the_rates_are() -> None:
    book = [tell_story(seed=2, index=number).text for number in range(20)]
    texts = [*book[:19], book[19][:90]]
    found = judge_suite([*map(told, texts[:19]), told(texts[19], ended=False)], copied_spans(texts, [book[:3]]))
    assert (found["stories"], found["different"], found["ended"]["hits"]) == (20, 20, 19)
    assert found["ended"]["interval"] == (pytest.approx(0.764, abs=1e-3), pytest.approx(0.991, abs=1e-3))
    shown = found["storybook"]
    assert (shown["consistent"]["hits"], shown["possible"]["hits"], shown["surprise"]["count"]) == (19, 19, 19)
    surprises = [-tell_story(seed=2, index=number).log_probability for number in range(19)]
    assert shown["surprise"]["mean"] == pytest.approx(sum(surprises) / 19)
    low, high = shown["surprise"]["interval"]
    assert low < shown["surprise"]["mean"] < high
    assert shown["entropy"] == pytest.approx(98.4, abs=0.1)
    items: list[dict[str, Any]] = found["items"]
    assert [item["surprise"] for item in items[:19]] == pytest.approx(surprises)
    assert items[19]["surprise"] is None
    assert [item["copied_span"] for item in items[:3]] == [item["words"] for item in items[:3]]
    assert all(item["copied_span"] < item["words"] for item in items[3:])


def test_stories_of_other_books_are_not_held_against_this_one() -> None:
    other = [told("Lily had a cat. Lily was glad. The end.")] * 3
    found = judge_suite(other)
    assert "storybook" not in found
    assert found["copied_span"]["mean"] is None
    assert found["different"] == 1
    assert found["words"] == {"mean": 9, "count": 3, "interval": None}
    assert not {"surprise", "consistent"} & found["items"][0].keys()
    assert judge_suite(other, of_book=True)["storybook"]["consistent"]["rate"] == 0


@pytest.mark.parametrize("name", ["stories", "stories-temperature-1"])
def test_shipped_suites_have_fixed_prompts_and_seeds(name: str) -> None:
    suite = open_suite(name)
    assert (suite.count, suite.seed) == (100, 1)
    assert all(math.isfinite(value) for value in suite.sampling.model_dump(exclude={"logit_bias"}).values())
    assert (suite.sampling.temperature == 1) == (name == "stories-temperature-1")


def test_a_suite_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="--suite tales: no such suite; there are stories, stories-temperature-1, tasks"
    ):
        open_suite("tales")
    for text, words in [
        ('prompts = ["Once"]\ncuont = 3', "cuont"),
        ("count = 3", "prompts"),
        ("prompts = []", "prompts"),
        ('prompts = ["Once"]\n[sampling]\ntemperature = -1.0', "sampling.temperature"),
    ]:
        (tmp_path / "own.toml").write_text(text)
        with pytest.raises(RecipeError, match=words):
            open_suite(str(tmp_path / "own.toml"))
    with pytest.raises(RecipeError, match="no such file"):
        open_suite(str(tmp_path / "none.toml"))
