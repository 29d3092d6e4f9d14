"""A step's forward and backward as one CUDA graph: to launch a small model's kernels takes longer than to run them."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemmule.data.batches import Batch

# (a batch on the device, by how many targets its loss is divided) -> the loss; leaves gradients in the parameters.
Learn = Callable[[Batch, Tensor], Tensor]
# Steps that are launched kernel by kernel before one is recorded: they compile, and choose kernels.
WARM = 3


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    # Where the graph reads its batch and divisor, and writes its loss and gradients.
    given: list[Tensor]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]


class Recorder:
    """Lets steps that are all alike learn: the first ones as they come, then replayed from a recording of one.

    Gradients are made anew each time, not added to, and stay where they are until the next step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._launched = 0
        self._recording: _Recording | None = None
        self._works = True

    def learn(self, learn: Learn, batch: Batch, trained: Tensor) -> Tensor:
        """Do what `learn(batch, trained)` does."""
        given = _tensors(batch, trained)
        if self._recording is None and self._works and self._launched >= WARM:
            self._recording = self._record(learn, batch, trained)
        recording = self._recording
        if recording is None or [part.shape for part in given] != [place.shape for place in recording.given]:
            self._launched += 1
            return learn(batch, trained)
        torch._foreach_copy_(recording.given, given)
        recording.graph.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.loss

    def _record(self, learn: Learn, batch: Batch, trained: Tensor) -> _Recording | None:
        place, divisor = deepcopy((batch, trained))
        graph, parameters = torch.cuda.CUDAGraph(), list(self._model.parameters())
        try:
            with torch.cuda.graph(graph):  # nothing runs in here
                loss = learn(place, divisor)
        except RuntimeError as error:
            self._works = False
            for parameter in parameters:
                parameter.grad = None
            warnings.warn(f"steps are launched kernel by kernel, for none can be recorded: {error}", stacklevel=2)
            return None
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        return _Recording(graph, _tensors(place, divisor), loss, gradients)


def _tensors(batch: Batch, trained: Tensor) -> list[Tensor]:
    return [part for part in (*batch, trained) if part is not None]
