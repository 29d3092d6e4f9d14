"""The `gemmule` command. Foreseen failures end in one sentence and an exit code, never in a traceback."""

import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gemmule import __version__
from gemmule.cli.chat import chat
from gemmule.cli.doctor import doctor
from gemmule.cli.evaluate import evaluate
from gemmule.cli.explain import explain
from gemmule.cli.export import export
from gemmule.cli.generate import generate
from gemmule.cli.grow import grow
from gemmule.cli.import_ import import_
from gemmule.cli.plan import plan
from gemmule.cli.prepare import prepare
from gemmule.cli.report import report
from gemmule.cli.serve import serve
from gemmule.cli.settings import settings
from gemmule.cli.train import train
from gemmule.cli.trim import trim
from gemmule.errors import GemmuleError
from gemmule.processes import Terminated, exit_without_finalization, prepare_process, terminated_as_interrupted
from gemmule.reading import local_path

# Their files import what they need when they are called, so that `--help` loads no torch.
COMMANDS: dict[str, Callable[..., None]] = {
    "grow": grow,
    "plan": plan,
    "settings": settings,
    "train": train,
    "prepare": prepare,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "evaluate": evaluate,
    "report": report,
    "explain": explain,
    "doctor": doctor,
    "import": import_,
    "export": export,
    "trim": trim,
}

INTERRUPTED, TERMINATED = 130, 143  # 128 and the number of the signal


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

    Your own text:  gemmule grow FOLDER
    """


def graceful(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command to end in one sentence and a code: 1 a failure of ours, 2 the user's mistake, 130 Ctrl-C.

    SIGTERM ends it with 143, after temporary files are removed. What nobody foresaw ends in a sentence, too, where the
    machine refused something; else in a traceback.
    """

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            with terminated_as_interrupted():  # so that temporary files go
                home = {name: local_path(each) if isinstance(each, Path) else each for name, each in options.items()}
                command(*arguments, **home)
            sys.stdout.flush()  # here, where a failure is reported
        except Terminated:
            _leave("stopped", TERMINATED)
        except GemmuleError as error:
            _leave(str(error), error.exit_code)
        except KeyboardInterrupt:
            _leave("stopped", INTERRUPTED)
        except BrokenPipeError:
            _let_go_of_output()
            raise typer.Exit(0) from None  # the reader of our output has seen enough
        except Exception as error:
            sentence = unforeseen(error)
            if sentence is None:  # a fault of ours, which its traceback helps to find
                raise
            _let_go_of_output()
            _leave(sentence, 2)

    return wrapped


def unforeseen(error: Exception) -> str | None:
    """Say what the machine refused where nothing else has said it; None for an error that is a fault of ours."""
    if isinstance(error, OSError) and (error.errno or error.filename):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        full = error.errno == errno.ENOSPC
        place = " -> ".join(names) or ("output" if full else "input or output")
        return f"{place}: {'no space left on the device' if full else error.strerror or error}"
    if isinstance(error, UnicodeEncodeError):
        if error.reason == "surrogates not allowed":
            return f"{error.object!a} holds bytes that are not UTF-8; rename the file, or name its folder"
        text = error.object[error.start : error.end]
        return f"{text!a} cannot be written in {error.encoding}; set the environment variable PYTHONIOENCODING=utf-8"
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply"
    said = str(error).partition("\n")[0]
    if isinstance(error, MemoryError) or ("can't allocate memory" in said or "out of memory" in said):
        return f"out of memory ({said or 'none is left'}); a smaller batch, a shorter context, fewer workers need less"
    return None


def _let_go_of_output() -> None:
    """Write what is left of the output, or drop it: Python would try again at its end, and change the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(sentence: str, code: int) -> None:
    sentence = sentence.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8
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
        # `generate` answers an argument too many itself, since it is the prompt most often.
        app.command(name, context_settings={"allow_extra_args": command is generate})(graceful(command))
    return app


def main() -> None:
    """Run the command line."""
    prepare_streams()
    prepare_process()
    try:
        build_app()()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(end.code, int):
            exit_without_finalization(end.code)
        raise


def prepare_streams() -> None:
    """Let standard output and error take every character, escaped where their encoding lacks it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed; what is opened next must not take its place
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
