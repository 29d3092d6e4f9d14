"""The documents of the tasks in `tasks/`: made from the storybook when they are asked for, without a network.

Each function is named by a task's `custom_dataset`; lm_eval passes it the task's metadata and `dataset_kwargs`.
"""

from typing import Any

from gemmule.storybook import stories
from gemmule.storybook.questions import clozes, questions

# Not those that `storybook` trains on (1) or validates on (2).
TEST_SEED, EXAMPLE_SEED = 101, 102
_EXAMPLES = 20  # that few-shot prompts are taken from


def cloze(items: int, **_: Any) -> Any:
    """Return sentences to complete: context, choices, answer (the index of the right choice)."""
    return _splits({name: [item._asdict() for item in clozes(count, seed)] for name, count, seed in _parts(items)})


def question(items: int, **_: Any) -> Any:
    """Return questions about stories: story, question, answer."""
    return _splits({name: [item._asdict() for item in questions(count, seed)] for name, count, seed in _parts(items)})


def story(items: int, **_: Any) -> Any:
    """Return whole stories: text; and the first half of their sentences: beginning."""
    test = [{"text": each.text, "beginning": _beginning(each.text)} for each in stories(items, TEST_SEED)]
    return _splits({"test": test})


def _parts(items: int) -> list[tuple[str, int, int]]:
    return [("test", items, TEST_SEED), ("examples", _EXAMPLES, EXAMPLE_SEED)]


def _beginning(text: str) -> str:
    """Return the first paragraphs of a story, about half of it."""
    paragraphs = text.split("\n")
    return "\n".join(paragraphs[: len(paragraphs) // 2])


def judge_continuation(document: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Return whether a story with its beginning given holds together, and whether the storybook could have told it."""
    import math

    from gemmule.storybook import check_story, log_probability

    text = document["beginning"] + replies[0]
    return {"consistent": float(check_story(text).good), "possible": float(log_probability(text) > -math.inf)}


def _splits(splits: dict[str, list[dict[str, Any]]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_list(documents) for name, documents in splits.items()})
