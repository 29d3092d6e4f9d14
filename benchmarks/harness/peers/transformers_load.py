"""Loading time of transformers."""

import time
from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs transformers runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Open the folder in the dtype of its file and generate one token; the setup is what is measured."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    ready = time.time()
    ids = tokenizer(job["prompt"], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=1, do_sample=False)
    first = time.time()
    return None, {
        "ready": ready,
        "first_token": first,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).replace("torch.", ""),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
