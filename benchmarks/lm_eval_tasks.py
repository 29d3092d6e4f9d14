"""CPU time of lm_eval's three methods on our adapter, compared with lm_eval's own `hf` at several batch sizes.

    python benchmarks/lm_eval_tasks.py --model runs/story/model

Both run in this process, in fp32 on the CPU, and take turns, so that what slows the machine slows both; seconds are
those of the processor, of all threads. Ours chooses its own batches. The figures of both are compared as well. Prints
a table, and writes it as JSON. Needs the extras `lm-eval` and `parity`, and accelerate.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# The task of each method, and what makes `hf` begin its texts with one bos: it puts one before rolling texts itself.
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "loglikelihood_rolling": ("storybook_perplexity", {"add_bos_token": False}),
    "loglikelihood": ("storybook_cloze", {}),
    "generate_until": ("storybook_continuation", {}),
}


def requests(task: str, items: int) -> list[Any]:
    """Return what lm_eval asks a model in a task."""
    from lm_eval.tasks import TaskManager

    from gemmule.evaluate.lm_eval.run import TASKS

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"items": items})
    loaded: Any = manager.load([task])["tasks"][task]
    loaded.set_config("num_fewshot", 0)
    loaded.build_all_requests(limit=items)
    return list(loaded.instances)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor's seconds of some work, and its result."""
    before = time.process_time()
    result = work()
    return time.process_time() - before, result


def difference(one: list[Any], other: list[Any]) -> float:
    """Return the largest difference of two lists of results; for replies, the share that differs."""
    if isinstance(one[0], str):
        return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)
    numbers = [[each[0] if isinstance(each, tuple) else each for each in results] for results in (one, other)]
    return max(abs(a - b) for a, b in zip(*numbers, strict=True))


def measure(model: str, method: str, items: int, sizes: list[int], trials: int) -> dict[str, Any]:
    """Let both do the work of one method, taking turns; return their seconds."""
    from lm_eval.models.huggingface import HFLM

    from gemmule.evaluate.lm_eval.model import register

    task, options = WORK[method]
    asked = requests(task, items)
    models = {"gemmule": register()(model, device="cpu")}
    models |= {f"hf, batch {n}": HFLM(model, device="cpu", dtype="float32", batch_size=n, **options) for n in sizes}
    spent: dict[str, list[float]] = {name: [] for name in models}
    results: dict[str, list[Any]] = {}
    for _ in range(trials):
        for name, each in models.items():
            work = getattr(each, method)
            taken, results[name] = seconds(lambda: work(asked, disable_tqdm=True))  # noqa: B023 - called at once
            spent[name].append(taken)
    best = min(list(models)[1:], key=lambda name: median(spent[name]))
    return {
        "task": task,
        "requests": len(asked),
        "seconds": spent,
        "best": best,
        "ratio": median(spent[best]) / median(spent["gemmule"]),
        "difference": difference(results["gemmule"], results[best]),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder that both open")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lm_eval_tasks.json"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found = {}
    for method in WORK:
        found[method] = measure(arguments.model, method, arguments.items, arguments.batch_sizes, arguments.trials)
        print(f"{method}: {found[method]['requests']} requests of {found[method]['task']}")
        for name, spent in found[method]["seconds"].items():
            print(f"  {name:<16}{median(spent):8.2f} s")
        print(f"  {found[method]['ratio']:.2f} times the best; largest difference {found[method]['difference']:.2g}")
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
