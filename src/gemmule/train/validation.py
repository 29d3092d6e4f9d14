"""How well a model predicts a fixed set of documents."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Literal, NamedTuple

import torch

from gemmule.data.batches import Batch
from gemmule.model.gemma3 import Gemma3
from gemmule.runtime import ALONE, World, autocast, uncompiled
from gemmule.train.loss import summed_loss


class Score(NamedTuple):
    """What predicting some text cost: nats over all predicted tokens, ends of documents included."""

    nats: float
    tokens: int
    bytes: int  # of UTF-8 text

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers, unlike the loss."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model hesitates between."""
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float]:
        """Return the three means under the names that metrics and reports use."""
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


@torch.no_grad()
def score(
    model: Gemma3, batches: Iterable[Batch], text_bytes: int, precision: Literal["bf16", "fp32"], world: World = ALONE
) -> Score:
    """Predict every target of the batches, whose text has `text_bytes` bytes, and add up the cost.

    The processes of a world take turns, and call the model equally often: one without a batch in the last round
    repeats another's, uncounted.
    """
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    left = iter(batches)
    while turn := list(islice(left, world.size)):
        counted = world.rank < len(turn)
        batch = turn[world.rank if counted else 0].to(device)
        with uncompiled(), autocast(device, precision):
            loss = model(batch.tokens, documents=batch.documents, readout=summed_loss(batch.targets))
        nats += loss.item() * counted
        tokens += batch.trained * counted
    model.train(was_training)
    nats, count = world.total(nats, tokens)
    return Score(nats, int(count), text_bytes)
