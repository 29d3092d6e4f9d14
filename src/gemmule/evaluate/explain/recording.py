"""One forward pass of a model over one text, with what it computed on the way.

Letters: T tokens, D hidden size, N query heads, H head dim, V vocabulary. The batch has one row.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemmule.model.attention import AttentionMask, Kernel, attention_scores, attention_weights
from gemmule.model.gemma3 import Block, Gemma3, all_logits

FP16_LARGEST = 65_504

# Gets the number of a layer and its attention weights (N,T,T).
OnWeights = Callable[[int, Tensor], None]


class TensorRange(NamedTuple):
    """Shape and range of one tensor of the pass; names are those of modules, see `_watched` for the others.

    `fp16_share` is the largest magnitude as a share of fp16's largest number: above 1 the tensor overflows.
    """

    name: str
    shape: tuple[int, ...]
    min: float
    max: float
    mean: float
    rms: float
    fp16_share: float


@dataclass(frozen=True)
class Recording:
    """What a forward pass computed: `hidden` is the residual stream (T,D) before the first layer and after each."""

    model: Gemma3
    hidden: list[Tensor] = field(default_factory=list)
    ranges: list[TensorRange] = field(default_factory=list)

    def logits(self, depth: int) -> Tensor:
        """Read out the logits (T,V) of the residual stream after so many layers: final norm, then output head.

        The code is that of the model's own output, so after the last layer the logits are the model's, bit for bit.
        """
        model = self.model
        vocabulary = model.embedding.weight if model.head is None else model.head.weight
        return all_logits(model.norm(self.hidden[depth][None]), vocabulary)[0]


@torch.inference_mode()
def record(model: Gemma3, ids: list[int], on_weights: OnWeights = lambda *_: None) -> Recording:
    """Run a model on the ids of one text; record the residual stream and the range of every tensor before the logits.

    Attention runs through the model's own kernel; its weights are recomputed with the reference attention and handed to
    `on_weights` layer by layer, because those of all layers together may not fit into memory.
    """
    recording = Recording(model)
    tokens = torch.tensor([ids], dtype=torch.long, device=model.embedding.weight.device)
    was_training = model.training
    model.eval()
    try:
        with _watched(recording, on_weights):
            model(tokens, output_head=lambda hidden, _: hidden)
    finally:
        model.train(was_training)
    return recording


def tensor_range(name: str, tensor: Tensor) -> TensorRange:
    """Measure a tensor, in fp32."""
    wide = tensor.detach().float()
    lowest, highest = torch.aminmax(wide)
    rms = torch.linalg.vector_norm(wide).item() / math.sqrt(wide.numel())
    low, high = lowest.item(), highest.item()
    return TensorRange(name, tuple(tensor.shape), low, high, wide.mean().item(), rms, max(-low, high) / FP16_LARGEST)


@contextmanager
def _watched(recording: Recording, on_weights: OnWeights) -> Iterator[None]:
    """Record the outputs of all modules inside the block, and what is computed between modules."""

    def record_range(name: str, tensor: Tensor) -> None:
        recording.ranges.append(tensor_range(name, tensor))

    def output_of(module: nn.Module, name: str) -> None:
        hooks.callback(module.register_forward_hook(lambda _module, _given, result: record_range(name, result)).remove)

    def input_of(module: nn.Module, name: str) -> None:
        hooks.callback(module.register_forward_pre_hook(lambda _module, given: record_range(name, given[0])).remove)

    def residual_of(block: Block, name: str) -> None:
        def keep(_module: nn.Module, _given: object, result: Tensor) -> None:
            recording.hidden.append(result[0])
            record_range(name, result)

        hooks.callback(block.register_forward_hook(keep).remove)

    with ExitStack() as hooks:
        hooks.callback(
            recording.model.blocks[0]
            .register_forward_pre_hook(lambda _module, given: recording.hidden.append(given[0][0]))
            .remove
        )
        for name, module in recording.model.named_modules():
            if isinstance(module, Block):
                layer = module.attention.layer
                if layer == 0:
                    input_of(module, "embedding.scaled")
                input_of(module.attention.output, f"{name}.attention.mixed")
                input_of(module.pre_mlp_norm, f"{name}.after_attention")
                input_of(module.mlp.down, f"{name}.mlp.gated")
                kernel = module.attention.kernel
                hooks.callback(setattr, module.attention, "kernel", kernel)
                module.attention.kernel = _recording_kernel(
                    kernel, layer, f"{name}.attention", record_range, on_weights
                )
                residual_of(module, name)
            elif not any(module.children()) and not isinstance(module, nn.Dropout):
                output_of(module, name)
        yield


def _recording_kernel(
    kernel: Kernel, layer: int, name: str, record_range: Callable[[str, Tensor], None], on_weights: OnWeights
) -> Kernel:
    """Return a kernel that also records the rotated queries and keys, the scores and the attention weights."""

    def recorded(
        query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float, dropout: float
    ) -> Tensor:
        scores = attention_scores(query, key, scale)
        weights = attention_weights(scores, mask)
        record_range(f"{name}.rotated_query", query)
        record_range(f"{name}.rotated_key", key)
        record_range(f"{name}.scores", scores)
        record_range(f"{name}.weights", weights)
        on_weights(layer, weights[0])
        return kernel(query, key, value, mask, scale, dropout)

    return recorded
