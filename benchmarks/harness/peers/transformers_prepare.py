"""Tokenizing a corpus with `datasets.map` and transformers' fast tokenizer."""

import time
from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs transformers runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Load the rows into an empty cache and map the tokenizer over them; the setup is what is measured."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    cache = f"{job['folder']}/cache-{time.time_ns()}"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=job["tokenizer"])
    rows = datasets.load_dataset("parquet", data_files=job["rows"], split="train", cache_dir=cache)
    done = rows.map(
        lambda batch: tokenizer(batch["text"]), batched=True, num_proc=job["workers"], remove_columns=["text"]
    )
    return None, {
        "ended": time.time(),
        "documents": len(done),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }
