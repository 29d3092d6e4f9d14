"""Preference optimization: DPO, IPO and SimPO on pairs of a chosen and a rejected reply to the same prompt."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from gemmule.compiler import uncompiled
from gemmule.data.batches import Batch
from gemmule.data.conversation_packing import PackedConversations
from gemmule.distributed import SINGLE_PROCESS, World
from gemmule.fields import NotNegative, Positive, Text
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime
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
        figures = (
            margin, margin > 0, chosen.log_ratio, chosen.policy, chosen.tokens, rejected.policy, rejected.tokens
        )  # fmt: skip
        self._sums.append(torch.stack([torch.ones_like(margin), *figures]).detach().sum(dim=1))
        return losses.sum()

    def metrics(self, world: World) -> dict[str, float]:
        """Return means over the pairs of the step, log-probabilities in nats per reply."""
        pairs, *sums = world.all_reduce_sum(*torch.stack(self._sums).sum(dim=0).tolist())
        return {name: value / max(1, pairs) for name, value in zip(METRICS, sums, strict=True)}


class PreferenceRows:
    """Training rows of whole pairs, with the reference's log-probability of each reply (0 without a reference)."""

    def __init__(self, pairs: PackedConversations, reference: npt.NDArray[np.float32] | None = None) -> None:
        self.pairs, self._reference = pairs, reference

    def rows(self, first: int, count: int) -> Batch:
        """Return rows `first` to `first + count`; deterministic, a pure function of (seed, first, count)."""
        batch = self.pairs.rows(first, count)
        reference = np.zeros((count, self.pairs.most_documents), np.float32)
        if self._reference is not None:
            for row in range(count):
                members = self.pairs.documents(first + row)
                reference[row, : len(members)] = self._reference[members]
        return batch._replace(inputs={REFERENCE: torch.from_numpy(reference)})


class PreferenceScore(NamedTuple):
    """The validation of a model on preferences: means over pairs."""

    loss: float
    metrics: dict[str, float]

    def figures(self) -> dict[str, float | None]:
        """Return the loss and the means that are logged in training, too."""
        return {"loss": self.loss, **self.metrics}


@torch.no_grad()
def score_preferences(
    model: Gemma3, rows: PreferenceRows, at_once: int, objective: Preferences, runtime: Runtime
) -> PreferenceScore:
    """Return the loss and the metrics over each pair once; every rank computes all of it."""
    was_training = model.training
    model.eval()
    total, pairs, sums = 0.0, 0, dict.fromkeys(METRICS, 0.0)
    for first in range(0, rows.pairs.rows_per_epoch, at_once):
        batch = rows.rows(first, min(at_once, rows.pairs.rows_per_epoch - first)).to(runtime.device)
        count = objective.begin_step(batch)
        with uncompiled(), runtime.autocast():
            total += objective.summed_loss(model, batch).item()
        for name, value in objective.metrics(SINGLE_PROCESS).items():
            sums[name] += value * count
        pairs += count
    model.train(was_training)
    return PreferenceScore(total / pairs, {name: value / pairs for name, value in sums.items()})


METRICS = (
    "reward_margin", "preference_accuracy", "chosen_log_ratio", "chosen_log_probability", "chosen_tokens",
    "rejected_log_probability", "rejected_tokens",
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
