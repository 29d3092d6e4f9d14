"""What `gemmule evaluate MODEL --tasks NAME,NAME` does: tasks of lm-evaluation-harness."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.errors import RecipeError


class Options(NamedTuple):
    """How tasks are run; the fields are those of `evaluate_tasks`."""

    items: int | None
    shots: int | None
    chat: bool
    context: int | None
    batch_size: int | None
    device: str


def run_tasks(models: Sequence[str], tasks: str, options: Options, unread: Mapping[str, object], as_json: bool) -> None:
    """Run tasks, names with commas between, on each model; print a line for each.

    RecipeError where an option is given that says how a text is read.
    """
    from gemmule.evaluate.lm_eval import describe_results, evaluate_tasks

    for name, value in unread.items():
        if value is not None:
            raise RecipeError(f"--{name} {value}: tasks bring their own texts; leave it out, or --tasks")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm_eval's bars, of which plain output would keep every state
    names = [name for name in tasks.split(",") if name]
    results = []
    for model in models:
        with Screen() as screen, logged_to(screen):
            results.append(evaluate_tasks(model, names, **options._asdict()))
        if len(models) > 1:
            screen.print(f"{model}:")
        for line in describe_results(results[-1]):
            screen.print(line)
    if as_json:
        print_json(results[0] if len(results) == 1 else {"models": results})
