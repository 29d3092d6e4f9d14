import math
import random
from collections import Counter
from statistics import fmean, stdev

import pytest

from gemmule.storybook import check_story, measure_stories, tell_story
from gemmule.storybook.check import read_story
from gemmule.storybook.faults import FAULTS, HELD_OUT_FAULTS, plant_fault
from gemmule.storybook.measure import PLOT, PLOTS
from gemmule.storybook.tasks import (
    CHECKERS,
    KINDS,
    Task,
    check_reply,
    facts_of,
    is_held_out,
    make_preference,
    make_task,
    make_tasks,
)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return list(make_tasks(100, seed=1))


@pytest.fixture(scope="module")
def held_out() -> list[Task]:
    return list(make_tasks(30, seed=1, held_out=True))


def test_every_kind_occurs_and_its_own_reply_solves_it(tasks: list[Task], held_out: list[Task]) -> None:
    assert {task.kind for task in tasks} == KINDS.keys() == CHECKERS.keys()
    for task in (*tasks, *held_out):
        assert task.check(task.reply).solved, task
        assert "{" not in task.instruction


def test_the_reply_to_another_task_solves_none(tasks: list[Task]) -> None:
    for kind in KINDS.keys() - {"refuse", "answer"}:
        first, second = [task for task in tasks if task.kind == kind][:2]
        assert not first.check(second.reply).solved
    by_kind = {task.kind: task for task in tasks}
    assert not by_kind["refuse"].check(by_kind["tell"].reply).solved
    assert not by_kind["tell"].check(by_kind["refuse"].reply).solved
    assert not by_kind["answer"].check("Somebody else.").solved


def test_components_of_a_told_story_are_told_apart() -> None:
    story = tell_story(7, 0).text
    facts = facts_of(read_story(story))
    goal = {"kind": "tell", "facts": {"hero": facts["hero"], PLOT: facts[PLOT]}}
    paragraphs = story.split("\n")
    other = {"kind": "tell", "facts": {"hero": "nobody"}}
    faulty = plant_fault(story, "pronoun", random.Random(0))
    assert faulty is not None
    assert dict(check_reply(goal, story).components) == {"facts": 1, "consistent": 1, "ends": 1}
    assert dict(check_reply(other, story).components) == {"facts": 0, "consistent": 1, "ends": 1}
    assert dict(check_reply(goal, "\n".join(paragraphs[:-1])).components) == {"facts": 1, "consistent": 1, "ends": 0}
    assert dict(check_reply(goal, faulty).components) == {"facts": 1, "consistent": 0, "ends": 1}
    assert dict(check_reply(goal, "").components) == {"facts": 0, "consistent": 0, "ends": 0}


def test_tasks_depend_on_seed_and_number_alone(tasks: list[Task]) -> None:
    assert make_task(1, 17) == tasks[17] != make_task(2, 17)
    assert make_task(1, 17, held_out=True) != tasks[17]


def test_no_constraint_of_training_is_held_out(tasks: list[Task], held_out: list[Task]) -> None:
    assert not {task.constraint for task in tasks} & {task.constraint for task in held_out}
    assert not any(is_held_out(task.constraint) for task in tasks)
    assert all(is_held_out(task.constraint) for task in held_out)
    # The order in which an instruction names its facts changes nothing.
    assert all(task.constraint not in task.instruction for task in tasks if task.kind == "tell")


def test_held_out_wordings_are_only_in_held_out_tasks(tasks: list[Task], held_out: list[Task]) -> None:
    assert not any(task.wording_held_out for task in tasks)
    assert 0 < sum(task.wording_held_out for task in held_out) < len(held_out)


def test_every_story_has_one_plot_and_each_fact_once() -> None:
    for index in range(200):
        world = read_story(tell_story(8, index).text)
        assert len(world.tags & set(PLOTS)) == 1
        assert {"hero", "kind", "friend", PLOT} <= facts_of(world).keys()


def test_a_request_is_refused_only_if_no_story_meets_it(tasks: list[Task]) -> None:
    for task in tasks:
        if task.kind in ("tell", "refuse"):
            facts = dict(line.split(": ") for line in task.constraint.split("\n"))
            assert (measure_stories(facts).stories > 0) == (task.kind == "tell")


def test_the_counted_share_of_a_fact_is_that_of_the_stories() -> None:
    number = 2000
    found = Counter(facts_of(read_story(tell_story(9, index).text)).get("place") for index in range(number))
    for place in ("the forest", "the park"):
        share = math.exp(measure_stories({"place": place}).log_probability)
        assert abs(found[place] / number - share) < 4 * math.sqrt(share * (1 - share) / number)
    assert math.isclose(math.exp(measure_stories({"hero": "Leo"}).log_probability), 1 / 21, rel_tol=1e-9)
    assert measure_stories({"hero": "Zoe"}).log_probability == -math.inf


def test_facts_that_exclude_each_other_add_up_to_all() -> None:
    whole = measure_stories()
    parts = [measure_stories({PLOT: plot}) for plot in PLOTS]
    shares = [math.exp(part.log_probability) for part in parts]
    assert sum(part.stories for part in parts) == whole.stories
    assert math.isclose(sum(shares), 1, rel_tol=1e-12)
    # The chain rule: entropy of the story = entropy of its plot + mean entropy given the plot.
    given = sum(share * (part.nats - part.log_probability) for share, part in zip(shares, parts, strict=True))
    assert math.isclose(given, whole.nats, rel_tol=1e-12)


@pytest.mark.parametrize("kind", [pytest.param("tell", marks=pytest.mark.slow), "continue"])
def test_the_log_probability_of_replies_is_their_counted_entropy_on_average(kind: str) -> None:
    sample = list(make_tasks(2000 if kind == "tell" else 400, seed=3, kinds=[kind]))
    # Paired with the entropy of the same instruction, so that the spread between instructions does not count.
    excess = [-task.log_probability - task.entropy for task in sample]
    assert abs(fmean(excess)) < 3 * stdev(excess) / math.sqrt(len(excess))
    assert fmean(task.entropy for task in sample) > 20


def test_the_only_reply_has_probability_one(tasks: list[Task]) -> None:
    for task in tasks:
        assert (task.entropy == 0) == (task.kind in ("answer", "mend", "refuse"))
        assert task.log_probability <= 1e-9


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found_and_is_the_only_change(kind: str) -> None:
    found = 0
    for index in range(20):
        story = tell_story(4, index).text
        faulty = plant_fault(story, kind, random.Random(index))
        if faulty is None:
            continue
        found += 1
        assert not check_story(faulty).consistent
        assert faulty == plant_fault(story, kind, random.Random(index))
        if FAULTS[kind].mendable:
            assert check_story(faulty).parses
            assert _same_start(story, faulty) + _same_start(story[::-1], faulty[::-1]) >= len(story) - 16
    assert found >= 15


def _same_start(one: str, other: str) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), len(one))


def test_kinds_of_fault_are_held_out_of_preferences() -> None:
    train, held_out = ({make_preference(1, index, split).fault for index in range(25)} for split in (False, True))
    assert held_out == set(HELD_OUT_FAULTS)
    assert train == FAULTS.keys() - held_out
