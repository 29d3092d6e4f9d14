"""Profile of a training step.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --recipe recipes/tinystories-90m-seed.toml --set train.batch_size=8 ...

Trains as `benchmarks/train.py` does (without --recipe, its 6.76M shape), lets torch's profiler name what runs, and adds
it up by parts. Prints a table, and writes it to --out as JSON. Compiled loops get a name for the profiler each, which
costs some percent; the time of a step without the profiler is reported, too.
"""
# ruff: noqa: E402 - the process is prepared before torch is loaded

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from gemmule.processes import prepare_process

prepare_process()  # as the command does

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from gemmule.settings import check_recipe, read_recipe
from gemmule.train.recipe import Recipe
from harness.train import DEFAULT, flops_per_token, job_of, setup
from harness.trials import Budget, machine

ROOT = Path(__file__).parents[1]
# The first whose words are all in the name of what ran.
PARTS = (
    ("matmuls of projections, MLP and head", ("aten::mm",)),
    ("matmuls of block-local attention", ("bmm",)),
    ("SDPA", ("scaled_dot_product",)),
    ("softmax of attention, forward and backward", ("cpp_fused", "_softmax")),
    ("loss without its matmuls", ("cpp_fused", "gather")),
    ("GELU and gating, forward and backward", ("cpp_fused", "gelu")),
    ("norms, RoPE, residuals, weight casts, forward and backward", ("cpp_fused",)),
    ("optimizer and clipping", ("adamw",)),
    ("optimizer and clipping", ("linalg_vector_norm",)),
    ("optimizer and clipping", ("foreach",)),
)
REST = "other: copies, gradient sums, embedding, kernel launches"
STEPS = 3


def part_of(name: str) -> str:
    """Return the part of the step to which a kernel belongs."""
    return next((part for part, words in PARTS if all(word in name for word in words)), REST)


def measure(recipe: Recipe) -> dict[str, Any]:
    """Time some steps, then name what is in them."""
    job = job_of(recipe, Budget(1, 0.0, STEPS, 3))
    inductor.cpp.enable_kernel_profile, inductor.cpp.descriptive_names = True, "original_aten"
    step, facts = setup(job)
    assert step is not None
    for _ in range(3):
        step()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
    events = [
        (event.key, event.self_cpu_time_total / 1e3 / STEPS, event.count / STEPS) for event in recorded.key_averages()
    ]
    parts: dict[str, float] = {}
    for name, milliseconds, _ in events:
        parts[part_of(name)] = parts.get(part_of(name), 0.0) + milliseconds
    tokens, config = job["batch"] * job["context"], check_recipe(job["recipe"], Recipe, "of the benchmark").model
    return {
        "benchmark": "profile_step", "machine": machine(), "facts": facts,
        "settings": {key: value for key, value in job.items() if key != "recipe"},
        "step_milliseconds": 1e3 * statistics.median(times), "profiled_milliseconds": sum(parts.values()),
        "tflops_at_least": flops_per_token(config, job["context"]) * tokens / 1e12,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "longest": [
            {"name": name[:120], "milliseconds": milliseconds, "times": count}
            for name, milliseconds, count in sorted(events, key=lambda event: -event[1])[:30]
        ],
    }  # fmt: skip


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="the shape to measure")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one setting")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/profile-6.76m.json")
    options = parser.parse_args()
    if options.recipe:
        recipe = read_recipe(options.recipe, Recipe, options.set)
    else:
        recipe = check_recipe(DEFAULT, Recipe, "of the benchmark", options.set)
    torch.manual_seed(0)
    found = measure(recipe)
    print(f"a step takes {found['step_milliseconds']:.0f} ms; by the profiler:")
    for part, milliseconds in found["parts"].items():
        print(f"{milliseconds:8.1f} ms  {milliseconds / found['profiled_milliseconds']:6.1%}  {part}")
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
