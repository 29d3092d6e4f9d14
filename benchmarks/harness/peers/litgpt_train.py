"""Training steps of litgpt's Gemma 3, as its `pretrain` takes them: forward, loss, backward, clipping, AdamW."""

from typing import Any, Callable, Optional  # noqa: UP035 - any Python that runs litgpt runs this


def setup(job: dict[str, Any]) -> tuple[Optional[Callable[[], float]], dict[str, Any]]:  # noqa: UP045
    """Build the model by overriding the shape of litgpt's Gemma 3 1B, and return one step on random tokens."""
    from importlib.metadata import version

    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(job["seed"])
    device, half, shape = torch.device(job["device"]), job["precision"] == "bf16", job["config"]
    local = [int(kind == "sliding_attention") for kind in shape["layer_types"]]
    config = Config.from_name(
        "Gemma-3-1b-it", block_size=job["context"], n_layer=shape["num_hidden_layers"], n_embd=shape["hidden_size"],
        vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], norm_eps=shape["rms_norm_eps"],
        n_head=shape["num_attention_heads"], n_query_groups=shape["num_key_value_heads"], head_size=shape["head_dim"],
        attention_scores_scalar=shape["query_pre_attn_scalar"], intermediate_size=shape["intermediate_size"],
        sliding_window_size=shape["sliding_window"], sliding_window_indices=local, rope_indices=local,
        rope_base=int(shape["rope_theta"]), rope_local_base_freq=shape["rope_local_base_freq"],
    )  # fmt: skip
    model = GPT(config).to(device).train()
    if shape["tie_word_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    parameters = list(model.parameters())
    for parameter in parameters:  # norms hold their gain less 1
        torch.nn.init.normal_(parameter, std=shape["initializer_range"] if parameter.ndim == 2 else 0.0)
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
            targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                # Whole and not in chunks of 128, its default, which is slower here.
                loss = chunked_cross_entropy(network(tokens), targets, chunk_size=0) / parts
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, rates["clip"])
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step, {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "threads": torch.get_num_threads(),
        "versions": {"litgpt": version("litgpt"), "torch": torch.__version__},
    }
