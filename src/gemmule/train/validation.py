"""Validation: the loss of a model on a fixed set of documents."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from gemmule.compiler import uncompiled
from gemmule.data.batches import Batch
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import Runtime
from gemmule.train.loss import summed_loss


class Scored(Protocol):
    """The result of a validation."""

    @property
    def loss(self) -> float:
        """What decides which checkpoint is the best."""
        ...

    def figures(self) -> dict[str, float | None]:
        """Return what is logged, by name."""
        ...


class Score(NamedTuple):
    """The summed loss of some text: nats over all predicted tokens, ends of documents included."""

    nats: float
    tokens: int
    bytes: int | None  # of UTF-8 text; None where the tokenizer changes it, so that tokens stand for less

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: comparable between tokenizers, unlike the loss. None where the bytes are not known."""
        return None if self.bytes is None else self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model hesitates between."""
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float | None]:
        """Return the three means under the names that metrics and reports use."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


@torch.no_grad()
def score(model: Gemma3, batches: Iterable[Batch], text_bytes: int | None, runtime: Runtime) -> Score:
    """Sum the loss over every target of the batches, whose text has `text_bytes` bytes.

    Ranks take batches in turn and run the same number of forward passes: a rank without a batch in the last round
    repeats another's and does not count it.
    """
    world, was_training = runtime.world, model.training
    model.eval()
    nats, tokens = 0.0, 0
    left = iter(batches)
    while turn := list(islice(left, world.size)):
        counted = world.rank < len(turn)
        batch = turn[world.rank if counted else 0].to(runtime.device)
        with uncompiled(), runtime.autocast():
            loss = model(batch.tokens, documents=batch.documents, output_head=summed_loss(batch.targets))
        nats += loss.item() * counted
        tokens += batch.num_targets * counted
    model.train(was_training)
    nats, count = world.all_reduce_sum(nats, tokens)
    return Score(nats, int(count), text_bytes)
