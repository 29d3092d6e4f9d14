"""Replayed CUDA graphs do what eager steps do; here a graph is the captured call, run again on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from gemmule.data.batches import Batch
from gemmule.train.cuda_graph import WARMUP_STEPS, CudaGraphStep


class Graph:
    """Runs the one call of `Work` that was captured, into the same memory."""

    capturing: "Graph | None" = None

    def __init__(self) -> None:
        self.replayed = 0

    def capture(self, work: "Work", batch: Batch, divisor: Tensor) -> Tensor:
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
        self.work.forget()  # the step assigns them again


class Work:
    """A model of one matrix that learns from tokens as numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.eager, self.capturable = 0, True

    def learn(self, batch: Batch, divisor: Tensor) -> Tensor:
        loss = (self.model(batch.tokens.float())[:, 0] - batch.targets[:, 0]).square().sum() / divisor
        torch.autograd.backward(loss)
        return loss.detach()

    def __call__(self, batch: Batch, divisor: Tensor) -> Tensor:
        if Graph.capturing is None:
            self.eager += 1
            return self.learn(batch, divisor)
        if not self.capturable:
            self.learn(batch, divisor)
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph.capturing.capture(self, batch, divisor)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    @contextmanager
    def graph(it: Graph) -> Iterator[None]:
        Graph.capturing = it
        try:
            yield
        finally:
            Graph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return Work()


def same_as_eager(by: CudaGraphStep, work: Work, number: int, rows: int = 4) -> bool:
    """Run a batch through the step, and the same batch eagerly."""
    draw = torch.Generator().manual_seed(number)
    tokens, targets = (torch.randint(9, (rows, 3), generator=draw) for _ in range(2))
    batch, divisor = Batch(tokens, targets, None), torch.tensor(float(rows + number))
    found = []
    for loss in (by(work, batch, divisor).clone(), None):
        loss = work.learn(batch, divisor) if loss is None else loss
        found.append((loss, [gradient.clone() for gradient in work.gradients()]))
        work.forget()
    (loss, gradients), (wanted, exact) = found
    return bool(loss == wanted) and all(map(torch.equal, gradients, exact))


def test_replayed_steps_equal_eager_ones(work: Work) -> None:
    by = CudaGraphStep(work.model)
    assert all(same_as_eager(by, work, number) for number in range(WARMUP_STEPS + 4))
    assert work.eager == WARMUP_STEPS
    assert by._capture is not None
    assert by._capture.graph.replayed == 4  # type: ignore[attr-defined]


def test_a_batch_of_another_shape_runs_eagerly(work: Work) -> None:
    by = CudaGraphStep(work.model)
    assert all(same_as_eager(by, work, number) for number in range(WARMUP_STEPS + 1))
    assert same_as_eager(by, work, 50, rows=2)
    assert work.eager == WARMUP_STEPS + 1


def test_steps_that_cannot_be_captured_run_eagerly_with_one_warning(work: Work) -> None:
    work.capturable = False
    by = CudaGraphStep(work.model)
    assert all(same_as_eager(by, work, number) for number in range(WARMUP_STEPS))
    with pytest.warns(UserWarning, match="no CUDA graph could be captured: operation not permitted"):
        assert same_as_eager(by, work, WARMUP_STEPS)
    assert same_as_eager(by, work, 99)
    assert work.eager == WARMUP_STEPS + 2
