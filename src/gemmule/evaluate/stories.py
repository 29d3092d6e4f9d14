"""Stories told by a model, judged by the storybook's checker."""

from gemmule.data.storybook import Verdict, check_story
from gemmule.generate.engine import complete
from gemmule.generate.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer


def judge_stories(
    model: Gemma3, tokenizer: Tokenizer, prompt: str, count: int, seed: int, max_new_tokens: int = 250
) -> list[tuple[str, Verdict]]:
    """Let the model tell `count` stories at temperature 1, its own distribution, and check each one."""
    prompts = [prompt] * count
    texts = complete(model, tokenizer, prompts, max_new_tokens, SamplingSettings(), seed)
    return [(text, check_story(text)) for text in texts]
