"""`gemmule train RECIPE`: prepare, train, draw the curves, generate samples."""

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemmule.cli.screen import Screen, logged_to, note, print_json
from gemmule.errors import UserError
from gemmule.fields import LARGEST_COUNT
from gemmule.run_folder import RunFolder

if TYPE_CHECKING:
    from gemmule.model.gemma3 import Gemma3
    from gemmule.train.open_run import Extension
    from gemmule.train.recipe import Recipe
    from gemmule.train.run import Outcome

INTERRUPTED = 130


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe: TOML, see recipes/. `gemmule settings` lists every key, as docs/settings.md does."
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one setting.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.  [default: runs/NAME-OF-RECIPE]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out from its newest checkpoint, if there is one.")
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes", help="Resume with other optimizer constants, another schedule or more steps than before."
        ),
    ] = False,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS|MINUTES", help="Train the run in --out longer, by 500 (steps) or 10m; the schedule restarts."
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Show the run in wandb, mlflow or trackio, too (adds to tracking.to; may be repeated)."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object with the result last.")] = False,
) -> None:
    """Train a model from a recipe: data, tokenizer, training, curves and samples.

    Examples:

        gemmule train recipes/story.toml

        gemmule train recipes/tinystories-cpu.toml --set data.train=train.txt --set data.validation=valid.txt

        gemmule train recipes/story.toml --out runs/story --resume

        gemmule train recipes/story.toml --out runs/story --extend 2m
    """
    from gemmule.distributed import launch_environment
    from gemmule.settings import read_recipe
    from gemmule.tracking import with_trackers
    from gemmule.train.recipe import Recipe

    run, longer = RunFolder(out or Path("runs") / recipe.stem), None if extend is None else _read_extension(extend)
    again = command_to_resume(recipe, run, overrides or [], track or [])
    launched = launch_environment()
    is_main = launched is None or launched.rank == 0
    settings = read_recipe(recipe, Recipe, overrides or [], warn=note if is_main else lambda _: None)
    settings = settings.replace(tracking=with_trackers(settings.tracking, track or []))

    summary = follow(settings, run, again, resume=resume, allow_changes=allow_changes, longer=longer)
    if as_json and summary is not None:
        print_json(summary)


def follow(
    recipe: "Recipe",
    run: RunFolder,
    again: str,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    longer: "Extension | None" = None,
) -> dict[str, Any] | None:
    """Train as a recipe says and show it; return a summary on the main rank.

    Where the run is stopped, `again` is the command that resumes it, and typer.Exit or KeyboardInterrupt is raised.
    """
    from gemmule.distributed import launch_environment
    from gemmule.train.run import run_recipe

    launched = launch_environment()
    is_main = launched is None or launched.rank == 0
    with Screen(quiet=not is_main) as screen, logged_to(screen):
        observer = None
        if is_main:
            from gemmule.cli.observer import ScreenObserver
            from gemmule.plan.prediction_log import PredictionLog

            observer = ScreenObserver(screen, run, PredictionLog(run, launched.size if launched else 1))
        try:
            sample = _sample if recipe.data.kind == "text" else _answer
            outcome = run_recipe(recipe, run.path, resume, observer, sample, allow_changes, longer, _reply)
        except KeyboardInterrupt:
            screen.print(f"stopped; resume with:  {again}")
            raise
    if not outcome.finished:
        screen.print(f"stopped after step {outcome.position.step:,}, which is saved; resume with:  {again}")
        raise typer.Exit(INTERRUPTED)
    if outcome.model is None:
        return None
    with logged_to(screen):
        if observer is not None:
            observer.conclude()
    return _conclude(screen, outcome, outcome.model, run)


def _sample(model: Any, tokenizer: Any, prompts: Any, tokens: int, seed: int) -> list[str]:
    from gemmule.inference.engine import complete
    from gemmule.inference.sampling import STORYTELLING

    return complete(model, tokenizer, prompts, tokens, STORYTELLING, seed)


def _answer(model: Any, tokenizer: Any, prompts: Any, tokens: int, seed: int) -> list[str]:
    """Return each prompt, as the turn of a user, and the reply below it."""
    from gemmule.inference.engine import reply_to_all, stop_tokens
    from gemmule.inference.requests import requests_of
    from gemmule.inference.sampling import STORYTELLING
    from gemmule.tokenizer.chat import render_chat

    if not prompts:
        return []
    turns = [render_chat(tokenizer, [{"role": "user", "content": each}], reply=True).ids for each in prompts]
    tokens = min(tokens, model.config.max_position_embeddings - max(map(len, turns)))
    replies = reply_to_all(model, requests_of(turns, tokens, stop_tokens(tokenizer), STORYTELLING, seed))
    return [f"{prompt}\n\n{tokenizer.decode(reply)}" for prompt, reply in zip(prompts, replies, strict=True)]


def _reply(
    model: Any, prompts: Any, replies: int, max_new_tokens: int, temperature: float, stops: frozenset[int]
) -> list[list[list[int]]]:
    """Return so many replies to each prompt, by the engine (see `train/rollouts.py`)."""
    from gemmule.inference.groups import reply_to_groups
    from gemmule.inference.requests import Request
    from gemmule.inference.sampling import SamplingSettings

    sampling = SamplingSettings(temperature=temperature)
    requests = [Request(prompt.ids, max_new_tokens, sampling, prompt.seed, replies, stops=stops) for prompt in prompts]
    return reply_to_groups(model, requests)


def _read_extension(text: str) -> "Extension":
    """Read the value of --extend; UserError where it is none."""
    from gemmule.train.open_run import Extension

    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(m|min|minutes)?", text.strip())
    number = float(found[1]) if found else 0
    if not found or not 0 < number <= LARGEST_COUNT or (found[2] is None and number != int(number)):
        raise UserError(f"--extend {text}: write a number of steps, such as 500, or of minutes, such as 10m")
    return Extension(minutes=number) if found[2] else Extension(steps=int(number))


def command_to_resume(recipe: Path, run: RunFolder, overrides: list[str], track: list[str]) -> str:
    """Return the command that resumes a run."""
    launcher = ["torchrun", "...", "-m"] if "TORCHELASTIC_RUN_ID" in os.environ else []
    changes = [part for item in overrides for part in ("--set", item)]
    changes += [part for name in track for part in ("--track", name)]
    return shlex.join([*launcher, "gemmule", "train", str(recipe), *changes, "--out", str(run.path), "--resume"])


def _conclude(screen: Screen, outcome: "Outcome", model: "Gemma3", run: RunFolder) -> dict[str, Any]:
    """Say where the result lies; where the corpus can check stories, let the model tell some and show the verdicts."""
    last = run.read_metrics()[-1]
    summary = {"run": str(run.path), "model": str(run.model), **last}
    if is_storybook(outcome.recipe):
        from gemmule.evaluate.stories import judge_stories
        from gemmule.inference.sampling import STORYTELLING as SAMPLING

        prompt, tokenizer = "Once upon a time", outcome.dataset.tokenizer
        judged = judge_stories(model, tokenizer, prompt, count=100, sampling=SAMPLING, seed=1)
        for number, story in enumerate(judged[:3], start=1):
            screen.print(f"\nStory {number}\n\n{story.text}\n\n  checker: {story.verdict}")
        good, possible = sum(story.verdict.good for story in judged), sum(story.possible for story in judged)
        screen.print(
            f"\nOf {len(judged)} stories told at temperature {SAMPLING.temperature} and min-p {SAMPLING.min_p}, "
            f"{good} are whole and consistent; {possible} the storybook itself could have told."
        )
        summary |= {"stories": len(judged), "good_stories": good, "possible_stories": possible}
    position, settings = outcome.position, outcome.recipe.train
    if position.best_step is not None and position.best_loss is not None and position.best_step < position.step:
        folder = run.checkpoint(position.best_step)
        kept = "the model folder has its weights" if settings.final_model == "best" else f"kept in {folder}"
        best = f"loss: {position.best_loss:.3f}"
        if outcome.recipe.data.kind == "prompts":
            best = f"reward: {-position.best_loss:.3f}"
        screen.print(f"best validation {best} at step {position.best_step:,}; {kept}")
    curves = f", its curves are in {run.curves}" if run.curves.exists() else ""
    screen.print(f"the model is in {run.model}{curves}; try it:")
    screen.print(f"  gemmule {'generate' if outcome.recipe.data.kind == 'text' else 'chat'} {run.model}")
    return summary


def is_storybook(recipe: "Recipe") -> bool:
    """Whether the run was trained on the embedded corpus, whose stories can be checked."""
    from gemmule.data.sources import StorybookSource, parse_source

    return all(isinstance(parse_source(source), StorybookSource) for source in recipe.data.train)
