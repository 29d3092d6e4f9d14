"""Forward and backward as one CUDA graph: launching a small model's kernels takes longer than running them."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemmule.data.batches import Batch

# (batch on the device, number of targets that the loss is divided by) -> loss; leaves gradients in the parameters.
ForwardBackward = Callable[[Batch, Tensor], Tensor]
# Steps that run eagerly before one is captured: they compile, and choose kernels.
WARMUP_STEPS = 3


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    # Static tensors: the graph reads the batch and its divisor from these, and writes its loss and gradients to those.
    inputs: list[Tensor]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]


class CudaGraphStep:
    """Runs forward and backward eagerly for `WARMUP_STEPS`, then captures a CUDA graph and replays it.

    Gradients are overwritten at each replay, not accumulated. A batch of other shapes runs eagerly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._eager_steps = 0
        self._capture: _Capture | None = None
        self._can_capture = True

    def __call__(self, forward_backward: ForwardBackward, batch: Batch, num_targets: Tensor) -> Tensor:
        """Do what `forward_backward(batch, num_targets)` does."""
        inputs = _tensors(batch, num_targets)
        if self._capture is None and self._can_capture and self._eager_steps >= WARMUP_STEPS:
            self._capture = self._try_capture(forward_backward, batch, num_targets)
        capture = self._capture
        if capture is None or [tensor.shape for tensor in inputs] != [static.shape for static in capture.inputs]:
            self._eager_steps += 1
            return forward_backward(batch, num_targets)
        torch._foreach_copy_(capture.inputs, inputs)
        capture.graph.replay()
        for parameter, gradient in capture.gradients:
            parameter.grad = gradient
        return capture.loss

    def _try_capture(self, forward_backward: ForwardBackward, batch: Batch, num_targets: Tensor) -> _Capture | None:
        static_batch, static_num_targets = deepcopy((batch, num_targets))
        graph, parameters = torch.cuda.CUDAGraph(), list(self._model.parameters())
        try:
            with torch.cuda.graph(graph):  # kernels are captured here, and not run
                loss = forward_backward(static_batch, static_num_targets)
        except RuntimeError as error:
            self._can_capture = False
            for parameter in parameters:
                parameter.grad = None
            warnings.warn(f"steps run eagerly, because no CUDA graph could be captured: {error}", stacklevel=2)
            return None
        gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        return _Capture(graph, _tensors(static_batch, static_num_targets), loss, gradients)


def _tensors(batch: Batch, num_targets: Tensor) -> list[Tensor]:
    tensors = (batch.tokens, batch.targets, batch.documents, *batch.inputs.values(), num_targets)
    return [tensor for tensor in tensors if tensor is not None]
