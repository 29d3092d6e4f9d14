import pytest

from gemmule.evaluate import stories
from gemmule.evaluate.stories import judge_stories
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
