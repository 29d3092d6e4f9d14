"""The facts of a run, read from its folder with what is there; nothing in it is trusted, and nothing opens a model."""

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmule.data.dataset import DATASET_FILE, REPORT_FILE
from gemmule.errors import UserError
from gemmule.growing_file import GrowingFile
from gemmule.model.config import Gemma3Config
from gemmule.reading import local_path, path_kind
from gemmule.report.logs import RunLogs, is_number
from gemmule.run_folder import RunFolder
from gemmule.train.metrics import TREND, overfits

_LARGEST_JSON = 1 << 26  # bytes
_MOST_ENVIRONMENTS = 50
_TOKENIZER_FILE, _CERTIFICATE_FILE = "tokenizer.json", "certificate.json"


class RunError(UserError):
    """A folder holds no run."""


@dataclass
class RunFacts:
    """What is known of a run; None and empty where its folder does not say it."""

    run: RunFolder
    logs: RunLogs
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    former_recipes: list[str] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)
    config: Gemma3Config | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # report.json of the prepared dataset
    dataset: dict[str, Any] = field(default_factory=dict)  # its dataset.json
    tokenizer: str | None = None  # a fingerprint
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by what was evaluated, the newest last
    certificates: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path in the run folder

    def setting(self, section: str, key: str) -> Any:
        """Return a setting of the recipe, None where it is not set."""
        table = self.recipe.get(section)
        return table.get(key) if isinstance(table, dict) else None

    def number(self, section: str, key: str) -> float | None:
        """Return a setting that is a number."""
        value = self.setting(section, key)
        return value if is_number(value) else None

    @property
    def last(self) -> Mapping[str, float]:
        """The newest value of each metric."""
        return self.logs.metrics.last

    @property
    def step(self) -> int:
        """Optimizer steps that metrics.jsonl has lines of."""
        return int(self.last.get("step", 0))

    @property
    def finished(self) -> bool:
        """Whether the last step of the recipe was taken."""
        steps = self.number("train", "steps")
        return steps is not None and self.setting("train", "minutes") is None and self.step >= steps

    @property
    def stopped_early(self) -> bool:
        """Whether `train.early_stopping` has ended the run."""
        patience, every = self.number("train", "early_stopping"), self.number("train", "validate_every")
        best = self.logs.metrics.best
        if patience is None or every is None or best is None or self.finished:
            return False
        return self.step - max(best["step"], self.number("schedule", "restart_step") or 0) >= patience * every

    @property
    def epochs(self) -> float | None:
        """Passes over the training text."""
        size, seen = subtable(self.data, "train").get("tokens"), self.last.get("tokens")
        return seen / size if is_number(size) and size and seen is not None else None

    @property
    def worse(self) -> float | None:
        """How far the last validation loss is above the best one, as a share of that."""
        best, loss = self.logs.metrics.best, self.last.get("val_loss")
        return loss / best["val_loss"] - 1 if loss is not None and best is not None and best["val_loss"] > 0 else None

    @property
    def overfits(self) -> bool:
        """Whether validations after the best one got worse, three of them, while the training loss fell."""
        best, loss = self.logs.metrics.best, self.last.get("loss")
        if best is None or loss is None or not self.worse:
            return False
        after = (point for point in self.logs.metrics.curves["val_loss"].extremes() if point.step > best["step"])
        before = {"loss": math.inf, **best}  # of a resumed run the training loss of that step may not be kept
        return sum(overfits(before, {"val_loss": point.value, "loss": loss}) for point in after) >= TREND

    @property
    def sources(self) -> list[str]:
        """What the model was trained on."""
        return _names(self.setting("data", "train") or subtable(self.dataset, "settings").get("train"))

    @property
    def license(self) -> str | None:
        """The license of the data, as the recipe or the prepared dataset gives it."""
        given = self.setting("data", "license") or subtable(self.dataset, "settings").get("license")
        return str(given) if given else None

    @property
    def environment(self) -> dict[str, Any]:
        """The newest environment that the run was trained in."""
        return self.environments[-1] if self.environments else {}

    @property
    def resumes(self) -> list[dict[str, Any]]:
        """The environments of starts that continued from a step above 0."""
        return [each for each in self.environments if is_number(each.get("step")) and each["step"] > 0]

    @property
    def floor(self) -> float | None:
        """The entropy floor of the validation text, in nats per token."""
        return self.last.get("val_floor")

    @property
    def above_floor(self) -> float | None:
        """How far the last validation loss is above the floor, as a share of it."""
        loss = self.last.get("val_loss")
        return loss / self.floor - 1 if loss is not None and self.floor else None

    @property
    def hours(self) -> float | None:
        """Hours of training."""
        seconds = self.last.get("seconds")
        return None if seconds is None else seconds / 3600

    def planned(self, key: str) -> float | None:
        """Return a number of the plan."""
        value = subtable(self.plan, "plan").get(key)
        return value if is_number(value) and math.isfinite(value) else None

    def in_proportion(self, key: str) -> float | None:
        """Return what the plan says of the whole run (cost, kilowatt_hours), for the hours that it really took."""
        value, hours = self.planned(key), self.planned("hours")
        return value / hours * self.hours if value is not None and hours and self.hours is not None else None


def read_run(path: Path, *, expected: bool = True) -> RunFacts:
    """Return what a run folder holds; RunError where that is no run, unless none is `expected` yet."""
    run = RunFolder(path)
    kind = path_kind(path, RunError)
    if kind != "folder" and (expected or kind is not None):
        what = "does not exist" if kind is None else "is no folder"
        raise RunError(f"{path}: {what}; name the folder of a run, such as runs/story")
    if expected and not any(path_kind(file) for file in (run.recipe, run.metrics)):
        hint = f"; its run folder is {path.parent}" if path_kind(path.parent / run.recipe.name) else ""
        raise RunError(f"{path}: holds no run (no {run.recipe.name}, no {run.metrics.name}){hint}")
    facts = RunFacts(run, RunLogs(run.metrics, run.samples), path.resolve().name)
    refresh(facts)
    return facts


def read_runs(paths: Sequence[Path], *, expected: bool = True) -> list[RunFacts]:
    """Return what several run folders hold; those of the same name are distinguished by their paths."""
    runs = [read_run(path, expected=expected) for path in paths]
    names = [facts.name for facts in runs]
    for facts, path in zip(runs, paths, strict=True):
        if names.count(facts.name) > 1:
            facts.name = str(path)
    return runs


def refresh(facts: RunFacts) -> None:
    """Read what has changed in the run folder."""
    run = facts.run
    facts.logs.update()
    facts.recipe_text = _read(run.recipe)
    with suppress(tomllib.TOMLDecodeError, RecursionError):
        facts.recipe = tomllib.loads(facts.recipe_text)
    facts.former_recipes = sorted(file.name for file in _glob(run.path, "recipe-until-*.toml"))
    with suppress(OSError):
        facts.environments = list(GrowingFile(run.environment).read())[-_MOST_ENVIRONMENTS:]
    facts.config = _config(facts)
    facts.plan = _read_json(run.plan)
    folder = _data_folder(facts)
    facts.dataset, facts.data = _read_json(folder / DATASET_FILE), _read_json(folder / REPORT_FILE)
    facts.tokenizer = _tokenizer(facts, folder)
    facts.evaluations = _evaluations(run)
    certificates = [*_glob(run.path, f"*{_CERTIFICATE_FILE}"), *_glob(run.path, f"*/*{_CERTIFICATE_FILE}")]
    facts.certificates = {
        str(file.relative_to(run.path)): found for file in certificates if (found := _read_json(file))
    }


def version(facts: RunFacts) -> tuple[Any, ...]:
    """Return what changes whenever something that `refresh` reads may have."""
    run = facts.run
    files = (run.recipe, run.plan, run.environment, run.evaluation, run.path, run.model)
    return (facts.logs.version(), tuple(GrowingFile(file).version() for file in files))


def _evaluations(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Return the results of `gemmule evaluate` under their names."""
    listed = _read_json(run.evaluation).get("evaluations")
    found = dict[str, dict[str, Any]]()
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            parts = [str(entry[key]) for key in ("data", "suite", "tasks", "model") if entry.get(key)]
            limit = f", the first {entry['limit']} documents" if entry.get("limit") else ""
            found[", ".join(parts) + limit or "evaluation"] = entry
    return found


def subtable(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the table under a key of another, empty where there is none."""
    value = table.get(key)
    return value if isinstance(value, Mapping) else {}


def _config(facts: RunFacts) -> Gemma3Config | None:
    """Return the shape of the model: that of the recipe, where it gives the vocabulary, else of a model folder."""
    table = dict(subtable(facts.recipe, "model"))
    if "vocab_size" not in table and "size" not in table:
        given = _read_json(facts.run.model / "config.json").get("vocab_size")
        table["vocab_size"] = given or facts.setting("tokenizer", "vocab_size")
    known = {key: value for key, value in table.items() if key in Gemma3Config.model_fields and value is not None}
    if "vocab_size" not in known and "size" not in known:
        return None
    try:
        return Gemma3Config(**known)
    except ValueError:  # of another version, or damaged
        return None


def _data_folder(facts: RunFacts) -> Path:
    """Return the prepared dataset of a run: its own, or the one that its recipe names."""
    named = _names(facts.setting("data", "train"))
    if len(named) == 1 and not path_kind(facts.run.data / DATASET_FILE):
        with suppress(UserError):
            folder = local_path(named[0])
            if path_kind(folder / DATASET_FILE):
                return folder
    return facts.run.data


def _tokenizer(facts: RunFacts, folder: Path) -> str | None:
    fingerprint = facts.dataset.get("fingerprint")
    if isinstance(fingerprint, str):
        return fingerprint
    for place in (folder, facts.run.model):
        with suppress(OSError):
            return hashlib.sha256((place / _TOKENIZER_FILE).read_bytes()).hexdigest()
    return None


def _names(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)] if value else []


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_JSON).decode("utf-8", "replace")
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
