"""The metrics of a run as TensorBoard events."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmule.errors import MissingExtra

# metrics.jsonl key -> TensorBoard tag
TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "val_floor": "loss/floor",
    "val_bits_per_byte": "bits_per_byte/validation",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
}


def open_tensorboard(folder: Path, say: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """Return a function that logs a line of metrics to the events in `folder`, opened at the first line.

    Without tensorboard, `say` reports what is missing and the function does nothing.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        say(f"no TensorBoard events: {MissingExtra('tensorboard', 'plots', 'writing them')}")
        return lambda _line: None
    writer: SummaryWriter | None = None

    def add(line: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            # Events of steps that a killed run repeats are hidden.
            writer = SummaryWriter(str(folder), purge_step=line["step"])
        for key, tag in TAGS.items():
            if line.get(key) is not None:
                writer.add_scalar(tag, line[key], line["step"])
        writer.flush()

    return add
