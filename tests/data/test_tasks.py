import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from gemmule.data.settings import DataSettings
from gemmule.data.sources import Split, plan_units, read_range, read_source
from gemmule.data.tasks import check_task
from gemmule.data.text_tasks import make_text_task, sentences_of
from gemmule.errors import SourceError
from gemmule.storybook import check_story

TEXT = 'Once there was a dog. "Who is there?" asked the dog. Nobody was there. The dog went home and slept.'


def rows(source: str, kind: str, split: Split = "train") -> list[dict[str, Any]]:
    settings = DataSettings.model_validate({"train": source, "kind": kind})
    return [json.loads(document.text) for document in read_source(source, settings, split)]


def test_conversations_know_the_log_probability_of_the_reply() -> None:
    settings = DataSettings(train=("storybook-tasks:12",), kind="conversations")
    documents = list(read_source("storybook-tasks:12", settings, "train"))
    for document in documents:
        row = json.loads(document.text)
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert document.log_probability is not None
        assert document.text == json.dumps(row, ensure_ascii=False, separators=(",", ":"))
    assert len(documents) == 12
    assert any(document.log_probability and -150 < document.log_probability < -50 for document in documents)


def test_the_checker_is_rebuilt_from_a_prompt_and_passes_the_reply_of_the_conversation() -> None:
    for prompt, conversation in zip(
        rows("storybook-tasks:20", "prompts"), rows("storybook-tasks:20", "conversations"), strict=True
    ):
        assert prompt["messages"] == conversation["messages"][:1]
        assert all(check_task(prompt["task"], conversation["messages"][1]["content"]).values())
        assert not all(check_task(prompt["task"], "Once upon a time.").values())


def test_preferences_are_a_good_story_and_the_same_with_a_fault_that_validation_holds_out() -> None:
    for split in get_args(Split):
        for row in rows("storybook-tasks:8", "preferences", split):
            assert check_story(row["chosen"]).good
            assert not check_story(row["rejected"]).consistent
            assert row["chosen"] != row["rejected"]


def test_train_and_validation_share_no_instruction() -> None:
    asked = [
        {row["messages"][0]["content"] for row in rows("storybook-tasks:60:0:tell", "prompts", split)}
        for split in get_args(Split)
    ]
    assert not asked[0] & asked[1]


def test_a_range_gives_the_same_tasks_as_the_whole() -> None:
    whole = rows("storybook-tasks:10", "prompts")
    assert rows("storybook-tasks:4:6", "prompts") == whole[6:]
    settings = DataSettings(train=("storybook-tasks:10",), kind="prompts")
    (unit,) = plan_units(settings, "train")
    assert [json.loads(document.text) for each in unit.ranges for document in read_range(each, settings)] == whole


def test_kinds_of_tasks_can_be_chosen() -> None:
    found = {row["task"]["kind"] for row in rows("storybook-tasks:20:0:tell+refuse", "prompts")}
    assert found == {"tell", "refuse"}


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("storybook-tasks", "text", ["storybook-tasks", "data.kind"]),
        ("text-tasks:a.txt", "text", ["text-tasks", "data.kind"]),
        ("text-tasks:a.txt", "preferences", ["text-tasks", "data.kind"]),
        ("text-tasks", "prompts", ["text-tasks:SOURCE"]),
        ("storybook-tasks:0", "prompts", ["storybook-tasks:COUNT"]),
        ("storybook-tasks:5:x", "prompts", ["storybook-tasks:COUNT:START"]),
        ("storybook-tasks:5:0:sing", "prompts", ["'sing'", "tell, continue, answer, mend, refuse"]),
        ("storybook-tasks:5:0:tell:1", "prompts", ["storybook-tasks:5:0:tell:1"]),
    ],
)
def test_a_source_of_tasks_that_cannot_be_says_how_to_write_it(source: str, kind: str, words: Sequence[str]) -> None:
    with pytest.raises(SourceError) as error:
        rows(source, kind)
    for word in words:
        assert word in str(error.value)


def test_a_document_solves_the_task_made_from_it(tmp_path: Path) -> None:
    texts = [TEXT, TEXT.replace("dog", "cat"), "A bird sang. It flew away, singing.", "12 34", "Nothing ends here"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    source = f"text-tasks:{tmp_path / 'a.txt'}"
    prompts, conversations = rows(source, "prompts"), rows(source, "conversations")
    assert len(prompts) == len(conversations) >= 3
    for prompt, conversation in zip(prompts, conversations, strict=True):
        components = check_task(prompt["task"], conversation["messages"][1]["content"])
        assert components
        assert all(components.values())
        assert not any(check_task(prompt["task"], "").values())


def test_rules_of_a_text_are_checked_each_by_itself() -> None:
    goal = {"kind": "text", "words": ["dog", "home"], "sentences": 4, "ending": "The dog went home and slept."}
    assert check_task(goal, TEXT) == {"words": 1, "sentences": 1, "ending": 1}
    assert check_task(goal, TEXT.replace(" home", "")) == {"words": 0, "sentences": 1, "ending": 0}
    assert check_task(goal, "So it was. " + TEXT) == {"words": 1, "sentences": 0, "ending": 1}
    assert len(sentences_of(TEXT)) == 4


def test_tasks_of_texts_depend_on_the_text_alone() -> None:
    tasks = [make_text_task(f"{TEXT} {number}.") for number in range(30)]
    assert tasks == [make_text_task(f"{TEXT} {number}.") for number in range(30)]
    found = {name for task in tasks if task for name in task.goal}
    assert found == {"kind", "words", "sentences", "ending"}
