"""What replies earn: rewards by name or of a user's file, their components and weighted sum, and checks of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from gemmule.data.tasks import check_task
from gemmule.errors import RecipeError
from gemmule.settings import Problem
from gemmule.train.reward_process import RewardProcess
from gemmule.train.rewards import RewardSettings

_CONSTANT = 100  # replies after which a reward that never differs is refused
SOLVED = "solved"  # the component of `task` that is 1.0 where all others are and the reply ended


class Sample(NamedTuple):
    """A reply to a prompt; `row` has "messages" and "task"."""

    row: Mapping[str, Any]
    reply: str
    ended: bool  # whether by a stop token


class Grade(NamedTuple):
    """What a reply earns, its components, and the components of the prompt's own checker beside another reward."""

    reward: float
    components: Mapping[str, float]
    checks: Mapping[str, float]


def _task(sample: Sample) -> Mapping[str, float]:
    found = check_task(sample.row["task"], sample.reply)
    return {SOLVED: float(sample.ended and all(found.values())), **found}


def _ended(sample: Sample) -> Mapping[str, float]:
    return {"ended": float(sample.ended)}


# By name: the components of a reply, and those that count where the recipe names none; a new one is one line.
REWARDS: dict[str, tuple[Callable[[Sample], Mapping[str, float]], tuple[str, ...]]] = {
    "task": (_task, (SOLVED,)),
    "ended": (_ended, ("ended",)),
}


class Grader:
    """Grades replies; RecipeError where a reward raises, hangs, is not finite, or is the same for the first replies."""

    def __init__(self, settings: RewardSettings, rows: Sequence[Mapping[str, Any]], fresh: bool = True) -> None:
        """Check that the rows have what the reward needs; `fresh` is whether its first replies are still to come."""
        self._settings, self._process = settings, None
        self._has_task = all(_is_task(row.get("task")) for row in rows)
        self._first: set[float] | None = set() if fresh else None
        self._graded = 0
        name = settings.reward
        if name in REWARDS:
            if name == "task" and not self._has_task:
                advice = "a prompt has no task with a checker (storybook-tasks, text-tasks); name file.py:function"
                raise RecipeError(str(Problem("rewards.reward", name, advice)))
            self._function, self._counted = REWARDS[name]
        elif ".py:" in name:
            self._process = process = RewardProcess(name, settings.call_seconds)
            self._function = lambda sample: process(sample.row["messages"], sample.reply, sample.row)
            self._counted = ()
        else:
            advice = f"no such reward; there are {', '.join(REWARDS)}, or file.py:function"
            raise RecipeError(str(Problem("rewards.reward", name, advice)))

    def grade(self, sample: Sample) -> Grade:
        """Grade one reply."""
        found = self._function(sample)
        components = dict(found) if isinstance(found, Mapping) else {"reward": found}
        for name, value in components.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise RecipeError(f"rewards.reward = {self._settings.reward}: {name} is {value}, not a finite number")
        counted = self._settings.components or self._counted or tuple(components)
        if not components.keys() >= set(counted) and self._settings.reward not in REWARDS:
            missing = ", ".join(sorted(set(counted) - components.keys()))
            raise RecipeError(f"rewards.components: the reward gives no {missing}; it gives {', '.join(components)}")
        weights = self._settings.weights or (1.0,) * len(counted)
        # A kind of task may lack a component that others have.
        reward = sum(weight * components.get(name, 0.0) for name, weight in zip(counted, weights, strict=True))
        self._refuse_constant(reward)
        others = self._has_task and self._settings.reward != "task"
        return Grade(reward, components, check_task(sample.row["task"], sample.reply) if others else {})

    def close(self) -> None:
        """End the process of a user's function."""
        if self._process is not None:
            self._process.close()

    def _refuse_constant(self, reward: float) -> None:
        self._graded += 1
        if self._first is None:
            return
        self._first.add(reward)
        if len(self._first) > 1:
            self._first = None
        elif self._graded >= _CONSTANT:
            raise RecipeError(
                f"rewards.reward = {self._settings.reward}: each of the first {_CONSTANT} replies earns {reward:g}, so "
                "there is nothing to learn from; use one that differs between replies, or a model that sometimes earns "
                "it"
            )


def _is_task(task: object) -> bool:
    try:
        return isinstance(task, Mapping) and check_task(task, "") is not None
    except (KeyError, TypeError):
        return False


class RewardWatch:
    """Notices a reward that rises while a component of the tasks' own checker falls: the reward is being gamed."""

    _LEAST, _SHARE, _Z, _FALL = 5, 3, 3.0, 0.05

    def __init__(self) -> None:
        self._means: list[Mapping[str, float]] = []
        self._warned = False

    def note(self, grades: Sequence[Grade]) -> str | None:
        """Take the grades of a step; return a sentence the first time that the two part."""
        checks = [grade.checks for grade in grades if grade.checks]
        if not checks or self._warned:
            return None
        names = set.intersection(*(set(each) for each in checks))
        means = {f"check_{name}": fmean(each[name] for each in checks) for name in names}
        self._means.append({**means, "reward": fmean(grade.reward for grade in grades)})
        size = max(self._LEAST, len(self._means) // self._SHARE)
        if len(self._means) < 2 * size:
            return None
        first, last = self._means[:size], self._means[-size:]
        change = {name: _change([m[name] for m in first if name in m], [m[name] for m in last if name in m])
                  for name in last[-1]}  # fmt: skip
        fallen = [name for name, (by, z) in change.items() if name != "reward" and by < -self._FALL and z < -self._Z]
        if change["reward"][1] <= self._Z or not fallen:
            return None
        self._warned = True
        parts = ", ".join(f"{name.removeprefix('check_')} fell by {-change[name][0]:.0%}" for name in sorted(fallen))
        return (
            f"the reward rose by {change['reward'][0]:.3g} while what the tasks themselves check got worse ({parts}): "
            "the reward can be earned without solving them; look at the replies, and change it"
        )


def _change(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """Return the difference of two means, and that in its standard errors."""
    if len(first) < 2 or len(last) < 2:
        return 0.0, 0.0
    by = fmean(last) - fmean(first)
    error = math.sqrt(variance(first) / len(first) + variance(last) / len(last))
    return by, by / error if error else math.copysign(math.inf, by) if by else 0.0
