"""Observers of a run: progress bars, pictures and trackers hang here; messages go to `logging`."""

from collections.abc import Callable, Sequence
from typing import Any

from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer
from gemmule.train.resolve import ResolvedRecipe

# (model, tokenizer, prompts, max_new_tokens, seed) -> each prompt with its continuation.
SampleFunction = Callable[[Gemma3, Tokenizer, Sequence[str], int, int], list[str]]


class Observer:
    """Is called by a run on its main rank; override what you need (compare transformers' TrainerCallback)."""

    def on_progress(self, task: str, done: int, total: int | None) -> None:
        """See how much of a task is done, of how much if that is known."""

    def on_prepare_data(self) -> None:
        """See that this process is about to prepare the data, which may take more memory than training."""

    def on_train_begin(self, recipe: ResolvedRecipe) -> None:
        """See the resolved recipe before the first step."""

    def on_metrics(self, metrics: dict[str, Any], steps: int) -> None:
        """See a line of metrics.jsonl and the number of steps of the run."""

    def on_samples(self, step: int, texts: Sequence[str]) -> None:
        """See the continued sample prompts of a validated step."""
