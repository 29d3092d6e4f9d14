"""What to do when memory runs out: the largest tensors of a step, and the settings that make them smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Literal, NamedTuple

import torch

from gemmule.errors import DeviceError
from gemmule.model.config import Gemma3Config
from gemmule.train.loop import TrainSettings
from gemmule.train.loss import rows_at_once
from gemmule.train.parallel import ParallelSettings


class Large(NamedTuple):
    """A kind of tensor of which a training step holds some."""

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


def largest_tensors(
    config: Gemma3Config,
    settings: TrainSettings,
    parallel: ParallelSettings,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
) -> list[Large]:
    """List what fills the memory of a step of one process, largest first."""
    width = 2 if precision == "bf16" else 4  # bytes of an activation
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
        Large("tables of what each token sees", (rows, context, context), 2, 1),
    ]
    return sorted(found, key=lambda large: -large.bytes)


@contextmanager
def out_of_memory_explained(
    config: Gemma3Config,
    settings: TrainSettings,
    parallel: ParallelSettings,
    precision: Literal["bf16", "fp32"],
    device: torch.device,
) -> Iterator[None]:
    """Turn what torch raises when memory runs out into a DeviceError: the largest tensors, and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        largest = "; ".join(map(str, largest_tensors(config, settings, parallel, precision, device)[:3]))
        raise DeviceError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'none left'}). The largest tensors of a "
            f"step: {largest}. What helps, and can be changed for a run that goes on by --resume: "
            f"{'; '.join(_remedies(settings, parallel))}"
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
