"""Tasks about stories: an instruction, a reply that is right, and what checks any reply, from one description.

Kinds: tell a story with given facts, or say that there is none; continue a story; answer a question about it; mend a
planted fault. Each reply is a sample of the grammar given its instruction, so its log-probability is exact, and so is
the entropy of all replies to that instruction: the lower bound of any model's loss. Which split a task belongs to is
decided by a hash of what is asked, without its wording, so nothing that is asked in training is held out.
"""

import functools
import random
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from typing import Any, NamedTuple

from gemmule.storybook.check import World, check_story, read_story
from gemmule.storybook.faults import FAULTS, HELD_OUT_FAULTS, plant_fault
from gemmule.storybook.measure import PLOT, PLOTS, measure_rest, measure_stories
from gemmule.storybook.questions import answers
from gemmule.storybook.story import Story, tell_story

# What decides the right reply, as JSON: {"kind": ..., and what the kind's checker reads}.
Goal = Mapping[str, Any]

# What an instruction may ask of a story: lexicons of which it uses at most one entry, and the plot.
FACTS = ("hero", "friend", "noun", "place", PLOT)
_MOST_FACTS = 4
_WITH_KIND = 0.3  # how often the hero's kind is given with the name
_HELD_OUT_SHARE = 10  # one constraint in so many
_HELD_OUT_WORDINGS = 2
_MOST_LINES = 12  # of a story that is to be continued
_UNNUMBERED = 1 << 53  # stories of tasks are numbered at random below


class TaskVerdict(NamedTuple):
    """What a reply to a task shows: each component is 1.0 or 0.0."""

    components: Mapping[str, float]

    @property
    def solved(self) -> bool:
        """Whether all components are met."""
        return all(self.components.values())


@dataclass(frozen=True)
class Task:
    """An instruction and a right reply to it; `log_probability` and `entropy` are those of replies to it, in nats.

    `constraint` is what is asked, without its wording; `wording` the number of that.
    """

    kind: str
    instruction: str
    reply: str
    goal: Goal
    log_probability: float
    entropy: float
    constraint: str
    wording: int

    def check(self, reply: str) -> TaskVerdict:
        """Check any reply, ignoring differences in white space."""
        return check_reply(self.goal, reply)

    @property
    def wording_held_out(self) -> bool:
        """Whether training never sees this wording."""
        return self.wording >= len(_wordings(self.kind)) - _HELD_OUT_WORDINGS


class Preference(NamedTuple):
    """A task to tell a story, of which the reply is the chosen one, and the same story with one fault of a kind."""

    task: Task
    rejected: str
    fault: str


class _Draft(NamedTuple):
    """A task before it is worded."""

    asked: Mapping[str, str]  # without the order in which facts are named
    fields: Mapping[str, str]
    reply: str
    goal: Goal
    log_probability: float = 0.0
    entropy: float = 0.0

    @property
    def constraint(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in sorted(self.asked.items()))


def make_task(seed: int, index: int, held_out: bool = False, kinds: Sequence[str] = ()) -> Task:
    """Make task number `index` of the endless collection `seed`, of one of some kinds (none: all, as weighed in KINDS).

    The same on every machine and Python version. Held-out tasks have constraints that no other ever has, and also the
    wordings that are held out.
    """
    draw = _generator(f"task:{seed}:{index}:{held_out}")
    names = list(kinds or KINDS)
    (kind,) = draw.choices(names, [KINDS[name].weight for name in names])
    while True:
        draft = KINDS[kind].make(draw)
        if draft is not None and is_held_out(draft.constraint) == held_out:
            break
    wordings = _wordings(kind)
    wording = draw.randrange(len(wordings) - (0 if held_out else _HELD_OUT_WORDINGS))
    instruction = wordings[wording].format_map(draft.fields)
    return Task(
        kind, instruction, draft.reply, draft.goal, draft.log_probability, draft.entropy, draft.constraint, wording
    )


def make_tasks(count: int, seed: int, held_out: bool = False, kinds: Sequence[str] = ()) -> Iterator[Task]:
    """Make the first `count` tasks of the collection `seed`."""
    return (make_task(seed, index, held_out, kinds) for index in range(count))


def make_preference(seed: int, index: int, held_out: bool = False) -> Preference:
    """Make pair number `index` of the collection `seed`; held-out ones have the kinds of fault that are held out."""
    draw = _generator(f"preference:{seed}:{index}:{held_out}")
    kinds = [kind for kind in FAULTS if (kind in HELD_OUT_FAULTS) == held_out]
    while True:
        task = make_task(draw.randrange(_UNNUMBERED), 0, held_out, ["tell"])
        changed = with_fault(task.reply, kinds, draw)
        if changed is not None:
            return Preference(task, *changed)


def is_held_out(constraint: str) -> bool:
    """Whether a constraint belongs to validation: one in ten, by its hash."""
    digest = blake2b(constraint.encode(), digest_size=8, person=b"gemmule-tasks").digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0


def check_reply(goal: Goal, reply: str) -> TaskVerdict:
    """Check a reply against the goal of a task, ignoring differences in white space."""
    return TaskVerdict({name: float(met) for name, met in CHECKERS[goal["kind"]](goal, reply).items()})


def facts_of(world: World) -> dict[str, str]:
    """Return the facts of a story that has been read."""
    facts = {name: world.chosen[name].text for name in ("kind", *FACTS) if name in world.chosen}
    plots = [tag for tag in PLOTS if tag in world.tags]
    return facts | ({PLOT: plots[0]} if len(plots) == 1 else {})


def with_fault(story: str, kinds: Sequence[str], draw: random.Random) -> tuple[str, str] | None:
    """Return a story with one fault of the first of shuffled kinds that has a place in it, and that kind."""
    for kind in draw.sample(list(kinds), len(kinds)):
        changed = plant_fault(story, kind, draw)
        if changed is not None:
            return changed, kind
    return None


def _generator(key: str) -> random.Random:
    """Return a generator that is the same on every machine."""
    return random.Random(int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "big"))


def _draft_story(draw: random.Random) -> _Draft:
    facts, story = _facts_and_story(draw)
    measure = measure_stories(facts)
    log_probability = story.log_probability - measure.log_probability
    goal = {"kind": "tell", "facts": facts}
    return _Draft(facts, {"facts": _list_facts(facts, draw)}, story.text, goal, log_probability, measure.nats)


def _draft_refusal(draw: random.Random) -> _Draft | None:
    """Ask for a combination of facts that no story has: those of one story with one of another."""
    facts, _ = _facts_and_story(draw)
    others, _ = _facts_and_story(draw)
    changed = draw.choice(sorted(others))
    facts = dict(sorted({**facts, changed: others[changed]}.items()))
    if measure_stories(facts).stories:
        return None
    return _Draft(facts, {"facts": _list_facts(facts, draw)}, _texts()["texts"]["refusal"], {"kind": "refuse"})


def _draft_continuation(draw: random.Random) -> _Draft:
    """Draw how much is given before the story, so that the rest is a sample of what may follow."""
    given, lines = draw.randint(2, _MOST_LINES), list[str]()
    while len(lines) <= given:
        story = _random_story(draw)
        lines = read_story(story.text).text
    prefix = "".join(lines[:given]).lstrip()
    world = read_story(prefix)
    assert world.moment is not None
    log_probability = story.log_probability - world.log_probability
    entropy = measure_rest(world.moment, world.tags).nats
    asked = {"story": prefix}
    goal = {"kind": "continue", **asked}
    return _Draft(asked, asked, story.text[len(prefix) :].strip(), goal, log_probability, entropy)


def _draft_answer(draw: random.Random) -> _Draft | None:
    """Ask about a whole story, or who has the thing after a part of it."""
    story = _random_story(draw).text
    if draw.random() < 0.5:
        known = answers(read_story(story))
        question, answer = draw.choice(known)
    else:
        lines = read_story(story).text
        story = "".join(lines[: draw.randrange(3, len(lines))]).lstrip()
        world = read_story(story)
        if "noun" not in world.chosen:
            return None
        question = _texts()["texts"]["holder"].format(noun=world.chosen["noun"].text)
        answer = world.holder
    answer = answer.removeprefix("the ")
    asked = {"story": story, "question": question}
    return _Draft(asked, asked, f"{answer[0].upper()}{answer[1:]}.", {"kind": "answer", "answer": answer})


def _draft_mending(draw: random.Random) -> _Draft | None:
    story = _random_story(draw).text
    changed = with_fault(story, [name for name, fault in FAULTS.items() if fault.mendable], draw)
    if changed is None:
        return None
    asked = {"story": changed[0]}
    return _Draft(asked, asked, story, {"kind": "mend", "story": story})


class Kind(NamedTuple):
    """How tasks of a kind are made, None where the draw gave none, and how often."""

    weight: int
    make: Callable[[random.Random], _Draft | None]


# By name; a new one is one line, its wordings, and a checker.
KINDS: dict[str, Kind] = {
    "tell": Kind(5, _draft_story),
    "continue": Kind(1, _draft_continuation),
    "answer": Kind(2, _draft_answer),
    "mend": Kind(1, _draft_mending),
    "refuse": Kind(1, _draft_refusal),
}


def _random_story(draw: random.Random) -> Story:
    """Sample a story; those of a corpus have other seeds."""
    return tell_story(draw.randrange(_UNNUMBERED), 0)


def _facts_and_story(draw: random.Random) -> tuple[dict[str, str], Story]:
    """Draw which facts are given, and then a story among those that have such facts.

    In this order, so that the story is a sample of p(story | facts): were it drawn first, facts that are more often
    named where a story has fewer of them would tell something about it.
    """
    names = draw.sample(FACTS, draw.randint(1, _MOST_FACTS))
    if "hero" in names and draw.random() < _WITH_KIND:
        names.append("kind")
    while True:
        story = _random_story(draw)
        facts = facts_of(read_story(story.text))
        if facts.keys() >= set(names):
            return {name: facts[name] for name in sorted(names)}, story


def _list_facts(facts: Mapping[str, str], draw: random.Random) -> str:
    """Write facts as a list in words, in any order."""
    texts = _texts()
    pair = texts["pairs"]["hero_kind"] if facts.keys() >= {"hero", "kind"} else None
    parts = [pair.format_map(facts)] if pair else []
    for name, text in facts.items():
        if name == PLOT:
            parts.append(texts["plots"][text])
        elif not (pair and name in ("hero", "kind")):
            parts.append(_with_article(texts["facts"][name].format(text)))
    draw.shuffle(parts)
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _with_article(text: str) -> str:
    """Turn a into an before a vowel."""
    return f"an {text[2:]}" if text.startswith(("a a", "a e", "a i", "a o", "a u")) else text


@functools.cache
def _texts() -> Mapping[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("tasks.toml").read_text(encoding="utf-8"))


def _wordings(kind: str) -> list[str]:
    """Return the wordings of a kind; a story that does not exist is asked for as any other."""
    return list(_texts()["wordings"]["tell" if kind == "refuse" else kind])


def _check_tell(goal: Goal, reply: str) -> dict[str, bool]:
    verdict, facts = check_story(reply), facts_of(read_story(reply))
    met = all(facts.get(name) == text for name, text in goal["facts"].items())
    return {"facts": met, "consistent": verdict.parses and not _contradicts(verdict.problems), "ends": verdict.ends}


def _check_continue(goal: Goal, reply: str) -> dict[str, bool]:
    verdict = check_story(f"{goal['story']} {reply}")
    return {"consistent": verdict.parses and not _contradicts(verdict.problems), "ends": verdict.ends}


def _contradicts(problems: Sequence[str]) -> bool:
    """Whether anything is wrong beside a missing end, which is a component of its own."""
    return any(problem != "the story does not end" for problem in problems)


def _check_answer(goal: Goal, reply: str) -> dict[str, bool]:
    said = reply.strip().removesuffix(".").casefold()
    return {"correct": said.removeprefix("the ") == goal["answer"].casefold()}


def _check_mend(goal: Goal, reply: str) -> dict[str, bool]:
    verdict = check_story(reply)
    return {"mended": reply.split() == goal["story"].split(), "consistent": verdict.consistent}


def _check_refuse(_goal: Goal, reply: str) -> dict[str, bool]:
    return {"refused": reply.split() == _texts()["texts"]["refusal"].split()}


# What a reply shows, by the kind of the task.
CHECKERS: dict[str, Callable[[Goal, str], dict[str, bool]]] = {
    "tell": _check_tell,
    "continue": _check_continue,
    "answer": _check_answer,
    "mend": _check_mend,
    "refuse": _check_refuse,
}
