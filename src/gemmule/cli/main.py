"""The `gemmule` command. Foreseen failures end in one sentence and an exit code, never in a traceback."""

import atexit
import ctypes
import errno
import functools
import gc
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gemmule import __version__
from gemmule.cli.bench import bench
from gemmule.cli.doctor import doctor
from gemmule.cli.evaluate import evaluate
from gemmule.cli.export import export
from gemmule.cli.generate import generate
from gemmule.cli.import_ import import_
from gemmule.cli.plan import plan
from gemmule.cli.prepare import prepare
from gemmule.cli.resume_check import resume_check
from gemmule.cli.train import train
from gemmule.errors import GemmuleError

# Their files import what they need when they are called, so that `--help` loads no torch.
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "train": train,
    "prepare": prepare,
    "resume-check": resume_check,
    "generate": generate,
    "evaluate": evaluate,
    "doctor": doctor,
    "import": import_,
    "export": export,
    "bench": bench,
}

INTERRUPTED = 130


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gemmule {__version__}")
        raise typer.Exit


def gemmule(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Grow your own Gemma 3: from raw text to a trained, measured language model.

    Start with:  gemmule train recipes/story.toml
    """


def graceful(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to end in one sentence and a code: 1 a failure of ours, 2 the user's mistake, 130 Ctrl-C."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
            sys.stdout.flush()  # here, where a failure is told
        except GemmuleError as error:
            _leave(str(error), error.exit_code)
        except KeyboardInterrupt:
            _leave("stopped", INTERRUPTED)
        except BrokenPipeError:
            _let_go_of_output()
            raise typer.Exit(0) from None  # the reader of our output has seen enough
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _let_go_of_output()
            _leave(f"{error.filename or 'output'}: no space left on the device", 2)

    return wrapped


def _let_go_of_output() -> None:
    """Write what is left of the output, or drop it: Python would try again at its end, and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(sentence: str, code: int) -> None:
    typer.echo(f"gemmule: {sentence}", err=True)
    raise typer.Exit(code)


def build_app() -> typer.Typer:
    """Put the commands together."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(gemmule)
    for name, command in COMMANDS.items():
        app.command(name)(graceful(command))
    return app


def main() -> None:
    """Run the command line."""
    prepare_process()
    build_app()()


def prepare_process() -> None:
    """Set what torch's threads and memory need, before it is loaded."""
    # While torch is loaded, objects come and stay: to look through all of them at each 700th takes a fifth of a second.
    gc.set_threshold(100_000)
    # And once more at the end, when all of it goes anyway: a third of a second that the user waits for the prompt.
    atexit.register(gc.freeze)
    # Torch's threads spin while they wait for each other; on a machine that does something else too, a step then takes
    # ten times as long. Without any spinning it takes a tenth longer on one that does not.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Let glibc keep what torch frees: else each large tensor is paid for again, page by page, a fifth of a step.
    try:
        settings = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    settings(mmap_max, 0)
    settings(trim_threshold, -1)
