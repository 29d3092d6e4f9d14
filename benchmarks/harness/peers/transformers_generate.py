"""Decoding with transformers."""

from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs transformers runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Open the folder in the dtype of its file and return one continuation of the prompt."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").to(job["device"]).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([job["ids"]], dtype=torch.long, device=job["device"])

    def step() -> float:
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["tokens"], min_new_tokens=job["tokens"],
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return float(made.shape[1] - ids.shape[1])

    return step, {
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
