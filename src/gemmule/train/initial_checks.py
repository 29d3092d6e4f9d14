"""Checks of step 0: the model is causal, every parameter receives a gradient, and the first loss is plausible."""

import logging
import math

import numpy as np
import torch
from torch import Tensor

from gemmule.compiler import uncompiled
from gemmule.data.batches import IGNORED, Batch
from gemmule.distributed import full_tensor
from gemmule.errors import TrainingError
from gemmule.model.gemma3 import Gemma3
from gemmule.train.parallel import Parallel

log = logging.getLogger(__name__)


def check_causal(parallel: Parallel, batch: Batch) -> None:
    """Raise TrainingError unless the model is causal: changing tokens must not change predictions before them."""
    model, device = parallel.model, parallel.runtime.device
    tokens = batch.tokens[:1].to(device)
    if (middle := tokens.shape[1] // 2) == 0:
        return
    changed = tokens.clone()
    changed[:, middle:] = (changed[:, middle:] + 1) % model.config.vocab_size
    model.eval()
    with torch.no_grad(), uncompiled(), parallel.runtime.autocast():
        one, other = (model(each, output_head=_hidden_states)[:, :middle] for each in (tokens, changed))
    model.train()
    off = (one - other).abs().max() / one.abs().max().clamp(min=1e-30)
    if off > _LEAK:
        raise TrainingError(
            f"step 0: the model is not causal: changing the tokens from position {middle} on changes predictions "
            f"before it, by {off:.2g} of the largest value"
        )


def _hidden_states(hidden: Tensor, _vocabulary: Tensor) -> Tensor:
    return hidden.float()


# What rounding in sums of another order can make of equal numbers.
_LEAK = 1e-2
# Nats that the first loss may be off by; attention that sees one token many times is not in the expectation.
_ODD = 1.5


def check_first_step(model: Gemma3, loss: float, targets: Tensor, pretrained: bool = False) -> None:
    """Raise TrainingError for parameters without a gradient; log a warning for an implausible initial loss.

    A `pretrained` model predicts better than the frequencies of the tokens would, one with first weights knows
    nothing.
    """
    identity = (*_without_effect(model), *_without_update(model))
    adapted = any(name.endswith(".lora_a") for name, _ in model.named_parameters())
    without_gradient = [
        name
        for name, p in model.named_parameters()
        if not name.startswith(identity)
        and (p.requires_grad or not adapted)  # below an adapter the weights are frozen
        and (p.grad is None or not bool(full_tensor(p.grad.norm())))
    ]
    if without_gradient:
        more = " ..." if len(without_gradient) > 5 else ""
        raise TrainingError(f"step 0: no gradient reaches {', '.join(without_gradient[:5])}{more}")
    if pretrained:
        entropy = unigram_entropy(targets)
        if not loss < entropy:
            log.warning(
                f"step 0: the loss is {loss:.2f} nats per token, and the frequencies of these tokens alone would cost "
                f"{entropy:.2f}: the model of train.start knows little of this text, or is damaged (gemmule doctor)"
            )
        return
    expected = expected_first_loss(model, targets)
    if not abs(loss - expected) < _ODD:
        log.warning(
            f"step 0: the loss is {loss:.2f} nats per token where an untrained model of this shape has about "
            f"{expected:.2f} on these rows ({unigram_entropy(targets):.2f} is the entropy of their tokens, "
            f"{math.log(model.config.vocab_size):.2f} that of guessing); look at the first validation"
        )


def _without_effect(model: Gemma3) -> tuple[str, ...]:
    """Return the names of modules behind a norm of gain 0, whose layers are the identity until it has moved."""
    branches = {
        "post_attention_norm": ("attention.", "pre_attention_norm."),
        "post_mlp_norm": ("mlp.", "pre_mlp_norm."),
    }
    found: list[str] = []
    for name, parameter in model.named_parameters():
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in branches and not bool(full_tensor((1 + parameter.detach()).norm())):
            found += [f"{block}.{each}" for each in branches[norm]]
    return tuple(found)


def _without_update(model: Gemma3) -> tuple[str, ...]:
    """Return the names of each A of an adapter whose B is still 0."""
    parameters = dict(model.named_parameters())
    firsts = [name for name in parameters if name.endswith(".lora_a")]
    return tuple(
        n for n in firsts if not bool(full_tensor(parameters[n.replace(".lora_a", ".lora_b")].detach().norm()))
    )


def expected_first_loss(model: Gemma3, targets: Tensor) -> float:
    """Return the expected loss of a model with first weights on rows of targets (B,T), in nats per token.

    Logits of a head drawn from N(0, s^2) for normed states of width D are N(0, s^2 D), which costs s^2 D / 2 above
    ln V. A tied head knows the token that was just read: its logit is D s c, where c is the cosine between the residual
    stream and its embedding. The stream is the embedding, of variance s^2 D, and what the branches add, of the squared
    gain of their norms each.
    """
    config, std = model.config, model.config.initializer_range
    guess = math.log(config.vocab_size) + config.hidden_size * std**2 / 2
    if not config.tie_word_embeddings:
        return guess
    own = config.hidden_size * std**2
    gains = [
        (1 + full_tensor(p.detach()).float()).square().mean().item()
        for name, p in model.named_parameters()
        if "post_" in name
    ]
    seen = config.hidden_size * std * math.sqrt(own / (own + sum(gains)))
    pairs = (targets[:, 1:] != IGNORED) & (targets[:, :-1] != IGNORED)
    repeated = ((targets[:, 1:] == targets[:, :-1]) & pairs).sum().item() / max(1, pairs.sum().item())
    return float(np.logaddexp(guess, seen)) - repeated * seen


def unigram_entropy(targets: Tensor) -> float:
    """Return the entropy of the frequencies of targets, in nats: what predicting without any context costs at best."""
    counts = torch.bincount(targets[targets != IGNORED].flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return -(shares * shares.log()).sum().item()
