"""The process that sends a run to a tracking service: it follows the run's logs, and ends with the run.

    python -m gemmule.tracking.sender wandb RUN [--once]

Standard input is held open by the process that trains; its end is the end of the run. Messages to it are JSON objects,
one a line. What the service's client prints goes into `tracking/NAME.log` of the run folder.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gemmule.errors import GemmuleError, TrackingError
from gemmule.files import atomic_write, directory_lock, reason_of
from gemmule.run_folder import RunFolder
from gemmule.tracking.reader import RunReader
from gemmule.tracking.services import SERVICES, Service

# Seconds between two looks at the logs, and between two writes of the position.
_INTERVAL, _SAVE_INTERVAL = 1.0, 2.0
# Steps that are sent at once.
_BATCH = 100
# Seconds after which this process ends where the one that trains died and cannot end it.
_ORPHANED = 60.0


@dataclass
class Position:
    """What `tracking/NAME.json` of a run folder knows: the remote run, and the last step that was sent there."""

    identity: str
    step: int = 0
    url: str | None = None

    @classmethod
    def read(cls, run: RunFolder, service: str) -> "Position | None":
        """Read the position in a service; None before the first step was sent, TrackingError where it is damaged."""
        path = run.sent(service)
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise TrackingError(f"{path}: is damaged; without it, another remote run begins") from None

    def write(self, run: RunFolder, service: str) -> None:
        """Write the position atomically."""
        with atomic_write(run.sent(service)) as temporary:
            temporary.write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")


class Sender:
    """Sends what a run has and its remote run has not."""

    def __init__(self, run: RunFolder, name: str, service: Service) -> None:
        """Open the remote run, the same each time: its identity is kept before the service is asked."""
        self._run, self._name, self._service = run, name, service
        position = Position.read(run, name)
        if position is None:
            position = Position(uuid.uuid4().hex[:12])
            position.write(run, name)
        last = service.open(run, position.identity)
        self.position = position
        self.position.url = service.url
        self.position.step = position.step if last is None else last
        self._reader, self._saved, self.steps = RunReader(run, self.position.step), time.monotonic(), 0

    def send(self, ended: bool = False) -> None:
        """Send the records that were completed since the last time."""
        records = self._reader.read(ended)
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            self._service.log(batch)
            self.position.step, self.steps = batch[-1].step, self.steps + len(batch)
            if time.monotonic() - self._saved > _SAVE_INTERVAL:
                self._save()

    def close(self) -> None:
        """Send the rest and the picture of the curves, and close the remote run."""
        self.send(ended=True)
        if self.steps and self._run.curves.is_file():
            self._service.log_image("loss", self._run.curves, self.position.step)
        self._save()
        self._service.close()

    def _save(self) -> None:
        self.position.write(self._run, self._name)
        self._saved = time.monotonic()


def follow(sender: Sender, ended: Callable[[float], bool]) -> None:
    """Send while the run continues, until `ended`, which waits so many seconds for the end of the run."""
    while not ended(_INTERVAL):
        sender.send()
    sender.close()


def main() -> None:
    """Run the process."""
    name, run = sys.argv[1], RunFolder(Path(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the run, and the run this process
    parent, messages = os.dup(0), os.fdopen(os.dup(1), "w", encoding="utf-8")
    ended = _watch(parent)
    code = 1
    try:
        os.nice(10)  # training goes first
        run.tracking.mkdir(exist_ok=True)
        _redirect(run.service_log(name))
        with directory_lock(run.service_log(name)):
            sender = Sender(run, name, SERVICES[name].create())
            _post(messages, url=sender.position.url)
            follow(sender, (lambda _: True) if "--once" in sys.argv else ended)
            _post(messages, steps=sender.steps, last=sender.position.step)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        _post(messages, failed=_reason(error))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the client left to do at exit may wait for a service that is gone


def _watch(parent: int) -> Callable[[float], bool]:
    """Return a function that waits for the end of the run; where nobody ends this process after it, it ends itself."""
    end = threading.Event()

    def wait() -> None:
        select.select([parent], [], [])
        end.set()
        time.sleep(_ORPHANED)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    return end.wait


def _redirect(log: Path) -> None:
    with log.open("ab") as output, Path(os.devnull).open("rb") as nothing:
        for number, file in ((0, nothing), (1, output), (2, output)):
            os.dup2(file.fileno(), number)


def _post(messages: IO[str], **fields: Any) -> None:
    try:
        messages.write(json.dumps(fields) + "\n")
        messages.flush()
    except OSError:  # nobody is there any more
        pass


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return reason_of(error)
    first = str(error).strip().partition("\n")[0][:300]
    return first if isinstance(error, GemmuleError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main()
