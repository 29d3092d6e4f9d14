"""Preference optimization: DPO, IPO and SimPO on pairs of a chosen and a rejected reply to the same prompt."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from gemmule.data.batches import Batch
from gemmule.distributed import World
from gemmule.fields import NotNegative, Positive, Text
from gemmule.settings import Problem, Settings
from gemmule.train.log_probabilities import target_log_probabilities
from gemmule.train.loss import IGNORED
from gemmule.train.objective import Forward

# The key of `Batch.inputs` with the reference's log-probability of each document of a row, (B,M).
REFERENCE = "reference"


class PreferenceSettings(Settings):
    """Preference optimization, for data.kind = "preferences"."""

    loss: Text = Field(
        "dpo",
        description="dpo (direct preference optimization), ipo (squared, on means over tokens) or simpo (without a "
        "reference, on means over tokens)",
    )
    beta: Positive = Field(
        0.1, description="how strongly the policy is held to the reference; in simpo the scale of the rewards"
    )
    label_smoothing: NotNegative = Field(
        0.0, description="share of the pairs whose labels are taken to be wrong (conservative DPO), below 0.5"
    )
    target_margin: NotNegative = Field(0.5, description="simpo's target reward margin (gamma)")
    sft_weight: NotNegative = Field(
        0.0, description="weight of the cross-entropy of the chosen replies, in nats per token, added to the loss"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield losses that do not exist, and label smoothing that turns preferences around."""
        if self.loss not in LOSSES:
            yield Problem("loss", self.loss, f"no such loss; there are {', '.join(LOSSES)}")
        if self.label_smoothing >= 0.5:
            yield Problem("label_smoothing", self.label_smoothing, "must be below 0.5")
        if self.loss == "ipo" and self.label_smoothing:
            yield Problem("label_smoothing", self.label_smoothing, "ipo has none; leave it out, or use dpo")


class Replies(NamedTuple):
    """The chosen replies of some pairs, or the rejected ones."""

    policy: Tensor  # summed log-probability of each reply in nats
    reference: Tensor
    tokens: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """The log-probability of policy over reference."""
        return self.policy - self.reference


class PreferenceLoss(NamedTuple):
    """A loss of the margin between the implicit rewards of a chosen and a rejected reply."""

    reward: Callable[[Replies, PreferenceSettings], Tensor]
    loss: Callable[[Tensor, PreferenceSettings], Tensor]
    needs_reference: bool = True


def _smoothed(margin: Tensor, settings: PreferenceSettings) -> Tensor:
    """Return -log sigmoid(margin), where a share of the pairs may be labelled the wrong way round."""
    smoothing = settings.label_smoothing
    return -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)


# A new one is one line.
LOSSES: dict[str, PreferenceLoss] = {
    # Rafailov et al., arXiv 2305.18290.
    "dpo": PreferenceLoss(lambda replies, settings: settings.beta * replies.log_ratio, _smoothed),
    # Azar et al., arXiv 2310.12036; on means over tokens as in TRL.
    "ipo": PreferenceLoss(
        lambda replies, _: replies.log_ratio / replies.tokens,
        lambda margin, settings: (margin - 1 / (2 * settings.beta)).square(),
    ),
    # Meng et al., arXiv 2405.14734.
    "simpo": PreferenceLoss(
        lambda replies, settings: settings.beta * replies.policy / replies.tokens,
        lambda margin, settings: _smoothed(margin - settings.target_margin, settings),
        needs_reference=False,
    ),
}


class Preferences:
    """The mean loss over pairs; documents 2j and 2j + 1 of a row are the chosen and the rejected reply of pair j.

    The reference's log-probabilities come with the batch, so that no second model is in memory.
    """

    on_policy = False

    def __init__(self, settings: PreferenceSettings) -> None:
        self._settings, self._loss = settings, LOSSES[settings.loss]
        self._sums: list[Tensor] = []

    def begin_step(self, batch: Batch) -> int:
        """Return the number of pairs."""
        self._sums = []
        return int(_sums_of_documents(batch, batch.targets != IGNORED)[:, ::2].count_nonzero())

    def summed_loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Sum the loss over pairs, with the cross-entropy of the chosen replies as far as it is weighed in."""
        head = target_log_probabilities(batch.targets)
        chosen, rejected = _pairs(batch, forward(batch.tokens, documents=batch.documents, output_head=head))
        margin = self._loss.reward(chosen, self._settings) - self._loss.reward(rejected, self._settings)
        losses = self._loss.loss(margin, self._settings)
        if self._settings.sft_weight:
            losses = losses - self._settings.sft_weight * chosen.policy / chosen.tokens
        figures = (margin, margin > 0, chosen.policy, chosen.tokens, rejected.policy, rejected.tokens)
        self._sums.append(torch.stack([torch.ones_like(margin), *figures]).detach().sum(dim=1))
        return losses.sum()

    def metrics(self, world: World) -> dict[str, float]:
        """Return means over the pairs of the step, log-probabilities in nats per reply."""
        pairs, *sums = world.all_reduce_sum(*torch.stack(self._sums).sum(dim=0).tolist())
        return {name: value / max(1, pairs) for name, value in zip(METRICS, sums, strict=True)}


METRICS = (
    "reward_margin", "preference_accuracy", "chosen_log_probability", "chosen_tokens", "rejected_log_probability",
    "rejected_tokens",
)  # fmt: skip


def _pairs(batch: Batch, log_probabilities: Tensor) -> tuple[Replies, Replies]:
    """Gather the chosen and the rejected replies of a batch from log-probabilities of its targets (B,T)."""
    policy = _sums_of_documents(batch, log_probabilities)
    tokens = _sums_of_documents(batch, batch.targets != IGNORED)
    there = tokens[:, ::2] > 0
    columns = (policy, batch.inputs[REFERENCE], tokens)
    chosen, rejected = (Replies(*(each[:, first::2][there] for each in columns)) for first in (0, 1))
    return chosen, rejected


def _sums_of_documents(batch: Batch, values: Tensor) -> Tensor:
    """Sum values of targets (B,T) over each document, as (B,M) like the reference; M is even."""
    assert batch.documents is not None
    number = batch.inputs[REFERENCE].shape[1]
    places = batch.documents.long().where(batch.targets != IGNORED, number)  # the last column is left out
    sums = torch.zeros(len(values), number + 1, dtype=torch.float32, device=values.device)
    return sums.scatter_add(1, places, values.float())[:, :number]
