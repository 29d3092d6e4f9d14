"""What a run was expected to take and what it took: `plan.json` in its folder."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from gemmule.data.dataset import DATASET_FILE, prepared_folder
from gemmule.files import written_aside
from gemmule.plan.memory import process_bytes
from gemmule.plan.planner import OPTIMAL, Plan, Planner
from gemmule.runtime import choose_device
from gemmule.train.run import Recipe


def summary(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain numbers: bytes, seconds, FLOPs, dollars."""
    return {
        "device": plan.device.name,
        "gpus": plan.sharing.gpus,
        "strategy": plan.sharing.strategy,
        "precision": plan.precision,
        "parameters": {**plan.parameters._asdict(), "all": plan.parameters.total},
        "flops_per_token": {"forward": plan.flops_forward, "backward": plan.flops_backward},
        "flops_per_update": plan.flops_update,
        "memory": {**plan.memory.classes, "all": plan.memory.total, "moment": plan.memory.moment},
        "capacity": plan.capacity,
        "fits": plan.fits,
        "micro_batch_size": plan.micro_batch,
        "largest_micro_batch_size": plan.largest,
        "seconds": {**plan.times._asdict(), "step": plan.times.step},
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilisation": plan.utilisation,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "kilowatt_hours": plan.kilowatt_hours,
        "cost": plan.cost,
        "exchanges": [{**one._asdict(), "seconds": seconds} for one, seconds in plan.exchanged],
        "data_tokens": plan.text.tokens,
        "epochs": plan.tokens / plan.text.tokens if plan.text.tokens else None,
        "data_known_by": plan.text.how,
        "compute_optimal_share": plan.tokens / plan.parameters.body / OPTIMAL,
        "assumptions": plan.assumptions,
    }


class Witness:
    """Plans a run before it begins, watches it, and writes down at its end how far the plan was off."""

    def __init__(self, recipe: Recipe, run: Path, gpus: int) -> None:
        """Make the plan; a run goes on without one where that fails, for whatever reason."""
        self._run = run
        self._rates: list[float] = []
        # Preparing data in the same process may take more memory than training, and nobody could tell them apart.
        self._prepares = prepared_folder(recipe.data) is None and not (run / "data" / DATASET_FILE).is_file()
        self._plan: Plan | None = None
        try:
            kind = choose_device(recipe.train.device).type
            if kind != "mps":  # which of Apple's chips it is cannot be told
                self._plan = Planner(recipe, "cpu" if kind == "cpu" else None, gpus).plan(search=False)
        except Exception:
            return

    def note(self, line: dict[str, Any]) -> None:
        """Look at a line of metrics."""
        self._rates.append(line["tokens_per_second"])

    def conclude(self) -> str | None:
        """Write plan.json; return in one sentence how far the plan was off."""
        rates = self._rates[1:] or self._rates  # the first step also compiles
        if self._plan is None or not rates:
            return None
        plan, rate = self._plan, statistics.median(rates)
        measured: dict[str, Any] = {"tokens_per_second": rate, "step_seconds": plan.tokens_per_step / rate}
        predicted = {"tokens_per_second": plan.tokens_per_second, "step_seconds": plan.times.step}
        if not self._prepares:
            cuda = plan.device.name != "cpu"
            measured["peak_memory"] = torch.cuda.max_memory_reserved() if cuda else process_bytes()
            predicted["peak_memory"] = plan.memory.total - plan.memory.classes.get("CUDA context", 0.0)
        off = {key: predicted[key] / value - 1 for key, value in measured.items()}
        with written_aside(self._run / "plan.json") as aside:
            content = {"predicted": predicted, "measured": measured, "off": off, "plan": summary(plan)}
            aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        memory = f", memory {off['peak_memory']:+.0%}" if "peak_memory" in off else ""
        return f"the plan was off by: time of a step {off['step_seconds']:+.0%}{memory}"
