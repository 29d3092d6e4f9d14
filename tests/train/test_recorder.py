"""Steps replayed from a recording do what launched ones do; here a graph is what was recorded, run again on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from gemmule.data.batches import Batch
from gemmule.train.recorder import WARM, Recorder


class Graph:
    """Runs the one call of `Work` that was made while it recorded, into the same memory."""

    recording: "Graph | None" = None

    def __init__(self) -> None:
        self.replayed = 0

    def record(self, work: "Work", batch: Batch, divisor: Tensor) -> Tensor:
        self.work, self.given = work, (batch, divisor)
        self.loss = work.learn(batch, divisor)
        self.gradients = work.gradients()
        return self.loss

    def replay(self) -> None:
        self.replayed += 1
        self.work.forget()
        self.loss.copy_(self.work.learn(*self.given))
        for place, gradient in zip(self.gradients, self.work.gradients(), strict=True):
            place.copy_(gradient)
        self.work.forget()  # the recorder hands them out again


class Work:
    """A model of one matrix that learns from tokens as numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.launched, self.recordable = 0, True

    def learn(self, batch: Batch, divisor: Tensor) -> Tensor:
        loss = (self.model(batch.tokens.float())[:, 0] - batch.targets[:, 0]).square().sum() / divisor
        torch.autograd.backward(loss)
        return loss.detach()

    def __call__(self, batch: Batch, divisor: Tensor) -> Tensor:
        if Graph.recording is None:
            self.launched += 1
            return self.learn(batch, divisor)
        if not self.recordable:
            self.learn(batch, divisor)
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph.recording.record(self, batch, divisor)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    @contextmanager
    def graph(it: Graph) -> Iterator[None]:
        Graph.recording = it
        try:
            yield
        finally:
            Graph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return Work()


def same_as_launched(by: Recorder, work: Work, number: int, rows: int = 4) -> bool:
    """Learn from a batch of its own, recorded or not, and from the same launched."""
    draw = torch.Generator().manual_seed(number)
    tokens, targets = (torch.randint(9, (rows, 3), generator=draw) for _ in range(2))
    batch, divisor = Batch(tokens, targets, None), torch.tensor(float(rows + number))
    found = []
    for loss in (by.learn(work, batch, divisor).clone(), None):
        loss = work.learn(batch, divisor) if loss is None else loss
        found.append((loss, [gradient.clone() for gradient in work.gradients()]))
        work.forget()
    (loss, gradients), (wanted, exact) = found
    return bool(loss == wanted) and all(map(torch.equal, gradients, exact))


def test_replayed_steps_learn_what_launched_ones_do(work: Work) -> None:
    by = Recorder(work.model)
    assert all(same_as_launched(by, work, number) for number in range(WARM + 4))
    assert work.launched == WARM
    assert by._recording is not None
    assert by._recording.graph.replayed == 4  # type: ignore[attr-defined]


def test_a_batch_of_another_shape_is_launched(work: Work) -> None:
    by = Recorder(work.model)
    assert all(same_as_launched(by, work, number) for number in range(WARM + 1))
    assert same_as_launched(by, work, 50, rows=2)
    assert work.launched == WARM + 1


def test_what_cannot_be_recorded_is_launched_and_told_once(work: Work) -> None:
    work.recordable = False
    by = Recorder(work.model)
    assert all(same_as_launched(by, work, number) for number in range(WARM))
    with pytest.warns(UserWarning, match="none can be recorded: operation not permitted"):
        assert same_as_launched(by, work, WARM)
    assert same_as_launched(by, work, 99)
    assert work.launched == WARM + 2
