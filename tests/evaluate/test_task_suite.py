import json
from copy import copy
from pathlib import Path

import pytest

from gemmule.errors import ModelError, RecipeError, TokenizerError
from gemmule.evaluate import tasks
from gemmule.evaluate.tasks import (
    Answer,
    TaskSuite,
    answer_suite,
    describe_answers,
    is_task_suite,
    judge_answers,
    open_task_suite,
)
from gemmule.storybook.tasks import make_tasks
from gemmule.tokenizer import Tokenizer
from runs import gemmule
from tiny import lively_model, shallow_config


def test_tasks_are_answered_alike_whatever_is_generated_at_once(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively_model(shallow_config(vocab_size=380, max_position_embeddings=2000))
    suite = TaskSuite(tasks="storybook-tasks:5:0:tell", seed=3, max_new_tokens=8)
    whole = answer_suite(model, tiny_tokenizer, suite)
    monkeypatch.setattr(tasks, "_AT_ONCE", 2)
    assert answer_suite(model, tiny_tokenizer, suite) == whole
    assert [answer.seed for answer in whole] == [3, 4, 5, 6, 7]
    assert all(0 < answer.tokens <= 8 and answer.task["kind"] == "tell" for answer in whole)
    assert len({answer.reply for answer in whole}) == 5


def test_a_prompt_that_does_not_fit_is_refused(tiny_tokenizer: Tokenizer) -> None:
    model = lively_model(shallow_config(vocab_size=380))
    with pytest.raises(ModelError, match=r"a prompt has .* max_position_embeddings is 64"):
        answer_suite(model, tiny_tokenizer, TaskSuite(tasks="storybook-tasks:2:0:mend"))


def test_right_replies_solve_all_tasks_and_wrong_ones_the_components_they_meet() -> None:
    made = list(make_tasks(40, seed=5, held_out=True))
    answers = [Answer(task.instruction, task.goal, 1, task.reply, 9, ended=True) for task in made]
    found = judge_answers(answers)
    assert (found["tasks"], found["solved"]["hits"]) == (40, 40)
    assert found["solved"]["interval"] == (pytest.approx(0.912, abs=1e-3), 1.0)
    assert found["storybook"]["possible"]["rate"] == 1
    assert found["kinds"].keys() == {task.kind for task in made}
    unended = judge_answers([answer._replace(ended=False) for answer in answers])
    assert unended["solved"]["hits"] == 0
    told = [answer for answer in answers if answer.task["kind"] == "tell"]
    swapped = [answer._replace(reply=told[number - 1].reply) for number, answer in enumerate(told)]
    wrong = judge_answers(swapped)["kinds"]["tell"]
    assert wrong["solved"]["hits"] == wrong["facts"]["hits"] == 0
    assert wrong["consistent"]["rate"] == wrong["ends"]["rate"] == 1
    assert json.loads(json.dumps(found)) is not None
    sentences = describe_answers(found)
    assert sentences[0].startswith("of 40 tasks, 100.0% (91.2% to 100.0%) are solved")


def test_held_out_wordings_are_counted_apart() -> None:
    goal = {"kind": "refuse"}
    answers = [
        Answer("?", {**goal, "held_out_wording": True}, 1, "There is no such story.", 9, ended=True),
        Answer("?", goal, 1, "Once upon a time.", 9, ended=True),
    ]
    found = judge_answers(answers)["kinds"]["refuse"]
    assert (found["solved"]["hits"], found["solved"]["count"]) == (1, 2)
    assert (found["solved_in_held_out_wordings"]["hits"], found["solved_in_held_out_wordings"]["count"]) == (1, 1)


@pytest.mark.parametrize("name", ["tasks", "tasks-temperature-1"])
def test_shipped_suites_open(name: str) -> None:
    assert is_task_suite(name)
    assert open_task_suite(name).tasks == "storybook-tasks:500"
    assert not is_task_suite("stories")


def test_a_suite_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('tasks = "storybook:5"')
    with pytest.raises(RecipeError, match=r"own.toml: tasks = 'storybook:5': must be storybook-tasks"):
        open_task_suite(str(tmp_path / "own.toml"))
    with pytest.raises(RecipeError, match="no such suite"):
        is_task_suite("tales")


def test_a_vocabulary_without_turns_is_refused(tiny_tokenizer: Tokenizer) -> None:
    tokenizer = copy(tiny_tokenizer)
    tokenizer.end_of_turn_id = None
    with pytest.raises(TokenizerError, match="it cannot render a chat"):
        answer_suite(lively_model(shallow_config(vocab_size=380)), tokenizer, TaskSuite(tasks="storybook-tasks:1"))


def test_the_command_says_how_many_are_solved(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('tasks = "storybook-tasks:2:0:refuse"\nmax_new_tokens = 5')
    ended = gemmule("evaluate", tiny_run / "model", "--suite", tmp_path / "own.toml", "--json")
    assert ended.code == 0, ended.err
    assert "of 2 tasks, 0.0% (0.0% to" in ended.err
    assert json.loads(ended.out)["solved"]["count"] == 2
