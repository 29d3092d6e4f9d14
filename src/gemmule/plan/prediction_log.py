"""Prediction log: the plan of a run beside its measurements, in `plan.json` of the run folder."""

import json
import statistics
from typing import Any

import torch

from gemmule.files import atomic_write
from gemmule.plan.cost_model import Collective
from gemmule.plan.devices import this_machine
from gemmule.plan.planner import COMPUTE_OPTIMAL, Plan, Planner, Times, device_at_hand
from gemmule.processes import peak_memory
from gemmule.run_folder import RunFolder
from gemmule.runtime import choose_device
from gemmule.train.recipe import Recipe


def summary(plan: Plan) -> dict[str, Any]:
    """Return a plan as a JSON object: bytes, seconds, FLOPs, US dollars."""
    return {
        "device": plan.device.name,
        "gpus": plan.sharding.gpus,
        "strategy": plan.sharding.strategy,
        "precision": plan.precision,
        "parameters": {**plan.parameters._asdict(), "all": plan.parameters.total},
        "flops_per_token": {"forward": plan.flops_forward, "backward": plan.flops_backward},
        "flops_per_update": plan.flops_optimizer,
        "memory": {**plan.memory.classes, "all": plan.memory.total, "moment": plan.memory.phase},
        "capacity": plan.capacity,
        "fits": plan.fits,
        "micro_batch_size": plan.micro_batch,
        "largest_micro_batch_size": plan.largest,
        "seconds": _seconds(plan.times),
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilisation": plan.mfu,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": plan.hours,
        "kilowatt_hours": plan.kilowatt_hours,
        "cost": plan.cost,
        "exchanges": [_exchange(one, seconds) for one, seconds in plan.collectives],
        "data_tokens": plan.dataset.tokens,
        "epochs": plan.tokens / plan.dataset.tokens if plan.dataset.tokens else None,
        "data_known_by": plan.dataset.source,
        "compute_optimal_share": plan.tokens / plan.parameters.body / COMPUTE_OPTIMAL,
        "assumptions": plan.assumptions,
    }


def _seconds(times: Times) -> dict[str, float]:
    keys = ("forward", "backward", "update", "exchange", "validation", "sample", "start")  # of the file format
    return {**dict(zip(keys, times, strict=True)), "step": times.step}


def _exchange(one: Collective, seconds: float) -> dict[str, Any]:
    fields = one._asdict()
    between = fields.pop("inter_node")
    return {**fields, "between_machines": between, "seconds": seconds}


class PredictionLog:
    """Plans a run before it starts, and logs the error of the plan at its end."""

    def __init__(self, run: RunFolder, gpus: int) -> None:
        """Measure the memory of this process before the run allocates any."""
        self._run, self._gpus, self._process = run, gpus, peak_memory()
        self._rates: list[float] = []
        self._plan: Plan | None = None
        # Not where this process also does what may take more memory than training.
        self.compares_memory = True

    def predict(self, recipe: Recipe) -> None:
        """Make the plan of a resolved recipe; if that fails for any reason, the run continues without one."""
        try:
            kind = choose_device(recipe.train.device).type
            if kind != "mps":  # the Apple chip is unknown
                device = this_machine() if kind == "cpu" else device_at_hand()
                self._plan = Planner(recipe, device, self._gpus, self._process).plan(search=False)
        except Exception:
            return

    def observe(self, line: dict[str, Any]) -> None:
        """Take the throughput of a line of metrics."""
        self._rates.append(line["tokens_per_second"])

    def utilization(self, rate: float) -> tuple[float | None, float | None]:
        """Return the shares that so many tokens per second are of the planned throughput, and of a GPU's peak (MFU).

        On a CPU the planned throughput is what the measured times of the model's own kernels add up to.
        """
        if self._plan is None:
            return None, None
        of_plan = rate / self._plan.tokens_per_second
        return of_plan, None if self._plan.mfu is None else of_plan * self._plan.mfu

    def peak_memory(self) -> int:
        """Return the peak memory of the run so far, in bytes: of the GPU where there is a plan for it."""
        cuda = self._plan is not None and self._plan.device.name != "cpu"
        return torch.cuda.max_memory_reserved() if cuda else peak_memory()

    def write(self) -> str | None:
        """Write plan.json; return predicted and measured values in one sentence."""
        rates = self._rates[1:] or self._rates  # the first step also compiles
        if self._plan is None or not rates:
            return None
        plan, rate = self._plan, statistics.median(rates)
        measured: dict[str, Any] = {"tokens_per_second": rate, "step_seconds": plan.tokens_per_step / rate}
        predicted = {"tokens_per_second": plan.tokens_per_second, "step_seconds": plan.times.step}
        if self.compares_memory:
            measured["peak_memory"] = self.peak_memory()
            predicted["peak_memory"] = plan.memory.total - plan.memory.classes.get("GPU context", 0.0)
        errors = {key: predicted[key] / value - 1 for key, value in measured.items()}
        with atomic_write(self._run.plan) as temporary:
            content = {"predicted": predicted, "measured": measured, "off": errors, "plan": summary(plan)}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return "predicted and measured: " + ", ".join(
            f"{what} {predicted[key] / unit:.3g} and {value / unit:.3g} {name} ({errors[key]:+.0%})"
            for key, what, unit, name in (("step_seconds", "step", 1, "s"), ("peak_memory", "peak memory", 1e9, "GB"))
            if (value := measured.get(key))
        )
