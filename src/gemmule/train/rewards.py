"""Reinforcement learning from rewards that a program checks: the group-relative policy gradient (GRPO) on own replies.

Of each prompt a group of replies is sampled; a reply's advantage is its reward less the group's mean. The loss is
summed over the tokens of all replies and divided by their number in the whole step (DAPO, arXiv 2503.14476), so that
long and short replies weigh by their tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gemmule.data.batches import IGNORED, Batch
from gemmule.distributed import World
from gemmule.fields import Count, NotNegative, Positive, Text
from gemmule.model.gemma3 import OutputHead
from gemmule.settings import NOTHING, Problem, Settings
from gemmule.train.log_probabilities import target_log_probabilities
from gemmule.train.objective import Forward
from gemmule.train.settings import TrainSettings

# Keys of `Batch.inputs`: advantages (B,); log p of the targets under the model that sampled them and under the one that
# training starts from, (B,T), both at the temperature of sampling.
ADVANTAGE, SAMPLED, REFERENCE = "advantage", "sampled", "reference"


class RewardSettings(Settings):
    """Rewards for replies to prompts (GRPO), for data.kind = "prompts".

    A step has train.batch_size replies, to train.batch_size / replies prompts.
    """

    reward: Text = Field(
        "task",
        description="what a reply earns: task (the checker of the prompt's task), ended, or file.py:function, called "
        "with (messages, reply, row) and returning a number or a table of numbers",
    )
    components: tuple[Text, ...] = Field(
        (), strict=False, description="components whose weighted sum is the reward; without it, solved of task, or all"
    )
    weights: tuple[float, ...] = Field(
        (), strict=False, description="weights of the components, as many; without it, 1 each"
    )
    replies: Annotated[int, Field(ge=2, le=1024)] = Field(8, description="replies to a prompt, the group")
    max_reply_tokens: Count = Field(200, description="tokens after which a reply is cut off")
    temperature: Positive = Field(1.0, description="of sampling, and of the probabilities that are trained")
    scale_by_deviation: bool = Field(
        False, description="divide advantages by the standard deviation of the group's rewards (GRPO's own form)"
    )
    steps_per_rollout: Count = Field(1, description="optimizer steps on the same replies")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="how far below 1 the ratio to the sampling model's probability has an effect"
    )
    clip_high: Positive = Field(0.28, description="how far above 1 it has one")
    kl: NotNegative = Field(
        0.0, description="weight of the KL divergence from the model of train.start, in nats per token"
    )
    call_seconds: Positive = Field(10.0, description="seconds that a call of file.py:function may take")

    def problems(self) -> Iterator[Problem]:
        """Yield weights that do not fit the components."""
        if self.weights and len(self.weights) != len(self.components):
            advice = f"must be as many as rewards.components ({len(self.components)})"
            yield Problem("weights", self.weights, advice)


def problems_of_rewards(rewards: RewardSettings, train: TrainSettings, strategy: str) -> Iterator[Problem]:
    """Yield settings of a recipe that do not fit its rewards."""
    if train.start is None:
        yield Problem("train.start", NOTHING, "name the MODEL that rewards are earned by")
    if train.minutes is not None:
        yield Problem("train.minutes", train.minutes, "replies change their length in training; set train.steps")
    if strategy != "ddp":
        yield Problem("parallel.strategy", strategy, "each process generates replies with the whole model; use ddp")
    if train.batch_size % rewards.replies:
        yield Problem(
            "train.batch_size", train.batch_size, f"must be a multiple of rewards.replies ({rewards.replies})"
        )
    for name in ("steps", "checkpoint_every", "validate_every"):
        if getattr(train, name) % rewards.steps_per_rollout:
            own = rewards.steps_per_rollout
            advice = f"must be a multiple of rewards.steps_per_rollout ({own}), whose steps have the same replies"
            yield Problem(f"train.{name}", getattr(train, name), advice)


def advantages(rewards: Tensor, scale_by_deviation: bool = False) -> Tensor:
    """Return how much better each reply is than its group's mean, for rewards (groups, replies)."""
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale_by_deviation:
        return centered
    return centered / (rewards.std(dim=1, keepdim=True) + 1e-4)  # as in TRL


def at_temperature(head: OutputHead, temperature: float) -> OutputHead:
    """Return an output head whose logits are divided by a temperature."""
    if temperature == 1:
        return head
    return lambda hidden, vocabulary: head(hidden / temperature, vocabulary)


class PolicyGradient:
    """The clipped policy gradient over replies, with a KL term; every token of a reply has the reply's advantage."""

    on_policy = True

    def __init__(self, settings: RewardSettings, rollout_metrics: Callable[[World], Mapping[str, float]]) -> None:
        """Take the metrics of the replies from their source, to be logged with those of the loss."""
        self._settings, self._rollout_metrics = settings, rollout_metrics
        self._sums: list[Tensor] = []

    def begin_step(self, batch: Batch) -> int:
        """Return the number of tokens of replies."""
        self._sums = []
        return batch.num_targets

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Sum the loss over the tokens of replies."""
        settings, known = self._settings, batch.targets != IGNORED
        head = at_temperature(target_log_probabilities(batch.targets), settings.temperature)
        logs = forward(batch.tokens, documents=batch.documents, output_head=head)
        # With one step for each sample the sampling model is the one that is trained, and the ratio is 1.
        ratio = (logs - batch.inputs.get(SAMPLED, logs.detach())).exp()
        advantage = batch.inputs[ADVANTAGE][:, None]
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        losses = -torch.minimum(ratio * advantage, clipped * advantage)
        # Schulman's k3: an estimate from the sampled token that is never negative. Weighted by the ratio, its gradient
        # is that of the divergence, too (as in TRL).
        difference = batch.inputs[REFERENCE] - logs
        divergence = (difference.exp() - difference - 1) * ratio
        if settings.kl:
            losses = losses + settings.kl * divergence
        without_effect = (clipped * advantage < ratio * advantage) & (clipped != ratio)
        figures = (torch.ones_like(logs), -logs, divergence, without_effect.float())
        self._sums.append(torch.stack([each.detach()[known].sum() for each in figures]))
        return losses[known].sum()

    def metrics(self, world: World) -> dict[str, float]:
        """Return what the replies earn and are like, and means over their tokens.

        `entropy` is the mean of -log p of the sampled tokens, an unbiased estimate of the entropy in nats.
        """
        tokens, *sums = world.all_reduce_sum(*torch.stack(self._sums).sum(dim=0).tolist())
        means = dict(zip(("entropy", "kl", "clipped"), (each / max(1, tokens) for each in sums), strict=True))
        return {**self._rollout_metrics(world), **means}
