"""Weights & Biases; the library reads its key, server and mode from the variables WANDB_API_KEY and so on."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

from gemmule.run_folder import RunFolder
from gemmule.tracking.reader import Record, settings_of


class WeightsAndBiases:
    """A run of W&B; its files are in the run folder."""

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        self.url: str | None = None

    def open(self, run: RunFolder, identity: str) -> int | None:
        """Begin or continue the run; offline, what was sent is not known."""
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gemmule"),
            name=run.path.name,
            id=identity,
            resume="allow",
            dir=run.tracking,
            config=settings_of(run),
            settings=self._wandb.Settings(silent=True, console="off", save_code=False),
        )
        if self._run.offline:
            return None
        self.url = self._run.url
        return self._run.starting_step - 1 if self._run.resumed else 0

    def log(self, records: Sequence[Record]) -> None:
        """Log metrics, and samples as escaped text."""
        for record in records:
            texts = {name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in record.texts.items()}
            self._run.log({**record.metrics, **texts}, step=record.step, commit=True)

    def log_image(self, name: str, png: Path, step: int) -> None:  # noqa: ARG002 - W&B takes no step twice
        """Attach the picture to the summary of the run."""
        self._run.summary[name] = self._wandb.Image(str(png))

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()
