"""TensorBoard events of a run."""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmule.errors import MissingExtra
from gemmule.files import as_output_error
from gemmule.run_folder import RunFolder
from gemmule.tracking.tags import TAGS


class TensorBoard:
    """Writes events into the run folder, one file per process that trains.

    In this thread, and not by a SummaryWriter: its background thread dies with a traceback where a disk is full.
    """

    def __init__(self) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.text.summary_v2 import text_pb
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise MissingExtra("tensorboard", "plots", "writing TensorBoard events") from None
        self._event, self._log = event_pb2.Event, event_pb2.SessionLog
        self._summary, self._text, self._records = summary_pb2.Summary, text_pb, RecordWriter

    def start(self, run: RunFolder, step: int) -> None:
        """Open a file of events, which hides the events of later steps in older files, and log the recipe."""
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = run.tensorboard / name
        with as_output_error(self._path):
            run.tensorboard.mkdir(exist_ok=True)
            self._file = self._path.open("xb")
        self._write(step, file_version="brain.Event:2")
        self._write(step + 1, session_log=self._log(status=self._log.START))  # purges from here
        self.log_text("recipe", "    " + run.recipe.read_text(encoding="utf-8").replace("\n", "\n    "), step)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log the scalars of a line of metrics.jsonl."""
        given = {tag: metrics[key] for key, tag in TAGS.items() if metrics.get(key) is not None}
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in given.items()]
        self._write(metrics["step"], summary=self._summary(value=values))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, which TensorBoard shows as Markdown."""
        self._write(step, summary=self._text(name, text))

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Log a PNG."""
        with as_output_error(png):
            data = png.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        image = self._summary.Image(encoded_image_string=data, width=width, height=height, colorspace=4)
        self._write(step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def stop(self) -> None:
        """Do nothing: everything is written."""

    def finish(self) -> None:
        """Close the file of events."""
        self._file.close()

    def _write(self, step: int, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **fields)
        with as_output_error(self._path):
            self._records(self._file).write(event.SerializeToString())
            self._file.flush()
