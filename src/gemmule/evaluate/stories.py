"""Stories told by a model, judged by the storybook's checker."""

import math
from typing import NamedTuple

from gemmule.data.storybook import Verdict, check_story, log_probability
from gemmule.generate.engine import complete
from gemmule.generate.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer


class JudgedStory(NamedTuple):
    """A model's story and what the storybook thinks of it."""

    text: str
    verdict: Verdict
    possible: bool  # whether the storybook itself could have told it, word for word: stricter than the verdict


def judge_stories(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    sampling: SamplingSettings,
    seed: int,
    max_new_tokens: int = 250,
) -> list[JudgedStory]:
    """Let the model tell `count` stories that begin with `prompt`, and check each one."""
    texts = complete(model, tokenizer, [prompt] * count, max_new_tokens, sampling, seed)
    return [JudgedStory(text, check_story(text), log_probability(text) > -math.inf) for text in texts]
