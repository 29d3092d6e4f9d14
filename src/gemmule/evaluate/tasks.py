"""Held-out tasks that a model answers: how many are solved, by kind and by component, and what its stories are like."""

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from gemmule.data.settings import DataSettings
from gemmule.data.sources import read_source
from gemmule.data.tasks import HELD_OUT_WORDING, check_task
from gemmule.errors import ModelError, RecipeError
from gemmule.evaluate.stories import Progress, mean_of, rate_of, suite_file
from gemmule.fields import Count, CountFrom0, Text
from gemmule.inference.engine import reply_to_all, stop_tokens
from gemmule.inference.requests import requests_of
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import local_path
from gemmule.settings import Settings, read_recipe
from gemmule.storybook import log_probability, measure_stories
from gemmule.storybook.check import read_story
from gemmule.storybook.tasks import facts_of
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import render_chat

_AT_ONCE = 128  # replies that are generated as one batch


class TaskSuite(Settings):
    """Tasks, seeds and sampling parameters of the replies that a model is judged by."""

    tasks: Text = Field(
        description="SOURCE of the tasks, of its validation split: storybook-tasks[:count[:start[:kinds]]] or "
        "text-tasks:SOURCE",
        examples=["storybook-tasks:500"],
    )
    seed: CountFrom0 = Field(1, description="seed of the first reply; the others have those that follow")
    max_new_tokens: Count = Field(300, description="tokens after which a reply is cut off")
    sampling: SamplingSettings = SamplingSettings()


class Answer(NamedTuple):
    """A task and a model's reply."""

    instruction: str
    task: Mapping[str, Any]
    seed: int
    reply: str
    tokens: int  # generated, the end included
    ended: bool  # whether by a stop token


def is_task_suite(name: str) -> bool:
    """Whether a suite is one of tasks rather than of prompts; RecipeError where there is none of this name."""
    try:
        return "tasks" in tomllib.loads(suite_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said when it is read as a suite
        return False


def open_task_suite(name: str) -> TaskSuite:
    """Read a suite of tasks; RecipeError where it is not valid."""
    suite = read_recipe(suite_file(name), TaskSuite)
    if not suite.tasks.startswith(("storybook-tasks", "text-tasks:")):
        raise RecipeError(f"{local_path(name)}: tasks = {suite.tasks!r}: must be storybook-tasks or text-tasks:SOURCE")
    return suite


def answer_suite(
    model: Gemma3, tokenizer: Tokenizer, suite: TaskSuite, progress: Progress = lambda *_: None
) -> list[Answer]:
    """Answer the tasks of a suite; the same model gives the same replies.

    TokenizerError for a vocabulary without turn tokens, ModelError for a prompt longer than the model's positions.
    """
    settings = DataSettings(train=(suite.tasks,), kind="prompts")
    rows = [json.loads(document.text) for document in read_source(suite.tasks, settings, "validation")]
    stops, answers = stop_tokens(tokenizer), list[Answer]()
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        prompts = [render_chat(tokenizer, row["messages"], reply=True).ids for row in some]
        longest, positions = max(map(len, prompts)), model.config.max_position_embeddings
        if longest >= positions:
            raise ModelError(f"a prompt has {longest} tokens; this model's max_position_embeddings is {positions}")
        limit = min(suite.max_new_tokens, positions - longest)
        replies = reply_to_all(model, requests_of(prompts, limit, stops, suite.sampling, suite.seed + first))
        for number, (row, reply) in enumerate(zip(some, replies, strict=True), first):
            ended = bool(reply) and reply[-1] in stops
            text = tokenizer.decode(reply[:-1] if ended else reply)
            instruction = row["messages"][-1]["content"]
            answers.append(Answer(instruction, row["task"], suite.seed + number, text, len(reply), ended))
        progress("answering tasks", first + len(some), len(rows))
    return answers


def judge_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many tasks are solved, in all and by kind and component, with each one of them in `items`.

    A rate is {rate, hits, count, interval}, a mean {mean, count, interval}. A task is solved where all components are
    met and the reply ended by itself. What the told stories are like is in `storybook`: their surprise to the book
    where it could have told them, and how many heroes, things and plots they have, which a reward can lower unseen.
    """
    items = []
    for answer in answers:
        components = check_task(answer.task, answer.reply)
        items.append(
            {**answer._asdict(), "components": components, "solved": answer.ended and all(components.values())}
        )
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        kinds[item["task"]["kind"]].append(item)
    result: dict[str, Any] = {
        "tasks": len(items),
        "solved": rate_of([item["solved"] for item in items]),
        "ended": rate_of([item["ended"] for item in items]),
        "tokens": mean_of([item["tokens"] for item in items]),
        "different": len({item["reply"] for item in items}),
        "kinds": {kind: _judge_kind(kinds[kind]) for kind in sorted(kinds)},
    }
    if "tell" in kinds:
        result["storybook"] = _judge_told([item["reply"] for item in kinds["tell"]])
    return {**result, "items": items}


def _judge_kind(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for item in items for name in item["components"])
    found: dict[str, Any] = {"solved": rate_of([item["solved"] for item in items])}
    new = [item["solved"] for item in items if item["task"].get(HELD_OUT_WORDING)]
    found |= {"solved_in_held_out_wordings": rate_of(new)} if new else {}
    for name in names:
        met = [bool(item["components"][name]) for item in items if name in item["components"]]
        found[name] = rate_of(met)
    return found


def _judge_told(stories: Sequence[str]) -> dict[str, Any]:
    surprises = [-log_probability(story) for story in stories]
    facts = [facts_of(read_story(story)) for story in stories]
    different = {name: len({each[name] for each in facts if name in each}) for name in ("hero", "noun", "plot")}
    return {
        "possible": rate_of([math.isfinite(surprise) for surprise in surprises]),
        "surprise": mean_of([surprise if math.isfinite(surprise) else None for surprise in surprises]),
        "entropy": measure_stories().nats,
        "different_heroes": different["hero"],
        "different_things": different["noun"],
        "different_plots": different["plot"],
    }


def describe_answers(result: Mapping[str, Any]) -> list[str]:
    """Put what the replies show into sentences."""

    def rate(each: Mapping[str, Any]) -> str:
        low, high = each["interval"]
        return f"{each['rate']:.1%} ({low:.1%} to {high:.1%})"

    sentences = [
        f"of {result['tasks']:,} tasks, {rate(result['solved'])} are solved; {rate(result['ended'])} of the replies "
        f"end, with {result['tokens']['mean']:.0f} tokens on average; {result['different']:,} are different"
    ]
    for kind, found in result["kinds"].items():
        parts = [f"{name.replace('_', ' ')} {rate(each)}" for name, each in found.items()]
        sentences.append(f"{kind} ({found['solved']['count']:,}): {', '.join(parts)}")
    if book := result.get("storybook"):
        sentence = f"stories: the storybook could have told {rate(book['possible'])}"
        if book["surprise"]["mean"] is not None:
            sentence += f", whose surprise to it is {book['surprise']['mean']:.1f} nats"
        sentence += (
            f"; {book['different_heroes']} different heroes, {book['different_things']} things, "
            f"{book['different_plots']} plots"
        )
        sentences.append(sentence)
    return sentences
