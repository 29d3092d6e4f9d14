"""Metrics of a run: append-only JSON Lines files, and warnings of overfitting and of chosen replies that sink."""

import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from gemmule.files import as_output_error, reason_of

log = logging.getLogger(__name__)

# What helps against overfitting.
REMEDIES = (
    "more text, dropout (model.dropout) or fewer steps (train.early_stopping ends a run by itself) help, and "
    'train.final_model = "best" makes the best checkpoint the model'
)
# Validations that make a trend, and how much worse than the best one they are.
TREND, _MARGIN = 3, 0.005


class JsonLines:
    """An append-only JSON Lines file that a resumed run continues exactly where its checkpoint left it.

    While it cannot be written (a full disk, a quota, an I/O error), lines are buffered in memory and the run continues;
    a warning is logged once.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        """Open `path` and truncate it after the first `keep_bytes` bytes, and before a line that is not complete."""
        self._path, self._failed = path, False
        self._buffer = b""
        with as_output_error(path):
            path.touch()
            kept = path.read_bytes()[:keep_bytes]
            self._written = kept.rfind(b"\n") + 1
            self._file: IO[bytes] = path.open("r+b", buffering=0)
            if path.stat().st_size > self._written:  # os.devnull cannot be truncated
                self._file.truncate(self._written)
        if len(kept) < keep_bytes and path.is_file():
            log.warning(f"{path}: is shorter than it was when the checkpoint was written; lines before it are missing")

    @property
    def size(self) -> int:
        """Bytes of all lines so far."""
        return self._written + len(self._buffer)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object and hand it to the operating system, so that a killed run loses at most this line."""
        self._buffer += json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._failed:
                log.warning(f"{self._path}: {reason_of(error)}; lines are buffered in memory, and the run continues")
            self._failed = True
        else:
            self._failed = False

    def sync(self) -> None:
        """Flush to disk, before a checkpoint counts on the lines."""
        with suppress(OSError):
            os.fsync(self._file.fileno())

    def _flush(self) -> None:
        while self._buffer:
            written = os.pwrite(self._file.fileno(), self._buffer, self._written)
            self._written, self._buffer = self._written + written, self._buffer[written:]

    def close(self) -> None:
        """Write what is buffered and close the file; OutputError where lines are lost."""
        with self._file, as_output_error(self._path):  # what could not be written is tried once more
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OverfittingWatch:
    """Notices that validation gets worse while training gets better: the model memorizes instead of learning."""

    def __init__(self) -> None:
        self._best: Mapping[str, Any] | None = None
        self._worse = 0

    def note(self, line: Mapping[str, Any]) -> str | None:
        """Take a line of metrics; return a sentence at the third validation that is worse than the best before it."""
        if "val_loss" not in line or "loss" not in line:
            return None
        if self._best is None or line["val_loss"] < self._best["val_loss"]:
            self._best, self._worse = line, 0
            return None
        self._worse += (worse := overfits(self._best, line))
        if not worse or self._worse != TREND:
            return None
        return (
            f"overfitting: the validation loss is {line['val_loss']:.3f} after {self._best['val_loss']:.3f} at step "
            f"{self._best['step']:,}; meanwhile the training loss fell from {self._best['loss']:.3f} to "
            f"{line['loss']:.3f}; {REMEDIES}"
        )


class ChosenRepliesWatch:
    """Notices that preference optimization makes the chosen replies less likely, as long as rejected ones lose more."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_STEPS)
        self._warned = False

    def note(self, line: Mapping[str, Any]) -> str | None:
        """Take a line of metrics; return a sentence when the chosen replies have lost two nats on average."""
        if "chosen_log_ratio" not in line:
            return None
        self._ratios.append(line["chosen_log_ratio"])
        mean = sum(self._ratios) / len(self._ratios)
        if self._warned or len(self._ratios) < _STEPS or mean > -_SUNK:
            return None
        self._warned = True
        return (
            f"step {line['step']:,}: the chosen replies have become less likely than in the reference, by {-mean:.1f} "
            "nats each; only the margin over the rejected ones is in the loss: preferences.sft_weight = 1.0 keeps them "
            "likely, a larger preferences.beta or a smaller optimizer.learning_rate moves less"
        )


# Logged steps that are averaged, and the nats that chosen replies may lose.
_STEPS, _SUNK = 20, 2.0


def overfits(best: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics has a worse validation than the best one, by 0.5 %, and a better training loss."""
    return bool(line["val_loss"] > (1 + _MARGIN) * best["val_loss"] and line["loss"] < best["loss"])
