"""Training steps of transformers' Gemma 3: forward, loss, backward, clipping, AdamW."""

from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs transformers runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Build the model from its config.json and return one step on random tokens."""
    import torch
    import transformers

    torch.manual_seed(job["seed"])
    device, half = torch.device(job["device"]), job["precision"] == "bf16"
    config = transformers.Gemma3TextConfig(**job["config"])
    model = transformers.Gemma3ForCausalLM._from_config(config, attn_implementation="sdpa").to(device).train()
    parameters = list(model.parameters())
    rates = job["optimizer"]
    optimizer = torch.optim.AdamW(
        parameters, lr=rates["learning_rate"], betas=tuple(rates["betas"]), eps=rates["epsilon"],
        weight_decay=rates["weight_decay"], fused=True,
    )  # fmt: skip
    network = torch.compile(model) if job["compile"] else model
    rows, parts = job["micro_batch"], job["batch"] // job["micro_batch"]

    def step() -> float:
        total = 0.0
        for _ in range(parts):
            tokens = torch.randint(config.vocab_size, (rows, job["context"]), device=device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss / parts
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, rates["clip"])
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step, {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "threads": torch.get_num_threads(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
