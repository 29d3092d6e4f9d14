"""A Gemma 3 small enough for tests, in which nothing that could be confused is equal."""

from typing import TYPE_CHECKING, Any

import torch

from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3

if TYPE_CHECKING:
    from gemmule.train.optim import Optimizers  # takes a second to import, also in processes that tests start

LENGTH = 13  # of test sequences: more than twice the window


def tiny_config(**changes: Any) -> Gemma3Config:
    """Return seven layers of both kinds (local, local, global, ...), changed as asked."""
    shape: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,  # heads x head_dim is not the width
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "rope_scaling_factor": 4.0,
        "max_position_embeddings": 64,
    }
    return Gemma3Config(**shape | changes)


def shallow_config(**changes: Any) -> Gemma3Config:
    """Return four layers (local, local, global, local), changed as asked, for tests of what is around the model."""
    return tiny_config(**{"num_hidden_layers": 4} | changes)


def lively_model(config: Gemma3Config, kernel: str = "sdpa", seed: int = 0) -> Gemma3:
    """Return a model whose every weight, norms included, is far from nothing: logits are of size 1."""
    model = Gemma3(config, kernel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def optimizer_step(optimizers: "Optimizers", scale: float = 1.0) -> float:
    """Clip, update and clear the gradients, as the training loop does; return their norm before clipping."""
    grad_norm = optimizers.grad_norm()
    optimizers.clip_grad_norm(grad_norm)
    optimizers.set_learning_rate(scale)
    optimizers.step()
    optimizers.zero_grad()
    return grad_norm.item()


def some_tokens(config: Gemma3Config, rows: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Draw token ids (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


def greatest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of the same shape."""
    assert one.shape == other.shape
    return (one - other).abs().max().item()
