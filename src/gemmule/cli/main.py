"""The `gemmule` command: finds the subcommand, loads only its file, and turns foreseen failures into one sentence."""

import errno
import importlib
import sys
from typing import Any

import click
import typer

from gemmule import __version__
from gemmule.errors import GemmuleError

# name -> the line that `gemmule --help` shows; the command itself is gemmule/cli/NAME.py.
COMMANDS = {
    "train": "Train a model from a recipe: data, tokenizer, training, curves and samples.",
    "prepare": "Turn text into token shards that runs can share.",
    "generate": "Let a model continue a text.",
    "evaluate": "Measure how well a model predicts a text.",
}

INTERRUPTED = 130


class _Commands(click.Group):
    """Loads a subcommand when it is called, so that `--help` needs neither torch nor the other commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"gemmule.cli.{cmd_name}")
        app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
        app.command(name=cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(app)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gemmule")
def gemmule() -> None:
    """Grow your own Gemma 3: from raw text to a trained, measured language model.

    Start with:  gemmule train recipes/story.toml
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit code 0 done, 1 a failure of ours, 2 the user's mistake, 130 stopped by Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result: Any = gemmule(arguments, standalone_mode=False)
    except GemmuleError as error:
        return _complain(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _complain("stopped", INTERRUPTED)
    except BrokenPipeError:
        return 0  # the reader of our output has seen enough
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _complain(f"{error.filename or 'output'}: no space left on the device", 2)
    return result if isinstance(result, int) else 0


def _complain(sentence: str, code: int) -> int:
    click.echo(f"gemmule: {sentence}", err=True)
    return code
