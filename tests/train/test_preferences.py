"""Losses over pairs of replies, beside their formulas and TRL."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gemmule.data.batches import IGNORED, PADDING, Batch
from gemmule.distributed import SINGLE_PROCESS
from gemmule.model.gemma3 import Gemma3
from gemmule.train.loop import forward_backward
from gemmule.train.loss import summed_loss
from gemmule.train.parallel import unwrapped
from gemmule.train.preferences import LOSSES, REFERENCE, Preferences, PreferenceSettings
from gemmule.train.settings import TrainSettings
from tiny import lively_model, shallow_config

# Per pair: the prompt's length and the replies', the chosen one first.
PAIRS = [(3, 5, 2), (1, 1, 4), (4, 3, 3)]


def sequences(seed: int = 0) -> list[tuple[Tensor, int, float]]:
    """Token ids of prompt and reply, where the reply begins, and its log-probability under some reference."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for prompt, *replies in PAIRS:
        begin = torch.randint(shallow_config().vocab_size, (prompt,), generator=draw)
        for length in replies:
            reply = torch.randint(shallow_config().vocab_size, (length,), generator=draw)
            made.append((torch.cat([begin, reply]), prompt, -3.0 * length - torch.rand((), generator=draw).item()))
    return made


def batch_of(rows: list[list[int]], length: int = 40) -> Batch:
    """Batches with the pairs of each row, padded."""
    made, documents = sequences(), 2 * max(map(len, rows))
    batch = Batch(
        torch.zeros(len(rows), length, dtype=torch.int64),
        torch.full((len(rows), length), IGNORED),
        torch.full((len(rows), length), PADDING, dtype=torch.int32),
        {REFERENCE: torch.zeros(len(rows), documents)},
    )
    assert batch.documents is not None
    for row, pairs in enumerate(rows):
        filled = 0
        for number, which in enumerate(2 * pair + side for pair in pairs for side in (0, 1)):
            ids, prompt, reference = made[which]
            end = filled + len(ids) - 1
            batch.tokens[row, filled:end] = ids[:-1]
            batch.targets[row, filled + prompt - 1 : end] = ids[prompt:]
            batch.documents[row, filled:end] = number
            batch.inputs[REFERENCE][row, number] = reference
            filled = end
    return batch


def by_formula(model: Gemma3, settings: PreferenceSettings) -> Tensor:
    """The mean loss, one reply after the other."""
    found = []
    for ids, prompt, reference in sequences():
        logs = functional.log_softmax(model(ids[None, :-1])[0], dim=-1)
        own = logs[torch.arange(len(ids) - 1), ids[1:]][prompt - 1 :]
        found.append((own.sum(), reference, len(own)))
    losses = []
    for (chosen, before, count), (rejected, earlier, size) in zip(found[::2], found[1::2], strict=True):
        one, other = chosen - before, rejected - earlier
        if settings.loss == "dpo":
            logit = settings.beta * (one - other)
        elif settings.loss == "simpo":
            logit = settings.beta * (chosen / count - rejected / size) - settings.target_margin
        if settings.loss == "ipo":
            loss = (one / count - other / size - 1 / (2 * settings.beta)) ** 2
        else:
            share = settings.label_smoothing
            loss = -(1 - share) * torch.log(torch.sigmoid(logit)) - share * torch.log(torch.sigmoid(-logit))
        losses.append(loss - settings.sft_weight * chosen / count)
    return torch.stack(losses).mean()


SETTINGS = [
    {"loss": "dpo", "beta": 0.3},
    {"loss": "dpo", "label_smoothing": 0.1, "sft_weight": 0.5},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "simpo", "beta": 2.0, "target_margin": 0.7, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("given", SETTINGS)
@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]], ids=["packed", "padded", "mixed"])
@pytest.mark.parametrize("micro", [None, 1])
def test_losses_and_gradients_are_those_of_the_formulas(
    given: dict[str, Any], rows: list[list[int]], micro: int | None
) -> None:
    model, settings = lively_model(shallow_config()), PreferenceSettings(**given)
    expected = by_formula(model, settings)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    objective, batch = Preferences(settings), batch_of(rows)
    count = objective.begin_step(batch)
    assert count == len(PAIRS)
    train = TrainSettings(steps=1, batch_size=len(rows), micro_batch_size=micro)
    loss = forward_backward(unwrapped(model), batch, count, 0, train, objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).norm() <= 2e-5 * gradient.norm()


def test_metrics_are_means_over_the_pairs_of_the_step() -> None:
    model, objective = lively_model(shallow_config()), Preferences(PreferenceSettings(beta=1.0))
    for rows in ([[0], [1], [2]], [[0, 1, 2]]):
        batch = batch_of(rows)
        objective.begin_step(batch)
        for part in batch.split(1):
            objective.summed_loss(model, part)
    metrics = objective.metrics(SINGLE_PROCESS)
    assert metrics["chosen_tokens"] == pytest.approx(3.0)
    assert metrics["rejected_tokens"] == pytest.approx(3.0)
    logs = [metrics["chosen_log_probability"], metrics["rejected_log_probability"]]
    references = batch_of([[0, 1, 2]]).inputs[REFERENCE].view(-1, 2).mean(dim=0).tolist()
    assert metrics["reward_margin"] == pytest.approx(logs[0] - references[0] - logs[1] + references[1], rel=1e-5)
    assert metrics["preference_accuracy"] * 3 in {0, 1, 2, 3}


def test_before_any_step_the_loss_is_that_of_guessing() -> None:
    model, batch = lively_model(shallow_config()), batch_of([[0, 1], [2]])
    objective = Preferences(PreferenceSettings())
    count = objective.begin_step(batch)
    with torch.no_grad():
        for row in range(len(batch.tokens)):
            for document in range(batch.inputs[REFERENCE].shape[1]):
                assert batch.documents is not None
                only = batch.targets.where(batch.documents.eq(document), IGNORED)[row : row + 1]
                alone = Batch(batch.tokens[row : row + 1], only, batch.documents[row : row + 1])
                batch.inputs[REFERENCE][row, document] = -model(
                    alone.tokens, documents=alone.documents, output_head=summed_loss(alone.targets)
                )
        loss = objective.summed_loss(model, batch) / count
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_every_loss_is_tried_here() -> None:
    assert {each["loss"] for each in SETTINGS} == LOSSES.keys()
