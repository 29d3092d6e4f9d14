"""Tasks of lm_eval on a MODEL: what `gemmule evaluate --tasks` does."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemmule.errors import RecipeError, SourceError
from gemmule.evaluate.lm_eval.model import register

TASKS = Path(__file__).with_name("tasks")  # of ours, none of which needs a network
_FEW_SHOT_SEED = 1234  # lm_eval's own


def local_names() -> list[str]:
    """Return the names of the tasks that need no network, and last the one of all together."""
    return [*sorted(path.stem for path in TASKS.glob("*.yaml")), "storybook"]


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    items: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    context: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Run tasks of lm_eval, ours or its own, on a MODEL; return the metrics of each task and of each group.

    `items` is how many of each task, `shots` how many solved examples stand before each (by default as many as the task
    says), `chat` whether prompts are rendered by the model's chat template, `context` how many tokens are read at
    once. Raises MissingExtra without lm_eval, SourceError for a task that is not there, or whose data is neither here
    nor to be had, TokenizerError where there is no chat template.
    """
    kind = register()
    import lm_eval

    with _quiet():
        # First what can be refused without loading a model.
        found = _load_tasks(tasks, items)
        harness_model = kind(model, device=device, batch_size=batch_size, max_length=context)
        if chat:
            harness_model.chat_template(True)
        for task in found["tasks"].values():
            shown = task.get_config("num_fewshot") or 0
            # A task without shots says 0 where shots would be wrong.
            task.set_config("num_fewshot", shown if shots is None or task.get_config("num_fewshot") == 0 else shots)
            task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        results = lm_eval.evaluate(
            harness_model,
            found,
            limit=items,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    assert results is not None
    return {"model": model, "tasks": _metrics(results), **harness_model.get_model_info()}


def _load_tasks(names: Sequence[str], items: int | None) -> Any:
    """Load tasks with their data."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise RecipeError(f"--tasks: no name; without a network there are {', '.join(local_names())}")
    # To read lm_eval's 14,000 tasks takes ten seconds.
    ours = set(names) <= set(local_names())
    metadata = {} if items is None else {"items": items}
    manager = TaskManager(include_path=str(TASKS), include_defaults=not ours, metadata=metadata)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            advice = f"did you mean {', '.join(near)}?" if near else f"without a network: {', '.join(local_names())}"
            raise SourceError(f"--tasks {name}: lm_eval has no such task; {advice}")
    try:
        found = manager.load(manager.match_tasks(list(names)))
    except (OSError, ImportError) as error:  # huggingface_hub's errors are OSErrors
        reason = " ".join(str(error).split())[:200]
        there = f"tasks that need no network: {', '.join(local_names())}"
        raise SourceError(f"--tasks {','.join(names)}: the data cannot be had ({reason}); {there}") from None
    for name, task in found["tasks"].items():
        for mark, what in (("UNSAFE_CODE", "runs code that the model wrote"), ("MULTIMODAL", "needs more than text")):
            if getattr(task, mark, False):
                raise RecipeError(f"--tasks {name}: it {what}, which is not done here; leave it out")
    return found


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each task its number of items and its metrics; a standard error stands beside its metric."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, values in (results["results"] | results.get("groups", {})).items():
        counts = results["n-samples"].get(name)
        # lm_eval calls a metric "acc,none": none of the task's filters was applied.
        numbers = {key.removesuffix(",none"): each for key, each in values.items() if isinstance(each, float)}
        numbers = {key.replace("_stderr,none", "_stderr"): each for key, each in numbers.items()}
        metrics[name] = {**({"items": counts["effective"]} if counts else {}), **numbers}
    return metrics


def describe_results(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each task."""
    for name, metrics in results["tasks"].items():
        parts = []
        for metric, value in metrics.items():
            error = metrics.get(f"{metric}_stderr")
            if metric == "items" or metric.endswith("_stderr"):
                continue
            parts.append(f"{metric} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        items = f" ({metrics['items']:,} items)" if "items" in metrics else ""
        yield f"{name}{items}: {', '.join(parts)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm_eval and what it downloads with log errors alone."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
