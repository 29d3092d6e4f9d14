"""The policy gradient beside its formula, graders, and the watch for rewards that are gamed."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemmule.data.batches import IGNORED, Batch
from gemmule.distributed import SINGLE_PROCESS
from gemmule.errors import RecipeError
from gemmule.inference.engine import Engine
from gemmule.inference.groups import reply_to_groups
from gemmule.inference.requests import Request
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.storybook.tasks import make_tasks
from gemmule.train.loop import forward_backward
from gemmule.train.parallel import unwrapped
from gemmule.train.reward_functions import Grade, Grader, RewardWatch, Sample
from gemmule.train.reward_process import RewardProcess
from gemmule.train.rewards import ADVANTAGE, REFERENCE, SAMPLED, PolicyGradient, RewardSettings, advantages
from gemmule.train.settings import TrainSettings
from tiny import lively_model, shallow_config

SETTINGS = RewardSettings(clip_low=0.1, clip_high=0.3, kl=0.2, steps_per_rollout=2)


def batch_of(rows: int = 4, length: int = 11) -> Batch:
    """Rows of a prompt of three tokens and replies of different lengths, padded, with made-up log-probabilities."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(shallow_config().vocab_size, (rows, length + 1), generator=draw)
    targets = tokens[:, 1:].clone()
    targets[:, :2] = IGNORED
    for row in range(rows):
        targets[row, length - row :] = IGNORED
    near = torch.log_softmax(reference_logits(lively_model(shallow_config()), tokens[:, :-1]), dim=-1)
    near = near.gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0].detach()
    noise = [0.3 * torch.randn(targets.shape, generator=draw) for _ in range(2)]
    inputs = {ADVANTAGE: torch.randn(rows, generator=draw), SAMPLED: near + noise[0], REFERENCE: near + noise[1]}
    return Batch(tokens[:, :-1], targets, None, inputs)


def reference_logits(model: Gemma3, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return logits


def by_formula(model: Gemma3, batch: Batch, settings: RewardSettings) -> float:
    """Token by token."""
    logs = torch.log_softmax(reference_logits(model, batch.tokens) / settings.temperature, dim=-1)
    total, count = 0.0, 0
    for row, targets in enumerate(batch.targets.tolist()):
        for place, target in enumerate(targets):
            if target == IGNORED:
                continue
            log, reference = logs[row, place, target].item(), batch.inputs[REFERENCE][row, place].item()
            sampled = batch.inputs[SAMPLED][row, place].item() if SAMPLED in batch.inputs else log
            advantage = batch.inputs[ADVANTAGE][row].item()
            ratio = torch.tensor(log - sampled).exp().item()
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            divergence = ratio * (torch.tensor(reference - log).exp().item() - (reference - log) - 1)
            total += -min(ratio * advantage, clipped * advantage) + settings.kl * divergence
            count += 1
    return total / count


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_that_of_the_formula(temperature: float) -> None:
    model, batch = lively_model(shallow_config()), batch_of()
    settings = SETTINGS.replace(temperature=temperature)
    objective = PolicyGradient(settings, lambda _: {"reward": 0.5})
    loss = objective.summed_loss(model, batch) / objective.begin_step(batch)
    assert loss.item() == pytest.approx(by_formula(model, batch, settings), abs=1e-5)


def test_the_step_does_not_depend_on_how_it_is_cut() -> None:
    batch = batch_of()
    found = []
    for size in (1, 2, 4):
        model = lively_model(shallow_config())
        objective = PolicyGradient(SETTINGS, lambda _: {})
        settings = TrainSettings(steps=1, batch_size=4, micro_batch_size=size)
        loss = forward_backward(unwrapped(model), batch, objective.begin_step(batch), 0, settings, objective).item()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss, gradients, objective.metrics(SINGLE_PROCESS)))
    for loss, gradients, metrics in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert (gradients - found[0][1]).norm() < 1e-6 * found[0][1].norm()
        assert metrics == pytest.approx(found[0][2], rel=1e-5)
    assert 0 < found[0][2]["clipped"] < 1


def test_one_step_on_each_sample_has_the_gradient_of_advantage_times_log_probability() -> None:
    batch, model = batch_of(), lively_model(shallow_config())
    del batch.inputs[SAMPLED]  # type: ignore[attr-defined]
    objective = PolicyGradient(SETTINGS.replace(kl=0.0, steps_per_rollout=1), lambda _: {})
    objective.summed_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    weight = model.embedding.weight
    assert weight.grad is not None
    given = weight.grad.clone()
    model.zero_grad()
    known = batch.targets != IGNORED
    logs = torch.log_softmax(reference_logits(model, batch.tokens), dim=-1)
    logs = logs.gather(2, batch.targets.clamp(min=0)[:, :, None])[:, :, 0]
    (-(batch.inputs[ADVANTAGE][:, None] * logs)[known].sum()).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert (weight.grad - given).abs().max() < 1e-4 * given.abs().max()


def test_advantages_are_relative_to_the_group() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert advantages(rewards).tolist() == [[-0.5, 0.5, 0.5, -0.5], [0.0] * 4]
    scaled = advantages(rewards, scale_by_deviation=True)
    assert scaled[0].std().item() == pytest.approx(1, abs=1e-3)
    assert scaled[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_engine_and_the_forward_of_training_agree_on_log_probabilities(temperature: float) -> None:
    model = lively_model(shallow_config())
    sampling = SamplingSettings(temperature=temperature)
    prompts = [(3, 5, 7), (9, 2, 4, 8, 1)]
    requests = [Request(ids, 12, sampling, seed, 3, log_probabilities=0) for seed, ids in enumerate(prompts)]
    groups = reply_to_groups(model, requests)
    assert groups == reply_to_groups(model, requests, max_rows=3)
    assert [len(group) for group in groups] == [3, 3]
    assert len({tuple(reply) for group in groups for reply in group}) == 6

    engine = Engine(model, 3, 20)
    sequences = engine.submit(requests[0])
    by_engine: dict[int, list[float]] = {}
    while not engine.idle:
        for sequence, event in engine.step():
            assert event is not None
            assert event.log_probabilities is not None
            by_engine.setdefault(sequence.sample, []).append(event.log_probabilities.token)
    for sequence in sequences:
        ids = torch.tensor([[*prompts[0], *sequence.generated]])
        logs = torch.log_softmax(reference_logits(model, ids[:, :-1]), dim=-1)
        own = logs[0, len(prompts[0]) - 1 :].gather(1, ids[0, len(prompts[0]) :, None])[:, 0]
        assert torch.allclose(own, torch.tensor(by_engine[sequence.sample]), atol=1e-4)


def samples(count: int) -> list[Sample]:
    return [
        Sample({"messages": [{"role": "user", "content": task.instruction}], "task": task.goal}, task.reply, ended=True)
        for task in make_tasks(count, seed=4)
    ]


def test_the_checker_of_a_task_grades_its_reply() -> None:
    made = samples(12)
    grader = Grader(RewardSettings(), [sample.row for sample in made])
    for sample in made:
        grade = grader.grade(sample)
        assert grade.reward == grade.components["solved"] == 1
        assert grader.grade(sample._replace(ended=False)).reward == 0
        assert grade.checks == {}
    parts = Grader(RewardSettings(components=("facts", "consistent"), weights=(0.5, 2.0)), [made[0].row])
    told = next(sample for sample in made if sample.row["task"]["kind"] == "tell")
    assert parts.grade(told).reward == 2.5
    assert parts.grade(told._replace(reply="No.")).reward == 0


def test_another_reward_is_logged_beside_the_checks_of_the_task() -> None:
    (sample,) = samples(1)
    grade = Grader(RewardSettings(reward="ended"), [sample.row]).grade(sample)
    assert grade.components == {"ended": 1}
    assert set(grade.checks.values()) == {1.0}


def test_a_reward_that_is_constant_over_the_first_replies_is_refused() -> None:
    sample = samples(1)[0]._replace(ended=False)
    grader = Grader(RewardSettings(), [sample.row])
    for _ in range(99):
        grader.grade(sample)
    with pytest.raises(RecipeError, match="each of the first 100 replies earns 0"):
        grader.grade(sample)
    later = Grader(RewardSettings(), [sample.row], fresh=False)
    assert {later.grade(sample).reward for _ in range(120)} == {0}


def test_components_that_a_function_does_not_give_are_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def give(messages, reply, row):\n    return {'a': 1, 'b': 2}\n")
    grader = Grader(RewardSettings(reward=f"{tmp_path / 'own.py'}:give", components=("c",)), [])
    try:
        with pytest.raises(RecipeError, match="the reward gives no c; it gives a, b"):
            grader.grade(Sample({"messages": []}, "x", ended=True))
    finally:
        grader.close()


def test_a_function_may_import_its_neighbors_and_print(tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text("def count(text):\n    return len(text.split())\n")
    (tmp_path / "own.py").write_text(
        "import words\n\ndef give(messages, reply, row):\n    print('noise')\n    return words.count(reply)\n"
    )
    process = RewardProcess(f"{tmp_path / 'own.py'}:give", 20.0)
    try:
        assert [process([], "word " * count, {}) for count in (0, 1, 20_000)] == [0, 1, 20_000]
    finally:
        process.close()


@pytest.mark.parametrize("text", ["import nothing_of_the_kind", "1 +", "exit(3)"])
def test_a_file_that_cannot_be_imported_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(RecipeError, match=r"own.py:give: (ModuleNotFoundError|SyntaxError|SystemExit)"):
        RewardProcess(f"{tmp_path / 'own.py'}:give", 20.0)


def watched(reward: float, check: float, steps: int = 50) -> list[int]:
    """Steps at which a watch warns, where reward and check change by so much per step."""
    draw, watch = random.Random(1), RewardWatch()
    found = []
    for step in range(1, steps + 1):
        grades = [
            Grade(5 + reward * step + draw.gauss(0, 1), {}, {"consistent": float(draw.random() < 0.6 + check * step)})
            for _ in range(64)
        ]
        if watch.note(grades):
            found.append(step)
    return found


def test_a_reward_that_rises_while_the_checks_fall_is_told_once_and_early() -> None:
    (step,) = watched(reward=0.1, check=-0.01)
    assert 10 <= step < 50


@pytest.mark.parametrize(("reward", "check"), [(0.1, 0.005), (0.0, 0.0), (0.1, 0.0), (-0.1, -0.01), (0.0, -0.01)])
def test_other_changes_are_no_reason_to_warn(reward: float, check: float) -> None:
    assert watched(reward, check) == []
