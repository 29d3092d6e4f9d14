"""Where `gemmule chat` reads and writes: a terminal with history and colors, or pipes with plain text."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import NamedTuple

from gemmule.cli.training_display import printable
from gemmule.errors import SourceError

_BLOCK = '"""'
_HISTORY_LINES = 1000


class Message(NamedTuple):
    """What the user entered; text from a block is never a command."""

    text: str
    block: bool = False


def is_terminal() -> bool:
    """Whether both standard input and standard output are a terminal."""
    try:
        return sys.stdin.isatty() and sys.stdout.isatty()
    except (AttributeError, ValueError):  # closed
        return False


class ChatTerminal:
    """Standard input and output; `interactive` where both are a terminal."""

    def __init__(self) -> None:
        self.interactive = is_terminal()
        self._colors = self.interactive and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._readline = _import_readline() if self.interactive else None
        self._first = True

    @contextmanager
    def history(self) -> Iterator[None]:
        """Read the lines of earlier sessions, and write those of this one at the end, where there is readline."""
        if self._readline is None:
            yield
            return
        file = history_file()
        with suppress(OSError):
            self._readline.read_history_file(file)
        try:
            yield
        finally:
            with suppress(OSError):  # a history that cannot be kept is no reason to fail
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file.touch(mode=0o600)
                self._readline.set_history_length(_HISTORY_LINES)
                self._readline.write_history_file(file)

    def read_message(self) -> Message | None:
        r"""Read a message: a line, several that end in a backslash, or a block between triple quotes; None at the end.

        SourceError where it is not UTF-8 text.
        """
        line = self.read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(_BLOCK):
            return Message(self._read_block(line.lstrip().removeprefix(_BLOCK)), block=True)
        lines = []
        while line is not None and _continues(line):
            lines.append(line[:-1])
            line = self.read_line(". ")
        lines.append(line or "")
        return Message("\n".join(each[:-1] if each.endswith("\\\\") else each for each in lines))

    def read_line(self, prompt: str, text: str = "") -> str | None:
        """Read a line, on a terminal with a prompt and with a text to edit; None at the end."""
        if not self.interactive:
            return self._read_piped()
        if self._readline is not None and text:
            readline = self._readline
            readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            line = input(self._prompt(prompt))
            return line.encode("utf-8", "surrogateescape").decode("utf-8")
        except EOFError:
            return None
        except UnicodeError:
            raise SourceError("what was typed is not UTF-8 text; set the locale of the terminal to UTF-8") from None
        finally:
            if self._readline is not None:
                self._readline.set_startup_hook()

    def write(self, text: str) -> None:
        """Write a piece of a reply at once; on a terminal control characters are escaped."""
        sys.stdout.write(printable(text) if self.interactive else text)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Write a line about the conversation, dimmed where there are colors."""
        text = printable(text) if self.interactive else text
        sys.stdout.write(f"\033[2m{text}\033[0m\n" if self._colors else f"{text}\n")
        sys.stdout.flush()

    @contextmanager
    def interrupts(self, stop: Callable[[], None]) -> Iterator[None]:
        """Let Ctrl-C on a terminal call `stop` inside the block, instead of an exception in the middle of a step."""
        if not self.interactive:
            yield
            return

        def interrupted(_number: int, _frame: FrameType | None) -> None:
            stop()

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _read_block(self, line: str | None) -> str:
        lines = []
        while line is not None and not line.rstrip().endswith(_BLOCK):
            lines.append(line)
            line = self.read_line(". ")
        lines.append((line or "").rstrip().removesuffix(_BLOCK))
        return "\n".join(lines).removeprefix("\n").removesuffix("\n")

    def _read_piped(self) -> str | None:
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not line:
            return None
        try:
            text = line.decode("utf-8-sig" if self._first else "utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
        self._first = False
        return text.removesuffix("\n").removesuffix("\r")

    def _prompt(self, prompt: str) -> str:
        if not self._colors:
            return prompt
        if self._readline is None:
            return f"\033[1;36m{prompt}\033[0m"
        return f"\001\033[1;36m\002{prompt}\001\033[0m\002"  # so that readline does not count them


def _continues(line: str) -> bool:
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _import_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def history_file() -> Path:
    """Return where entered lines are kept: in the user's folder for state, as the XDG specification has it."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():
        base = Path("~/.local/state").expanduser()
    return base / "gemmule" / "chat_history"
