"""Opening a run folder for a run: the lock, which settings a resumed run may change, leftovers of killed processes."""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gemmule.errors import OutputError
from gemmule.fields import LARGEST_COUNT
from gemmule.files import as_output_error, atomic_write, directory_lock, remove
from gemmule.reading import require_utf8
from gemmule.run_folder import RunFolder
from gemmule.settings import read_recipe, write_recipe
from gemmule.train.recipe import Recipe, gives_vocabulary
from gemmule.train.settings import AUTO
from gemmule.train.state import Position

log = logging.getLogger(__name__)

# Sections, and settings of [train], that change no weight: how it is computed, and what is logged and kept.
_FREE_SECTIONS = ("parallel", "tracking")
FREE = (
    "micro_batch_size", "device", "attention", "compile", "log_every", "validate_every", "validation_tokens",
    "sample_prompts", "sample_tokens", "checkpoint_every", "keep_checkpoints", "final_model", "early_stopping",
    "max_skipped_steps",
)  # fmt: skip
# What is said of the data, and changes none of it.
_LABELS = ("license",)
# Settings that the run has measured, and keeps where the recipe says "auto".
_MEASURED = ("attention", "precision")
# Settings that decide what the weights mean and which rows a step trains on: another value is another run.
_FIXED = re.compile(
    r"data\..*|tokenizer\..*|model\..*|lora\..*|optimizer\.name|train\.(start|batch_size|context|seed|damp_branches)"
)
# Names of temporary files. Those of an interrupted preparation are used again.
_LEFTOVER = re.compile(r"\.(?!data\.)[\w.-]+\.(partial|old)$")


class Extension(NamedTuple):
    """How much longer a run trains: so many steps, or as many as fit into so many minutes."""

    steps: int | None = None
    minutes: float | None = None

    def apply(self, recipe: Recipe, stopped: int | None = None) -> Recipe:
        """Return the recipe of the longer run, whose schedule begins anew at the step that was to be the last.

        Early stopping may have ended the run before that, at the step `stopped`.
        """
        end = stopped or recipe.train.steps
        length = (
            {"steps": LARGEST_COUNT, "minutes": self.minutes} if self.steps is None else {"steps": end + self.steps}
        )
        schedule, train = recipe.schedule.replace(restart_step=end), recipe.train.replace(**length)
        return recipe.replace(schedule=schedule, train=train)


@contextmanager
def claim_run(
    recipe: Recipe, out: Path, resume: bool, allow_changes: bool = False, extend: Extension | None = None
) -> Iterator[Recipe]:
    """Lock the run folder `out` and yield the recipe to follow: its own where a run is resumed or extended.

    OutputError where another process has locked it, or where it holds something else.
    """
    require_utf8(out, lambda message: OutputError(f"--out {message}"))
    if out.exists() and not out.is_dir():
        raise not_a_run(out)
    with as_output_error(out):
        out.mkdir(parents=True, exist_ok=True)
    with directory_lock(out):
        run = RunFolder(out)
        followed = _recipe_to_follow(recipe, run, resume, allow_changes or extend is not None)
        if extend is None:
            yield followed
            return
        if not run.metrics.is_file():
            raise OutputError(f"--out {out}: has no run to extend yet; train it without --extend first")
        longer = extend.apply(followed, stopped_early(run, followed))
        length = f"{extend.minutes:g} minutes" if extend.steps is None else f"{extend.steps:,} steps"
        log.info(
            f"extending the run by {length}: from step {longer.schedule.restart_step:,} on the learning rate warms up "
            f"and decays anew ({longer.schedule.name})"
        )
        yield longer


def stopped_early(run: RunFolder, recipe: Recipe) -> int | None:
    """Return the step at which early stopping has ended a run; None where it has not."""
    losses = {line["step"]: line["val_loss"] for line in run.read_metrics() if "val_loss" in line}
    if not losses:
        return None
    position = Position(step=max(losses), best_step=min(losses, key=losses.__getitem__))
    return position.step if position.is_over(recipe.train, recipe.schedule) else None


def _recipe_to_follow(recipe: Recipe, run: RunFolder, resume: bool, allow_changes: bool) -> Recipe:
    names = run.names()
    if names and run.recipe.name not in names:
        raise not_a_run(run.path)
    if names - {run.recipe.name}:
        if not resume:
            advice = f"resume it with --resume, name another folder, or remove it (rm -r {run.path})"
            raise OutputError(f"--out {run.path}: holds a run already; {advice}")
        return _resumed_recipe(recipe, run, allow_changes)
    # Empty, or left by a run that failed before it had read its data.
    with atomic_write(run.recipe) as temporary:
        write_recipe(recipe, temporary, "The recipe of this run, as given.", given_only=True)
    return recipe


def _resumed_recipe(recipe: Recipe, run: RunFolder, allow_changes: bool) -> Recipe:
    """Return the run's own recipe with the settings of the given one that may change."""
    known = read_recipe(run.recipe, Recipe)
    differing = differences(recipe, known)
    if differing:
        changes, fixed = "; ".join(differing.values()), any(map(_FIXED.fullmatch, differing))
        if fixed or not allow_changes:
            advice = "name another folder" if fixed else "name another folder, or add --allow-changes"
            raise OutputError(f"--out {run.path}: holds a run of another recipe ({changes}); {advice}")
        log.info(f"resuming with changed settings: {changes}")
        known = _with_changes(known, recipe)
    free = {key: getattr(recipe.train, key) for key in FREE}
    free |= {key: getattr(known.train, key) for key in _MEASURED if getattr(recipe.train, key) == AUTO}
    sections = {name: getattr(recipe, name) for name in _FREE_SECTIONS}
    labels = {key: value for key in _LABELS if (value := getattr(recipe.data, key)) is not None}
    return known.replace(train=known.train.replace(**free), data=known.data.replace(**labels), **sections)


def _with_changes(known: Recipe, given: Recipe) -> Recipe:
    """Take over what --allow-changes allows: the optimizer's and schedule's constants, precision and steps."""
    changes: dict[str, object] = {} if given.train.precision == AUTO else {"precision": given.train.precision}
    restart = known.schedule.restart_step
    if given.train.minutes is None and not restart:
        changes["steps"] = given.train.steps
    train, schedule = known.train.replace(**changes), given.schedule.replace(restart_step=restart)
    return known.replace(optimizer=given.optimizer, schedule=schedule, train=train)


def not_a_run(out: Path) -> OutputError:
    """Return the error of an output folder that holds something else than a run."""
    return OutputError(f"--out {out}: holds other files and no run; name a new or empty folder")


def differences(given: Recipe, stored: Recipe) -> dict[str, str]:
    """Describe each setting that differs, apart from those that resolving sets or that may always change."""
    ignored = {f"train.{key}" for key in FREE} | {f"data.{key}" for key in _LABELS}
    if given.train.start is not None:  # which decided what the recipe left out
        unset = set(type(given.model).model_fields) - given.model.model_fields_set
        ignored |= {"tokenizer.vocab_size", *(f"model.{key}" for key in unset)}
    if not gives_vocabulary(given.model):
        ignored.add("model.vocab_size")
    if not gives_vocabulary(given.tokenizer):
        ignored.add("tokenizer.vocab_size")
    if given.train.precision == AUTO:
        ignored.add("train.precision")
    if given.train.minutes is not None or stored.schedule.restart_step:  # an extended run has steps of its own
        ignored |= {"train.minutes", "train.steps", "schedule.restart_step"}
    new, old = (
        {
            f"{section}.{key}": value
            for section, table in r.model_dump(exclude=set(_FREE_SECTIONS)).items()
            for key, value in table.items()
        }
        for r in (given, stored)
    )
    changed = (key for key in new if new[key] != old[key] and key not in ignored)
    return {key: f"{key} is {new[key]!r}, was {old[key]!r}" for key in changed}


def remove_leftovers(run: RunFolder) -> None:
    """Remove temporary files of killed processes; a folder that was being replaced gets its name back."""
    for folder in (run.path, run.checkpoints):
        for path in list(folder.iterdir()) if folder.is_dir() else ():
            if not _LEFTOVER.fullmatch(path.name):
                continue
            target = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
            with suppress(OSError):  # it takes space, and does no other harm
                if path.suffix == ".old" and path.is_dir() and not target.exists():
                    path.rename(target)
                else:
                    remove(path)


def keep_recipe(run: RunFolder, step: int) -> None:
    """Keep the recipe of the steps before `step`, beside the one that a resumed run follows from there."""
    with as_output_error(run.path):
        shutil.copy(run.recipe, run.recipe_until(step))
