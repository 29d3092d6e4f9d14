"""`gemmule resume-check RECIPE`: is a run that was killed and resumed the same run, bit for bit, here?"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gemmule.cli.screen import Screen, print_json


def resume_check(
    recipe: Annotated[Path, typer.Argument(help="The recipe to check: your own.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps that are run, at most those of the recipe.")] = 30,
    kills: Annotated[int, typer.Option(min=1, help="How often the run is killed.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the moments at which it is killed.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the result last.")] = False,
) -> None:
    """Show on your own recipe that a run which is killed and resumed equals one that was not.

    Trains its first steps twice in a temporary folder, the second time under `kill -9` at random moments, and compares
    weights, optimizer, metrics and samples by their bits. Ends with 0 where all are the same and with 1 where not.

    Examples:

        gemmule resume-check recipes/story.toml --set train.compile=false

        gemmule resume-check recipes/story.toml --steps 100 --kills 20
    """
    from gemmule.evaluate.resume import resume_check, shortened
    from gemmule.recipe import read_recipe
    from gemmule.train.run import Recipe

    settings = shortened(read_recipe(recipe, Recipe, overrides or []), steps, kills)
    with Screen() as screen, tempfile.TemporaryDirectory(prefix="gemmule-resume-") as folder:
        verdict = resume_check(settings, Path(folder), kills, seed, screen.say)
    if verdict.differences:
        screen.say(f"NOT the same run: {'; '.join(verdict.differences)} differ")
    else:
        screen.say(
            f"the same run: after {verdict.steps} steps and {len(verdict.kills)} kills, {verdict.while_saving} of them "
            "while a checkpoint was written, "
            "weights, optimizer, metrics and samples are equal bit for bit"
        )
    if as_json:
        print_json(json.dumps(verdict._asdict() | {"same": not verdict.differences}))
    if verdict.differences:
        raise typer.Exit(1)
