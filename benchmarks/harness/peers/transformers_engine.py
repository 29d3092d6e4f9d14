"""Greedy decoding of many sequences with transformers: its continuous batching, and its generate of one batch."""

from typing import Any, Callable  # noqa: UP035 - any Python that runs transformers runs this

PAGE = 32  # tokens


def setup(job: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Open the folder; return the continuation of the prompts by each of the two."""
    import torch
    import transformers

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(job["device"]).eval()
    model.generation_config.eos_token_id = None
    prompts, tokens = job["prompts"], job["tokens"]
    rows, length = len(prompts), len(prompts[0])
    # By default the cache takes most of the memory, and each step of a CPU attends to all of it.
    bounded = transformers.ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=rows * (1 - (length + tokens) // -PAGE),
        max_batch_tokens=max(512, rows),
        max_requests_per_batch=rows,
        allow_block_sharing=False,
    )
    greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1)
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=bounded)
    manager.start()

    def continuous() -> Any:
        names = manager.add_requests(prompts, max_new_tokens=tokens)
        replies: dict[str, Any] = {}
        while len(replies) < rows:
            result = manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result and result.error}")
            replies[result.request_id] = result.generated_tokens
        return [replies[name] for name in names]

    ids = torch.tensor(prompts, dtype=torch.long, device=job["device"])

    def static() -> Any:
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return made[:, length:].tolist()

    return {"continuous batching": continuous, "static batch": static}, {
        "threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
