"""Rollouts: replies of the model in training to prompts, graded, as the rows of a step."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmule.compiler import uncompiled
from gemmule.data.batches import IGNORED, Batch
from gemmule.data.corpus import Corpus
from gemmule.data.dataset import Dataset
from gemmule.data.rendering import read_prompts
from gemmule.distributed import World
from gemmule.errors import RecipeError
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import derive_seed
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.train.log_probabilities import target_log_probabilities
from gemmule.train.parallel import Parallel
from gemmule.train.reward_functions import Grade, Grader, RewardWatch, Sample
from gemmule.train.rewards import (
    ADVANTAGE,
    REFERENCE,
    SAMPLED,
    PolicyGradient,
    RewardSettings,
    advantages,
    at_temperature,
)
from gemmule.train.settings import TrainSettings
from gemmule.train.state import TrainState

log = logging.getLogger(__name__)

_ROUND = 32  # rows have a length that is a multiple of it, so that few shapes occur


class Prompt(NamedTuple):
    """A prompt to be answered: its tokens, the start of the model's turn included, and the seed of its replies."""

    ids: tuple[int, ...]
    seed: int


# (model, prompts, replies to each, max_new_tokens, temperature, stop tokens) -> the tokens of the replies to each
# prompt, the stop token included: a function of these alone.
ReplyFunction = Callable[[Gemma3, Sequence[Prompt], int, int, float, frozenset[int]], list[list[list[int]]]]


class Prompts:
    """The prompts of a corpus, in an order of their own in each epoch."""

    def __init__(self, corpus: Corpus, settings: RewardSettings, context: int, seed: int) -> None:
        """Read all prompts; RecipeError where one of them and a reply are longer than the context."""
        self.rows = read_prompts(corpus)
        self.ids = [
            tuple(corpus.read(number, 0, int(corpus.lengths[number])).tolist()) for number in range(corpus.documents)
        ]
        self._seed, self._order = seed, lru_cache(maxsize=2)(self._shuffle)  # a step may span two epochs
        longest = max(map(len, self.ids))
        if longest + settings.max_reply_tokens > context + 1:
            advice = (
                f"is too short: the longest prompt has {longest} tokens, and a reply up to {settings.max_reply_tokens} "
                f"(rewards.max_reply_tokens); use {longest + settings.max_reply_tokens - 1} or more"
            )
            raise RecipeError(str(Problem("train.context", context, advice)))

    def of_group(self, group: int) -> int:
        """Return the number of the prompt that a group of replies answers; a pure function of seed and group."""
        epoch, within = divmod(group, len(self.ids))
        return int(self._order(epoch)[within])

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "prompts", epoch))
        return torch.randperm(len(self.ids), generator=generator)


class Policy:
    """The model in training as one that answers prompts."""

    def __init__(
        self, parallel: Parallel, tokenizer: Tokenizer, settings: RewardSettings, reply: ReplyFunction
    ) -> None:
        self.parallel, self._tokenizer, self._settings, self._reply = parallel, tokenizer, settings, reply
        self._stops = frozenset(tokenizer.stop_ids)

    def answer(self, prompts: Sequence[Prompt], replies: int) -> list[list[list[int]]]:
        """Return the tokens of so many replies to each prompt."""
        model, settings = self.parallel.model, self._settings
        model.eval()
        found = self._reply(model, prompts, replies, settings.max_reply_tokens, settings.temperature, self._stops)
        model.train()
        return found

    def sample(self, row: Mapping[str, Any], reply: Sequence[int]) -> Sample:
        """Return a reply as text, without the stop token that ended it."""
        ended = bool(reply) and reply[-1] in self._stops
        return Sample(row, self._tokenizer.decode(reply[:-1] if ended else reply), ended)


class Rollouts:
    """The stream of rows in which every row is a reply of the model as it is when the row is read.

    Rows follow each other by groups. A step on replies that were made before gets the same rows. Replies depend on the
    weights, the seed and the number of the row alone, so that a resumed run repeats them.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Prompts,
        settings: RewardSettings,
        train: TrainSettings,
        reference: Gemma3,
        grader: Grader,
    ) -> None:
        """Grade replies with `grader`, and score them by a `reference`, whose weights stay as they are."""
        self._policy, self._prompts, self._settings, self._train = policy, prompts, settings, train
        self._grader, self._watch = grader, RewardWatch()
        self._reference = reference.to(policy.parallel.runtime.device).eval().requires_grad_(requires_grad=False)
        self._made: tuple[tuple[int, int, int], Batch] | None = None
        self._figures: dict[str, tuple[float, float]] = {}  # sums and counts of the rows made last

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`, all of one step and whole groups."""
        step, offset = divmod(first, self._train.batch_size)
        key = (step // self._settings.steps_per_rollout, offset, count)
        if self._made is None or self._made[0] != key:
            self._made = key, self._make(*key)
        return self._made[1]

    def metrics(self, world: World) -> dict[str, float]:
        """Return means over the replies of all ranks; every rank calls it."""
        names = world.broadcast(sorted(self._figures))  # a kind of task that occurs on another rank alone is left out
        pairs = [self._figures.get(name, (0.0, 0.0)) for name in names]
        sums = world.all_reduce_sum(*(value for pair in pairs for value in pair))
        return {name: sums[2 * i] / max(1.0, sums[2 * i + 1]) for i, name in enumerate(names)}

    def _make(self, rollout: int, offset: int, count: int) -> Batch:
        size = self._settings.replies
        groups = range(offset // size, (offset + count) // size)
        numbers = [self._prompts.of_group(rollout * (self._train.batch_size // size) + group) for group in groups]
        prompts = [
            Prompt(self._prompts.ids[number], derive_seed(self._train.seed, "replies", rollout, group))
            for number, group in zip(numbers, groups, strict=True)
        ]
        answers = self._policy.answer(prompts, size)
        replies = [reply for group in answers for reply in group]
        samples = [
            self._policy.sample(self._prompts.rows[number], reply)
            for number, group in zip(numbers, answers, strict=True)
            for reply in group
        ]
        grades = [self._grader.grade(sample) for sample in samples]
        if warning := self._watch.note(grades):
            log.warning(f"step {rollout * self._settings.steps_per_rollout + 1}: {warning}")
        rewards = torch.tensor([grade.reward for grade in grades], dtype=torch.float32).view(-1, size)
        self._figures = _figures(samples, grades, replies)
        without_signal = rewards.max(dim=1).values == rewards.min(dim=1).values
        self._figures["no_signal"] = float(without_signal.sum()), float(len(rewards))
        batch = self._rows_of([prompt.ids for prompt in prompts for _ in range(size)], replies)
        inputs = {ADVANTAGE: advantages(rewards, self._settings.scale_by_deviation).flatten()}
        inputs[REFERENCE] = self._score(self._reference, batch)
        if self._settings.steps_per_rollout > 1:
            inputs[SAMPLED] = self._score(self._policy.parallel.model, batch)
        return batch._replace(inputs=inputs)

    def _rows_of(self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> Batch:
        """Return a row for each reply; no token attends to the padding, which is after all of them."""
        longest = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True)) - 1
        rounded = min(-(-longest // _ROUND) * _ROUND, self._train.context)
        length = self._train.context if self._train.compile else rounded
        tokens = torch.zeros((len(replies), length), dtype=torch.int64)
        targets = torch.full((len(replies), length), IGNORED, dtype=torch.int64)
        for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            ids = torch.tensor([*prompt, *reply], dtype=torch.int64)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        return Batch(tokens, targets, None)

    @torch.no_grad()
    def _score(self, model: Gemma3, batch: Batch) -> Tensor:
        """Return the log-probabilities of the targets (B,T) under a model, at the temperature of sampling."""
        runtime, found = self._policy.parallel.runtime, []
        for part in batch.split(self._train.micro_batch_size or len(batch.tokens)):
            on_device = part.to(runtime.device)
            head = at_temperature(target_log_probabilities(on_device.targets), self._settings.temperature)
            with uncompiled(), runtime.autocast():
                found.append(model(on_device.tokens, output_head=head).cpu())
        return torch.cat(found)


def _figures(
    samples: Sequence[Sample], grades: Sequence[Grade], replies: Sequence[Sequence[int]]
) -> dict[str, tuple[float, float]]:
    """Return sums and counts by name: the reward and each component, lengths and ends of the replies."""
    figures: dict[str, list[float]] = {"reward": [grade.reward for grade in grades]}
    for grade in grades:
        for kind, components in (("reward", grade.components), ("check", grade.checks)):
            for name, value in components.items():
                if name != "reward":
                    figures.setdefault(f"{kind}_{name}", []).append(value)
    figures["reply_tokens"] = [float(len(reply)) for reply in replies]
    figures["ended"] = [float(sample.ended) for sample in samples]
    return {name: (sum(values), float(len(values))) for name, values in figures.items()}


class RewardScore(NamedTuple):
    """What the replies to prompts earn on average, and are like."""

    means: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The negative of the reward, of which less is better."""
        return -self.means["reward"]

    def figures(self) -> dict[str, float | None]:
        """Return the means under the names that metrics and reports use."""
        return dict(self.means)


class RewardValidation:
    """One reply to each of some held-out prompts, with the same seeds each time."""

    def __init__(self, policy: Policy, prompts: Prompts, grader: Grader, seed: int, limit: int = 128) -> None:
        """Answer the first `limit` prompts."""
        self._policy, self._grader = policy, grader
        self._rows = prompts.rows[:limit]
        self._asked = [Prompt(ids, derive_seed(seed, "validation", n)) for n, ids in enumerate(prompts.ids[:limit])]

    def score(self) -> RewardScore:
        """Answer the prompts on the main rank, and grade the replies; every rank calls it."""
        world = self._policy.parallel.world
        score = world.broadcast(self._measure() if world.is_main else None)
        assert score is not None
        return score

    def _measure(self) -> RewardScore:
        replies = [reply for (reply,) in self._policy.answer(self._asked, 1)]
        samples = [self._policy.sample(row, reply) for row, reply in zip(self._rows, replies, strict=True)]
        figures = _figures(samples, [self._grader.grade(sample) for sample in samples], replies)
        return RewardScore({name: total / count for name, (total, count) in figures.items()})


class RewardTraining(NamedTuple):
    """What a run with rewards trains on, and is validated by."""

    rows: Rollouts
    objective: PolicyGradient
    validate: Callable[[], RewardScore]
    close: Callable[[], None]


def open_rewards(
    settings: RewardSettings, train: TrainSettings, dataset: Dataset, state: TrainState, start: Gemma3,
    reply: ReplyFunction,
) -> RewardTraining:  # fmt: skip
    """Open prompts and reward; RecipeError or DatasetError before anything is generated. `start` is the reference."""
    world = state.parallel.world
    size = settings.replies * world.size
    if train.batch_size % size:
        advice = f"must be whole groups of rewards.replies ({settings.replies}) for each process, such as {size}"
        raise RecipeError(str(Problem("train.batch_size", train.batch_size, advice)))
    prompts, held_out = (
        Prompts(corpus, settings, train.context, train.seed) for corpus in (dataset.train, dataset.validation)
    )
    grader = Grader(settings, [*prompts.rows, *held_out.rows], fresh=state.position.step == 0)
    policy = Policy(state.parallel, dataset.tokenizer, settings, reply)
    rows = Rollouts(policy, prompts, settings, train, start, grader)
    validation = RewardValidation(policy, held_out, grader, train.seed)
    return RewardTraining(rows, PolicyGradient(settings, rows.metrics), validation.score, grader.close)
