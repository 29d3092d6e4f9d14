"""`gemmule train RECIPE`: prepare, train, draw, tell."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.screen import Screen, print_json

if TYPE_CHECKING:
    from gemmule.model.gemma3 import Gemma3
    from gemmule.plan.record import Witness
    from gemmule.train.run import Audience, Outcome, Recipe

INTERRUPTED = 130


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: TOML, see recipes/ for some with every key explained.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/NAME-OF-RECIPE]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out stopped, if there is one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the result last.")] = False,
) -> None:
    """Train a model from a recipe: data, tokenizer, training, curves and samples.

    Examples:

        gemmule train recipes/story.toml

        gemmule train recipes/tinystories-cpu.toml --set data.train=train.txt --set data.validation=valid.txt

        gemmule train recipes/story.toml --out runs/story --resume
    """
    from gemmule.plan.record import Witness
    from gemmule.recipe import read_recipe
    from gemmule.train.run import SILENT, Recipe, run_recipe

    settings = read_recipe(recipe, Recipe, overrides or [])
    run = out or Path("runs") / recipe.stem
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one speaks
    with Screen(quiet=not first) as screen:
        witness = Witness(settings, run, int(os.environ.get("WORLD_SIZE", "1"))) if first else None
        audience = SILENT if witness is None else _audience(screen, run, witness)
        outcome = run_recipe(settings, run, resume, audience)
    if outcome.position.step < outcome.recipe.train.steps:
        changes = [part for item in overrides or [] for part in ("--set", item)]
        launcher = ["torchrun", "...", "-m"] if "TORCHELASTIC_RUN_ID" in os.environ else []
        again = shlex.join([*launcher, "gemmule", "train", str(recipe), *changes, "--out", str(run), "--resume"])
        screen.say(f"stopped after step {outcome.position.step:,}, which is saved; go on with:  {again}")
        raise typer.Exit(INTERRUPTED)
    if outcome.model is None:
        return
    if witness is not None and (sentence := witness.conclude()):
        screen.say(sentence)
    summary = _conclude(screen, outcome, outcome.model, run)
    if as_json:
        print_json(json.dumps(summary))


def _audience(screen: Screen, run: Path, witness: "Witness") -> "Audience":
    """Tell the screen, the picture, TensorBoard and the plan's witness of the run."""
    from gemmule.generate.engine import complete
    from gemmule.generate.sampling import STORYTELLING
    from gemmule.report.curves import draw_curves
    from gemmule.report.tensorboard import open_tensorboard
    from gemmule.train.run import Audience

    board = open_tensorboard(run / "tensorboard", screen.say)

    def record(line: dict[str, Any], steps: int) -> None:
        screen.training(line, steps)
        board(line)
        witness.note(line)
        if "val_loss" in line:
            draw_curves(run, screen.say)

    def tell(model: Any, tokenizer: Any, prompts: Any, tokens: int, seed: int) -> list[str]:
        texts = complete(model, tokenizer, prompts, tokens, STORYTELLING, seed)
        for text in texts:
            screen.say("  | " + text.strip().replace("\n", "\n  | "))
        return texts

    return Audience(screen.say, screen.progress, record, tell)


def _conclude(screen: Screen, outcome: "Outcome", model: "Gemma3", run: Path) -> dict[str, Any]:
    """Say where the result lies; where the corpus can check stories, let the model tell some and show the verdicts."""
    from gemmule.train.metrics import read_json_lines

    last = read_json_lines(run / "metrics.jsonl")[-1]
    summary = {"run": str(run), "model": str(run / "model"), **last}
    if is_storybook(outcome.recipe):
        from gemmule.evaluate.stories import judge_stories
        from gemmule.generate.sampling import STORYTELLING as SAMPLING

        prompt, tokenizer = "Once upon a time", outcome.dataset.tokenizer
        judged = judge_stories(model, tokenizer, prompt, count=100, sampling=SAMPLING, seed=1)
        for number, story in enumerate(judged[:3], start=1):
            screen.say(f"\nStory {number}\n\n{story.text}\n\n  checker: {story.verdict}")
        good, possible = sum(story.verdict.good for story in judged), sum(story.possible for story in judged)
        screen.say(
            f"\nOf {len(judged)} stories told at temperature {SAMPLING.temperature} and min-p {SAMPLING.min_p}, "
            f"{good} are whole and consistent; {possible} the storybook itself could have told."
        )
        summary |= {"stories": len(judged), "good_stories": good, "possible_stories": possible}
    screen.say(f"the model is in {run / 'model'}, its curves are in {run / 'loss.png'}; let it speak:")
    screen.say(f"  gemmule generate {run / 'model'}")
    return summary


def is_storybook(recipe: "Recipe") -> bool:
    """Whether the run learned from the embedded corpus, whose stories can be checked."""
    return all(source.split(":")[0] == "storybook" for source in recipe.data.train)
