"""What nobody foresaw: the machine's refusals end in a sentence, faults of ours in a traceback."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gemmule.cli.main import graceful

ERRORS = sorted(set(errno.errorcode) - {errno.EPIPE, errno.ESHUTDOWN})  # a reader that has left is no failure


def ended(error: BaseException) -> Any:
    """Let a command end in an error."""

    def command() -> None:
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(graceful(command))
    return CliRunner().invoke(app, [])


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.__getitem__)
def test_every_error_of_the_system_names_file_and_reason(number: int) -> None:
    reason = "no space left on the device" if number == errno.ENOSPC else os.strerror(number)
    result = ended(OSError(number, os.strerror(number), "a/b.txt"))
    assert (result.exit_code, result.stderr) == (2, f"gemmule: a/b.txt: {reason}\n")
    result = ended(OSError(number, os.strerror(number)))
    assert result.exit_code == 2
    assert result.stderr.endswith(f": {reason}\n")


def overflow(depth: int = 0) -> int:
    return overflow(depth + 1)


def failing(work: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each of another kind
        work()
    return caught.value


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(13, "Permission denied", b"caf\xe9.txt"), r"caf\udce9.txt: Permission denied"),
        (OSError(18, "Invalid link", "a", None, "b"), "a -> b: Invalid link"),
        (OSError(5, "Input/output error", 7), "input or output: Input/output error"),
        (failing(lambda: Path("nowhere/file").read_bytes()), "nowhere/file: No such file or directory"),
        (MemoryError(), "out of memory (none is left); a smaller batch"),
        (MemoryError("Unable to allocate 80.0 GiB"), "out of memory (Unable to allocate 80.0 GiB); a smaller batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\n at 0x1"),
            "out of memory ([enf",
        ),
        (failing(overflow), "what was read is nested too deeply"),
        (failing(lambda: "Zoé".encode("ascii")), r"'\xe9' cannot be written in ascii; set the environment variable"),
        (failing(lambda: "caf\udce9.txt".encode()), r"'caf\udce9.txt' holds bytes that are not UTF-8; rename the file"),
    ],
)
def test_what_the_machine_refuses_is_said_in_a_sentence(error: BaseException, sentence: str) -> None:
    result = ended(error)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gemmule: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("shapes"), AssertionError(), OSError("a library's own")]
)
def test_faults_of_ours_keep_their_traceback(error: BaseException) -> None:
    assert ended(error).exception is error


@pytest.mark.parametrize("module", ["typer", "gemmule.cli.train", "gemmule.errors"])
def test_ctrl_c_while_the_command_is_loaded_ends_in_a_word(module: str) -> None:
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from gemmule.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "gemmule: stopped\n")
