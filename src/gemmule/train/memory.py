"""Out of memory: the largest tensors of a step, and the settings that make them smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch

from gemmule.errors import DeviceError
from gemmule.train.loss import rows_at_once
from gemmule.train.parallel import ParallelSettings
from gemmule.train.recipe import Recipe
from gemmule.train.settings import TrainSettings


class Large(NamedTuple):
    """Tensors of one shape that a training step holds at the same time."""

    what: str
    shape: tuple[int, ...]
    number: int  # of such tensors that are there at the same time
    width: int  # bytes of an element

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return prod(self.shape) * self.number * self.width

    def __str__(self) -> str:
        times = f"{self.number} x " if self.number > 1 else ""
        return f"{self.what} {times}{self.shape} = {self.bytes / 2**20:,.0f} MiB"


def largest_tensors(recipe: Recipe, device: torch.device) -> list[Large]:
    """List the largest tensors of a step of one rank, largest first."""
    config, settings, parallel = recipe.model, recipe.train, recipe.parallel
    width = 4 if settings.precision == "fp32" else 2  # bytes of an activation
    rows, context = settings.micro_batch_size or settings.batch_size, settings.context
    kept = 1 if parallel.activation_checkpointing == "full" else config.num_hidden_layers
    logits = min(rows * context, rows_at_once(config.vocab_size, device))
    found = [
        # Weights, gradients and about two moments, in fp32.
        Large("weights, gradients and moments of the embedding", (config.vocab_size, config.hidden_size), 4, 4),
        Large("the same of the MLPs", (config.intermediate_size, config.hidden_size), 12 * config.num_hidden_layers, 4),
        Large("logits and their gradient", (logits, config.vocab_size), 3, 4),
        # Gate, its gelu, up, and their product.
        Large("activations of the MLPs", (rows, context, config.intermediate_size), 4 * kept, width),
        # What the norms, the rotary angles and the sums around them keep, in fp32.
        Large("activations of width hidden_size", (rows, context, config.hidden_size), 8 * kept, 4),
        Large("attention masks", (rows, context, context), 2, 1),
    ]
    return sorted(found, key=lambda large: -large.bytes)


@contextmanager
def out_of_memory_explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory errors into a DeviceError that names the largest tensors and settings that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        largest = "; ".join(map(str, largest_tensors(recipe, device)[:3]))
        raise DeviceError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'none left'}). The largest tensors of a "
            f"step: {largest}. What helps, and can be changed with --resume: "
            f"{'; '.join(_remedies(recipe.train, recipe.parallel))}"
        ) from error


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    words = ("can't allocate memory", "out of memory")  # the CPU's allocator, others
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _remedies(settings: TrainSettings, parallel: ParallelSettings) -> Iterator[str]:
    rows = settings.micro_batch_size or settings.batch_size
    if rows > 1:
        fewer = max(n for n in range(1, rows // 2 + 1) if settings.batch_size % n == 0)
        yield f"train.micro_batch_size = {fewer} (it is {rows}; the result stays the same)"
    if parallel.activation_checkpointing != "full":
        yield 'parallel.activation_checkpointing = "full" (a third more work)'
    if parallel.strategy == "ddp":
        yield 'parallel.strategy = "fsdp" over several processes'
    if rows == 1:
        yield f"a shorter train.context (it is {settings.context}), for a new run"
