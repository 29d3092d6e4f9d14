"""Checks of the parts: is each one what Gemma 3 defines, given the model's own weights and config?

Each part is fed and measured alone, so that a fault is found where it is, and not only felt.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from structure_instruments import (
    Answer,
    Call,
    Mixing,
    ModelUnderTest,
    NotApplicable,
    differ,
    evenly,
    part,
    record,
    record_each,
    record_kernels,
)
from torch import Tensor, nn
from torch.nn import functional

from gemmule.model.attention import reference
from gemmule.model.gemma3 import RMSNorm

EXACT = 1e-3  # of the greatest value: what two ways of computing the same in fp32 stay within, with room
GELU = 3e-5  # the same where erf and tanh, at most 5e-4 apart, are to be told from each other


def _verdict(complaints: Iterator[str], otherwise: str) -> Answer:
    """Tell the first complaint and how many more there are, or that all is well."""
    all_complaints = list(complaints)
    if not all_complaints:
        return "passed", otherwise
    more = f" (and {len(all_complaints) - 1} more like it)" if len(all_complaints) > 1 else ""
    return "failed", all_complaints[0] + more


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * gain


def embedding(test: ModelUnderTest) -> Answer:
    """The first layer gets the tokens' embeddings times sqrt(hidden_size)."""
    tokens = test.tokens(2, 8)
    [call] = record_each(test.blocks()[:1], lambda: test.hidden(tokens))
    plain, measured = part(test.model, "embedding.weight")[tokens], _first(call)
    expected = math.sqrt(test.config.hidden_size)
    scale = ((measured * plain).sum() / plain.square().sum()).item()
    if differ(measured, plain * scale, EXACT):
        return "failed", "the first layer gets something else than the scaled embeddings of its tokens"
    if not math.isclose(scale, expected, rel_tol=0.01):
        return "failed", f"embeddings are scaled by {scale:.4g} instead of sqrt(hidden_size) = {expected:.4g}"
    return "passed", f"embeddings are scaled by {scale:.4g}, sqrt(hidden_size)"


def head(test: ModelUnderTest) -> Answer:
    """Logits are the product of normed hidden states and the vocabulary matrix, unscaled and without a cap."""
    tokens, seen = test.tokens(1, 8), []

    def look(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        seen.append((hidden, vocabulary))
        return hidden

    with torch.no_grad():
        test.model(tokens, output_head=look)
        logits = test.model(tokens)
    hidden, vocabulary = seen[0]
    name = "embedding.weight" if test.config.tie_word_embeddings else "head.weight"
    matrix = part(test.model, name)
    for what, measured, expected in (
        (f"the head's matrix is {name}", vocabulary, matrix),
        ("logits are hidden states", logits, hidden @ matrix.T),
    ):
        if measured.shape != expected.shape or differ(measured, expected, EXACT):
            factor = _factor(measured, expected)
            return "failed", f"{what} {f'times {factor:.4g}' if factor else 'changed by more than a factor'}"
    return "passed", f"logits are hidden states times {name}"


def _factor(measured: Tensor, expected: Tensor) -> float | None:
    if measured.shape != expected.shape:
        return None
    factor = ((measured * expected).sum() / expected.square().sum()).item()
    return None if differ(measured, expected * factor, EXACT) else factor


def norms(test: ModelUnderTest) -> Answer:
    """Each norm divides by the root mean square of the last dimension and multiplies by 1 + weight."""
    named = [(name, module) for name, module in test.model.named_modules() if isinstance(module, RMSNorm)]
    if not named:
        raise NotApplicable("the model has no RMSNorm")
    eps = test.config.rms_norm_eps

    def complaints() -> Iterator[str]:
        for name, norm in named:
            weight = norm.weight.detach()
            x = (
                3
                * torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
                    weight.device
                )
                + 1
            )
            with torch.no_grad():
                measured = norm(x)
            if differ(measured, _normed(x, 1 + weight, eps), EXACT):
                plain = not differ(measured, _normed(x, weight, eps), EXACT)
                yield f"{name} " + ("multiplies by weight instead of 1 + weight" if plain else "is not RMSNorm")

    return _verdict(complaints(), f"{len(named)} norms are RMSNorm with gain 1 + weight")


def qk_norm(test: ModelUnderTest) -> Answer:
    """Queries and keys are normed head by head before they are turned; values are not."""
    tokens, attentions = test.tokens(2, 8), test.attentions()
    mixed = record_kernels(attentions, lambda: test.hidden(tokens))
    linears = [part(attentions[layer], name) for layer in mixed for name in ("query", "key", "value")]
    raw = iter(record_each(linears, lambda: test.hidden(tokens)))
    eps, size = test.config.rms_norm_eps, test.config.head_dim

    def complaints() -> Iterator[str]:
        for layer, mixing in mixed.items():
            for index, name in enumerate(("query", "key", "value")):
                # Position 0 is turned by no angle.
                measured = (mixing.query, mixing.key, mixing.value)[index][:, :, 0]
                plain = next(raw).result[:, 0]
                plain = plain.view(len(plain), -1, size)
                gain = None if name == "value" else part(attentions[layer], f"{name}_norm.weight").detach()
                expected = plain if gain is None else _normed(plain, 1 + gain, eps)
                if differ(measured, expected, EXACT):
                    yield f"layer {layer}: the {name} {_misnormed(measured, plain, gain, eps)}"

    return _verdict(complaints(), "queries and keys are normed head by head, values are not")


def _misnormed(measured: Tensor, plain: Tensor, gain: Tensor | None, eps: float) -> str:
    if gain is None:
        return "is not what its projection gives"
    if not differ(measured, plain, EXACT):
        return "is not normed"
    if not differ(measured, _normed(plain, gain, eps), EXACT):
        return "is normed with gain weight instead of 1 + weight"
    # One factor for every head and row: a norm of something larger than a head.
    ratio = (measured / plain).flatten(0, 1)
    if not differ(ratio, ratio[:1].expand_as(ratio), EXACT):
        return "is normed over the whole batch instead of head by head"
    return "is not normed head by head with gain 1 + weight"


def attention(test: ModelUnderTest) -> Answer:
    """Each layer's kernel attends as the plain one does, with scores scaled by query_pre_attn_scalar ** -0.5."""
    tokens = test.tokens(1, test.window + 3)
    mixed = record_kernels(test.attentions(), lambda: test.hidden(tokens))
    expected = test.config.query_pre_attn_scalar**-0.5

    def complaints() -> Iterator[str]:
        for layer, mixing in mixed.items():
            if not math.isclose(mixing.scale, expected, rel_tol=1e-4):
                yield (
                    f"layer {layer}: scores are scaled by {mixing.scale:.4g} instead of "
                    f"query_pre_attn_scalar ** -0.5 = {expected:.4g}"
                )
            elif differ(mixing.result, _plainly(mixing), EXACT):
                yield f"layer {layer}: the attention kernel disagrees with softmax over grouped heads"

    return _verdict(complaints(), "attention is softmax over grouped heads, rightly scaled")


def _plainly(mixing: Mixing) -> Tensor:
    return reference(mixing.query, mixing.key, mixing.value, mixing.mask, mixing.scale, 0.0)


def window(test: ModelUnderTest) -> Answer:
    """A query of a local layer is influenced by itself and the sliding_window - 1 keys before it, of a global by all.

    Measured by gradients through each layer's attention alone: exactly zero is unseen.
    """
    size = test.window
    length = 2 * size + 3
    attentions = test.attentions()
    calls = record(attentions, lambda: test.hidden(test.tokens(1, length)))
    seen = size if size == test.config.sliding_window else f"at least {length}"
    queries = list(dict.fromkeys((length - 2, length - 1, size, size - 1, 0)))

    def complaints() -> Iterator[str]:
        for layer, call in calls.items():
            kind = test.config.layer_kinds[layer]
            width = test.config.window(kind)
            for query, seen in _seen(attentions[layer], call, queries):
                first = 0 if width is None else max(0, query - width + 1)
                if seen == set(range(first, query + 1)):
                    continue
                expected = "everything before" if width is None else f"sliding_window = {width}"
                yield f"layer {layer} ({kind}): {_describe(query, seen)}; the config says {expected}"
                break

    return _verdict(
        complaints(), f"local layers see a window of {seen}, the query's own position included; global layers see all"
    )


def _seen(module: nn.Module, call: Call, queries: list[int]) -> Iterator[tuple[int, set[int]]]:
    """Yield which positions influence each query, with the attention evened so that nothing seen is rounded away."""
    x, *rest = call.arguments
    with evenly(module), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        result = module(x, *rest, **call.options)
        weights = torch.randn(result.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
            result.device
        )
        for query in queries:
            [gradient] = torch.autograd.grad((result[0, query] * weights).sum(), x, retain_graph=True)
            yield query, set(gradient[0].abs().amax(dim=-1).nonzero().flatten().tolist())


def _describe(query: int, seen: set[int]) -> str:
    if not seen:
        return f"position {query} sees nothing"
    if max(seen) > query:
        return f"position {query} sees position {max(seen)}, which comes later"
    if len(seen) == 1:
        return f"position {query} sees position {min(seen)} alone"
    if len(seen) == query + 1:
        return f"position {query} sees all {len(seen)} keys up to itself"
    return f"position {query} sees {len(seen)} keys, from position {min(seen)} to {max(seen)}"


def mlp(test: ModelUnderTest) -> Answer:
    """Each MLP is down(gelu(gate) * up) with the tanh form of gelu."""

    def complaints() -> Iterator[str]:
        for layer, block in enumerate(test.blocks()):
            module = part(block, "mlp")
            linears = [part(module, name) for name in ("gate", "up", "down")]
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, 64, test.config.hidden_size, generator=generator, dtype=torch.float32).to(
                linears[0].weight.device
            )
            with torch.no_grad():
                # The two forms of gelu are furthest apart around 2.
                x = x * 2 / linears[0](x).std().clamp(min=1e-20)
            gate, up, down = record_each(linears, partial(module, x))
            expected = functional.gelu(gate.result, approximate="tanh") * up.result
            if differ(_first(down), expected, GELU):
                exact = not differ(_first(down), functional.gelu(gate.result) * up.result, GELU)
                what = "gelu is the exact (erf) form instead of tanh" if exact else "it is not gelu(gate) * up"
                yield f"layer {layer}'s MLP: {what}"

    return _verdict(complaints(), "MLPs are down(gelu(gate) * up) with gelu's tanh form")


def wiring(test: ModelUnderTest) -> Answer:
    """Each block adds attention and MLP, each between its two norms, and the last norm follows the last block."""
    tokens = test.tokens(2, 8)
    blocks, hidden = test.blocks(), test.hidden(tokens)
    calls = record(blocks, lambda: test.hidden(tokens))

    def complaints() -> Iterator[str]:
        for layer, block in enumerate(blocks):
            if layer not in calls:
                yield f"layer {layer} is left out"
                continue
            call = calls[layer]
            x, *rest = call.arguments
            if layer - 1 in calls and differ(x, calls[layer - 1].result, EXACT):
                yield f"layer {layer} does not begin where layer {layer - 1} ends"
            with torch.no_grad():
                mixed = part(block, "attention")(part(block, "pre_attention_norm")(x), *rest, **call.options)
                middle = x + part(block, "post_attention_norm")(mixed)
                inner = part(block, "mlp")(part(block, "pre_mlp_norm")(middle))
                end = middle + part(block, "post_mlp_norm")(inner)
            if differ(call.result, end, EXACT):
                yield f"layer {layer} is not x + norm(attention(norm(x))), then the same with the MLP"
        with torch.no_grad():
            if differ(hidden, part(test.model, "norm")(calls[max(calls)].result), EXACT):
                yield "the last norm does not follow the last layer"

    return _verdict(complaints(), f"{len(blocks)} layers are wired with a norm before and after attention and MLP")


def _first(call: Call) -> Tensor:
    given: Tensor = call.arguments[0]
    return given
