"""The run folder: the one place that knows the names of the files of a run."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.toml"


@dataclass(frozen=True)
class RunFolder:
    """Paths and logs of a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe, resolved once the run has begun."""
        return self.path / RECIPE_FILE

    def recipe_until(self, step: int) -> Path:
        """The recipe of the steps before `step`, where a resumed run changed it."""
        return self.path / f"recipe-until-{step:08d}.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object per continued sample prompt."""
        return self.path / "samples.jsonl"

    @property
    def environment(self) -> Path:
        """One JSON object per start of the run: machine, versions, commit, command."""
        return self.path / "environment.jsonl"

    @property
    def curves(self) -> Path:
        """The picture of training and validation loss."""
        return self.path / "loss.png"

    @property
    def curves_svg(self) -> Path:
        """The same picture, to be scaled."""
        return self.path / "loss.svg"

    @property
    def report(self) -> Path:
        """The page of `gemmule report`."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """What `gemmule evaluate` found (docs/evaluate.md)."""
        return self.path / "evaluation.json"

    @property
    def tracking(self) -> Path:
        """What is known of the tracking services that show the run."""
        return self.path / "tracking"

    def sent(self, service: str) -> Path:
        """The remote run of a tracking service, and the last step that was sent there."""
        return self.tracking / f"{service}.json"

    def service_log(self, service: str) -> Path:
        """What the client of a tracking service printed."""
        return self.tracking / f"{service}.log"

    @property
    def plan(self) -> Path:
        """What was predicted and measured of time and memory."""
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        """The prepared dataset, where the recipe names none."""
        return self.path / "data"

    @property
    def model(self) -> Path:
        """The final model folder."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The final adapter, of a run that trains one; the model folder has it merged."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def names(self) -> set[str]:
        """Return the names in the folder, without those of work that is not finished."""
        return {file.name for file in self.path.iterdir() if not file.name.endswith(".partial")}

    def trained_context(self) -> int | None:
        """Return the sequence length of training (`train.context`); None where the recipe cannot be read."""
        try:
            train = tomllib.loads(self.recipe.read_text(encoding="utf-8")).get("train")
        except (OSError, ValueError):
            return None
        found = train.get("context") if isinstance(train, dict) else None
        return found if type(found) is int else None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl."""
        return read_json_lines(self.metrics)

    def read_samples(self) -> list[dict[str, Any]]:
        """Return all lines of samples.jsonl."""
        return read_json_lines(self.samples)


def run_of(model: Path) -> RunFolder | None:
    """Return the run folder that a model path is, or that holds it as its model or as a checkpoint."""
    folders = [model]
    if model.name == "model":
        folders.append(model.parent)
    if step_of(model) is not None:
        folders.append(model.parent.parent)
    return next((run for run in map(RunFolder, folders) if _is_file(run.recipe)), None)


def step_of(model: Path) -> int | None:
    """Return the step of a checkpoint's folder; None for another path."""
    step = model.name.removeprefix("step-")
    return int(step) if model.name.startswith("step-") and step.isascii() and step.isdigit() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a closed folder, or of a name that is too long
        return False


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; a last line cut short by a kill is left out, and a missing file has no lines."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip(b"\0")]  # zeros are what a power cut may leave
