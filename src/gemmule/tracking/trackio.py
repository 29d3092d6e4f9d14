"""trackio; the library reads TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; without the last two it is local."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemmule.errors import TrackingError
from gemmule.run_folder import RunFolder
from gemmule.tracking.reader import Record, settings_of


class Trackio:
    """A run of a trackio project."""

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio
        self.url: str | None = None

    def open(self, run: RunFolder, identity: str) -> int | None:
        """Begin or continue the run, which is known by its name."""
        with _warnings_as_errors():
            self._run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "gemmule"),
                name=f"{run.path.name}-{identity}",
                resume="allow",
                config=settings_of(run),
                embed=False,
            )
        following = getattr(self._run, "_next_step", None)  # the library has no public name for it
        return None if following is None else max(0, following - 1)

    def log(self, records: Sequence[Record]) -> None:
        """Log metrics, and samples as text of code, which shows them as they are."""
        for record in records:
            texts = {name: self._trackio.Markdown(_as_code(text)) for name, text in record.texts.items()}
            self._run.log({**record.metrics, **texts}, step=record.step)

    def log_image(self, name: str, png: Path, step: int) -> None:
        """Log the picture."""
        self._run.log({name: self._trackio.Image(str(png))}, step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        with _warnings_as_errors():
            self._trackio.finish()


def _as_code(text: str) -> str:
    return "    " + text.replace("\n", "\n    ")


@contextmanager
def _warnings_as_errors() -> Iterator[None]:
    """Raise what the library only warns of: data that it could not send or find."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if "trackio" in str(warning.filename) or "trackio" in str(warning.message).lower():
            raise TrackingError(str(warning.message))
