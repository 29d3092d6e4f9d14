"""What torch.compile makes of a block's operations, by one rule: what no product reads or makes is never stored.

Inductor fuses element-wise operations and reductions into one loop over memory, and its partitioner computes them again
on the way back instead of keeping them. So of a block the inputs and outputs of products (matrices and attention) and
what leaves the block stay in memory; everything else lasts as long as a register. The loss's chunks are the same, but
for what they hand on to the way back, which is not compiled.
"""

from dataclasses import replace

from gemmule.plan.trace import Buffer, Operation, Segment, Trace

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm"})


def is_attention(name: str) -> bool:
    """Whether an operation is a fused kernel of attention."""
    return name.startswith("_scaled_dot_product")


def is_product(name: str) -> bool:
    """Whether an operation is computed by a kernel of its own, which fuses with nothing."""
    return name in PRODUCTS or is_attention(name)


def fuse(trace: Trace) -> Trace:
    """Return the trace with each block and the loss compiled; embedding and final norm stay as they are."""
    buffers = [replace(buffer) for buffer in trace.buffers]
    stored = _stored(trace)
    # What a fused value would have to be computed from again.
    sources: dict[int, frozenset[int]] = {}
    operations: list[Operation] = []
    for place, operation in enumerate(trace.operations):
        here = trace.segment_of(place)
        alone = sources.keys().isdisjoint(operation.reads) and stored.issuperset(operation.writes)
        if here is None or not _compiled(here) or is_product(operation.name) or alone:
            operations.append(operation)
            continue
        origins = frozenset().union(*(sources.get(number, {number}) for number in operation.reads))
        moved = 0
        for number in dict.fromkeys(operation.writes):
            if number in stored:
                moved += buffers[number].size + sum(buffers[origin].size for origin in origins - {number})
            else:
                sources[number] = origins
        operations.append(operation._replace(bytes=moved))
    for number, origins in sources.items():
        _outlive(buffers, number, origins)
        buffers[number].size = 0
    return trace._replace(operations=operations, buffers=buffers)


def _compiled(segment: Segment) -> bool:
    """Whether a part of the step is compiled in this direction."""
    return segment.part in ("local", "global") or (segment.part == "loss" and segment.forward)


def _outlive(buffers: list[Buffer], number: int, origins: frozenset[int]) -> None:
    """Keep the origins of a fused value as long as the value itself would have lasted."""
    freed = buffers[number].freed
    for origin in origins:
        last = buffers[origin].freed
        if last is not None:
            buffers[origin].freed = None if freed is None else max(last, freed)


def _stored(trace: Trace) -> set[int]:
    """Find the buffers that exist: of products, made where nothing is compiled, or leaving their segment."""
    stored = {number for number, buffer in enumerate(trace.buffers) if buffer.label in ("given", "gradients")}
    born_in: dict[int, Segment] = {}
    for place, operation in enumerate(trace.operations):
        here = trace.segment_of(place)
        assert here is not None
        if is_product(operation.name) or not _compiled(here):
            stored.update(operation.reads, operation.writes)
        for number in operation.writes:
            born_in.setdefault(number, here)
        stored.update(number for number in operation.reads if _crosses(born_in.get(number), here))
    return stored


def _crosses(made: Segment | None, used: Segment) -> bool:
    """Whether a value leaves the graph it was made in, other than from a block's way there to its way back."""
    if made is None or made is used:
        return False
    return made.part == "loss" or not (made.part == used.part and made.forward and not used.forward)
