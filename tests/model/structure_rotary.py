"""The check of rotary embeddings: by which angle is each pair of query and key turned at each position?"""

import math
from collections.abc import Iterator

import torch
from structure_instruments import Answer, ModelUnderTest, record_kernels
from torch import Tensor

TOLERANCE = 0.02  # of a full vector: a hundredth of a turn is twice that
FURTHEST = 4097  # beyond, fp32 angles lose the digits that the check looks at


def rotary(test: ModelUnderTest) -> Answer:
    """Position t turns pair (i, i + H/2) of queries and keys by t / factor * base ** (-2 i / H).

    Base and factor are of the layer's kind. Measured on one token repeated, whose queries and keys differ by their
    positions alone.
    """
    config = test.config
    # Doubling distances, odd ones: angles are unwrapped on the way, and a position kept in bf16 shows.
    doubling = [2**power + 1 for power in range(1, 13)]
    positions = [0, 1, 2, *[t for t in doubling if t < min(FURTHEST + 1, config.max_position_embeddings)]]
    tokens = test.tokens(1, 1).expand(1, len(positions))
    where = torch.tensor([positions], dtype=torch.long, device=tokens.device)
    mixed = record_kernels(test.attentions(), lambda: test.hidden(tokens, positions=where))
    expected = {
        "local": ("rope_local_base_freq", config.rope_local_base_freq, 1.0),
        "global": ("rope_theta", config.rope_theta, config.rope_scaling_factor),
    }

    def complaints() -> Iterator[str]:
        for layer, mixing in mixed.items():
            kind = config.layer_kinds[layer]
            setting, base, factor = expected[kind]
            for name, vectors in (("queries", mixing.query), ("keys", mixing.key)):
                if complaint := _misturned(vectors[0].double().cpu(), positions, base, factor):
                    yield (
                        f"layer {layer} ({kind}): {name} {complaint}; "
                        f"the config says {setting} = {base:g}, scaling factor {factor:g}"
                    )
                    return

    complaint = next(complaints(), None)
    if complaint:
        return "failed", complaint
    kinds = dict.fromkeys(config.layer_kinds)
    said = ", ".join(f"{kind} layers base {expected[kind][1]:g} and factor {expected[kind][2]:g}" for kind in kinds)
    return "passed", f"measured as the config says: {said}"


def _misturned(vectors: Tensor, positions: list[int], base: float, factor: float) -> str | None:
    """Say how vectors (heads,T,H) of one token are turned otherwise than they should be."""
    half = vectors.shape[-1] // 2
    turns, there = _turns(torch.complex(vectors[..., :half], vectors[..., half:]))
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half) / factor
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
    wrong = ((turns - torch.polar(torch.ones_like(angles), angles)).abs() > TOLERANCE) & there
    if not wrong.any():
        return None
    if _is_rotation(turns, there):
        return _explain(turns, there, positions, wrong, (base, factor))
    neighbours, visible = _turns(torch.complex(vectors[..., ::2], vectors[..., 1::2]))
    if _is_rotation(neighbours, visible):
        return "are turned in neighbouring pairs (2i, 2i + 1) instead of (i, i + H/2)"
    return "of one and the same token differ by more than a rotation of pairs (i, i + H/2)"


def _turns(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs (heads,T,H/2), of the head that has each longest, relative to position 0, and which exist.

    A norm's gain can be zero, and what has no length has no angle.
    """
    best = pairs[:, 0].abs().argmax(dim=0)
    pairs = pairs[best, :, torch.arange(pairs.shape[-1])].T
    lengths = pairs[0].abs()
    there = lengths > 1e-3 * lengths.max()
    return pairs / torch.where(there, pairs[0], 1), there


def _is_rotation(turns: Tensor, there: Tensor) -> bool:
    return bool(((turns.abs() - 1).abs() < TOLERANCE)[:, there].all())


def _explain(
    turns: Tensor, there: Tensor, positions: list[int], wrong: Tensor, expected: tuple[float, float]
) -> str | None:
    """Find base and factor from the angles, which grow by less than half a turn more than was known before."""
    frequencies = turns[1].angle() / positions[1]
    for t, turn in zip(positions[2:], turns[2:], strict=True):
        predicted = frequencies * t
        frequencies = (predicted + (turn * torch.polar(torch.ones_like(predicted), -predicted)).angle()) / t
        if t > 100:  # enough digits, and before a position can have been rounded to 8 bits
            break
    if (frequencies[there] <= 1e-9).any():
        still = (turns[:, there] - 1).abs().max() < TOLERANCE
        return "are not turned at all" if still else "are turned backwards"
    exponents = torch.arange(len(there), dtype=torch.float64)[there] / len(there)
    columns = torch.stack((-torch.ones_like(exponents), -exponents), dim=1)
    factor, base = torch.linalg.lstsq(columns, frequencies[there].log()[:, None]).solution.flatten().exp().tolist()
    if all(math.isclose(a, b, rel_tol=0.05) for a, b in zip((base, factor), expected, strict=True)):
        first = positions[int(wrong.any(dim=1).nonzero()[0])]
        return f"have the right base and factor, but not the angle of position {first}"
    return f"are turned as by base {base:.4g} and factor {factor:.3g}"
