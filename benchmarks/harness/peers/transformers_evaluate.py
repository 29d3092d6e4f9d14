"""Evaluation throughput of transformers: document by document, as its guides and most scripts do."""

from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - any Python that runs transformers runs this


def setup(job: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return one evaluation of all stories; its figure is nats per token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    texts = Path(job["text"]).read_text(encoding="utf-8").split(job["separator"])

    @torch.inference_mode()
    def score() -> tuple[float, int]:
        nats, tokens = 0.0, 0
        for text in texts:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            count = ids.shape[1] - 1
            nats += model(ids, labels=ids).loss.item() * count
            tokens += count
        return nats / tokens, tokens

    facts = {
        "tokens": score()[1],
        "threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    return lambda: score()[0], facts
