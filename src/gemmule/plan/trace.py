"""Trace the operations and the memory of one micro-batch, forward and backward, on fake tensors.

The model that trains is called on torch's fake tensors, which have shapes and no data, with one block of each kind and
a few chunks of the loss; a step of any depth is composed of these parts.

`fuse` then models torch.compile by one rule: Inductor fuses element-wise operations and reductions, and its partitioner
recomputes them in the backward pass instead of saving them. Of a block, only inputs and outputs of extern kernels
(matmuls, attention) and values that leave the block are materialized. The same holds for the chunks of the loss, except
for what they save for the backward pass, which is not compiled.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gemmule.model.config import Gemma3Config, Kind
from gemmule.model.gemma3 import Gemma3
from gemmule.model.lora import add_lora
from gemmule.runtime import autocast
from gemmule.settings import Settings
from gemmule.train import loss as loss_of_training
from gemmule.train.lora import LoRASettings, expected_lora
from gemmule.train.parallel import checkpoint_activations

Part = Literal["embedding", "local", "global", "loss"]
CHUNKS = 3  # of the loss that are traced; further ones repeat the second
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm"})


class TraceSettings(Settings):
    """A micro-batch to trace: model, shape, and how it is computed."""

    model: Gemma3Config
    rows: int
    context: int
    mask_documents: bool
    precision: Literal["bf16", "fp32"]
    kernel: str
    activation_checkpointing: Literal["none", "selective", "full"]
    compiled: bool
    # Under fsdp and hsdp, blocks are gathered in the precision of the matmuls, which the residual stream then has.
    sharded: bool
    gradient_accumulation: bool  # gradients of an earlier micro-batch exist
    lora: LoRASettings = LoRASettings()
    half_base: bool = False  # the frozen weights are bf16


class Operand(NamedTuple):
    """Shape, dtype and layout of a kernel's operand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool  # whether the last two dimensions are swapped in memory


class Operation(NamedTuple):
    """One kernel call."""

    name: str  # aten's, such as mm
    call: tuple[Operand, ...]
    flops: int
    bytes: int  # read and written
    reads: tuple[int, ...]  # indices of buffers
    writes: tuple[int, ...]


@dataclass
class Buffer:
    """One storage, from its allocation to its release (indices of operations)."""

    size: int
    label: str
    allocated: int
    freed: int | None = None
    residual: bool = False  # the residual stream or its gradient, passed from block to block


class Segment(NamedTuple):
    """The operations of one part of the step in the forward or backward pass."""

    part: Part
    forward: bool
    start: int
    stop: int


class Trace(NamedTuple):
    """Operations in order, their segments, and the buffers they use."""

    operations: list[Operation]
    segments: list[Segment]
    buffers: list[Buffer]
    loss_repeats: float  # chunks of the loss per traced chunk

    def step(self, kinds: Sequence[Kind]) -> Iterator[tuple[Segment, list[tuple[str, float]]]]:
        """Yield the segments of a step of a model with layers of these kinds, with allocations and releases.

        Those are (label, bytes), negative for a release. A buffer of a repeated block that a less frequent part
        releases is released there once per repetition.
        """
        times: dict[Part, int] = {
            "embedding": 1,
            "loss": 1,
            "local": kinds.count("local"),
            "global": kinds.count("global"),
        }
        segments = {
            (segment.part, segment.forward): (segment, self._changes(segment, times)) for segment in self.segments
        }
        order: list[tuple[Part, bool]] = [("embedding", True), *((kind, True) for kind in kinds)]
        order += [("loss", True), ("loss", False), *((kind, False) for kind in reversed(kinds)), ("embedding", False)]
        yield from (segments[key] for key in order if key in segments)

    def peak(self, kinds: Sequence[Kind]) -> dict[str, float]:
        """Return the bytes per label at peak memory of a micro-batch."""
        return peak(change for _, changes in self.step(kinds) for change in changes)

    def segment_of(self, index: int) -> Segment | None:
        """Return the segment of an operation."""
        return next((segment for segment in self.segments if segment.start <= index < segment.stop), None)

    def _changes(self, segment: Segment, times: dict[Part, int]) -> list[tuple[str, float]]:
        found: list[tuple[int, int, str, float]] = []
        for buffer in self.buffers:
            if buffer.label == "inputs":
                continue
            if segment.start <= buffer.allocated < segment.stop:
                found.append((buffer.allocated, 0, buffer.label, buffer.size))
            if buffer.freed is not None and segment.start <= buffer.freed < segment.stop:
                home = self.segment_of(buffer.allocated)
                share = 1.0 if buffer.residual or home is None else times[home.part] / times[segment.part]
                found.append((buffer.freed, 1, buffer.label, -buffer.size * share))
        return [(label, size) for _, _, label, size in sorted(found, key=lambda change: change[:2])]


def peak(changes: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the bytes per label at peak memory, for a sequence of allocations and releases."""
    held: dict[str, float] = {}
    highest: dict[str, float] = {}
    total = most = 0.0
    for label, size in changes:
        held[label] = held.get(label, 0) + size
        total += size
        if total > most:
            most, highest = total, dict(held)
    return {label: size for label, size in highest.items() if size > 0}


class TraceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record every operation inside the block, and the lifetime of every buffer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.buffers: list[Buffer] = []
        self.marks: list[tuple[int, Part, bool]] = []
        self._numbers: dict[int, int] = {}

    def mark(self, part: Part, forward: bool) -> None:
        """Begin a segment."""
        self.marks.append((len(self.operations), part, forward))

    def number(self, tensor: Tensor, label: str | None = None) -> int:
        """Return the index of a tensor's buffer, registered at first use."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self.buffers)
            forward = bool(self.marks) and self.marks[-1][2]
            chosen = label or ("activations" if forward else "working memory")
            if label is None and self.marks and self.marks[-1][1] == "loss":
                chosen = "logits and loss"
            self.buffers.append(Buffer(storage.nbytes(), chosen, len(self.operations)))
            finalize(storage, self._freed, key)
        return self._numbers[key]

    def mark_residual(self, tensor: Tensor) -> None:
        """Mark the residual stream or its gradient."""
        self.buffers[self.number(tensor)].residual = True

    def _freed(self, key: int) -> None:
        self.buffers[self._numbers.pop(key)].freed = max(0, len(self.operations) - 1)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values())))
        made = list(_tensors((result,)))
        reads = tuple(self.number(tensor) for tensor in given)
        known = len(self.buffers)
        writes = tuple(self.number(tensor) for tensor in made)
        changed = function._schema.is_mutable
        if not changed and all(number < known for number in writes):
            return result  # a view
        traffic = sum(map(_covered_bytes, given)) + sum(map(_covered_bytes, made))
        name = function._schema.name.removeprefix("aten::")
        if name == "_to_copy" and given[0].ndim == 2 and self.buffers[reads[0]].label == "inputs":
            self.buffers[writes[0]].label = "weights in bf16"  # autocast keeps them for the backward pass
        call = tuple(Operand(tuple(tensor.shape), tensor.dtype, _transposed(tensor)) for tensor in given)
        self.operations.append(Operation(name, call, _flops(function, args, kwargs, result), traffic, reads, writes))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _transposed(tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.stride(-2) < tensor.stride(-1)


def _covered_bytes(tensor: Tensor) -> int:
    """Return the bytes of memory that a view covers, which is less than its elements for an expanded tensor."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Count the FLOPs of a matmul or of attention as torch's FlopCounterMode does."""
    name = function._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return attention_flops(args[0], args[1], matmuls=2)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return attention_flops(args[1], args[2], matmuls=5)
    count = flop_registry.get(function.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def attention_flops(query: Tensor, key: Tensor, matmuls: int) -> int:
    """Count the FLOPs of attention, (B,N,T,H) with (B,K,S,H), over all T x S scores, masked or not."""
    return matmuls * 2 * prod(query.shape) * key.shape[2]


def trace(settings: TraceSettings) -> Trace:
    """Trace one micro-batch on fake tensors."""
    kinds = tuple(dict.fromkeys(settings.model.layer_kinds))
    pattern = 1 if kinds == ("global",) else 2
    config = settings.model.replace(num_hidden_layers=len(kinds), sliding_window_pattern=pattern)
    recorder = TraceMode()
    with FakeTensorMode():
        model = _model(config, settings)
        checkpoint_activations(model, settings.activation_checkpointing)
        tokens, targets = (torch.zeros((settings.rows, settings.context), dtype=torch.int64) for _ in "ab")
        documents = (
            torch.zeros((settings.rows, settings.context), dtype=torch.int32) if settings.mask_documents else None
        )
        if settings.gradient_accumulation:
            for parameter in filter(_learns, model.parameters()):
                parameter.grad = torch.zeros_like(parameter)
        with recorder:
            for tensor in _tensors([*model.parameters(), *model.buffers(), tokens, targets, documents]):
                recorder.number(tensor, "inputs")
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            for tensor in grads:
                recorder.number(tensor, "inputs")
            _run(model, recorder, tokens, documents, targets, settings)
            for parameter in filter(_learns, model.parameters()):
                assert parameter.grad is not None
                recorder.buffers[recorder.number(parameter.grad)].label = "gradients" if not grads else "inputs"
    chunk = loss_of_training.rows_at_once(config.vocab_size, tokens.device)
    share = max(1.0, settings.rows * settings.context / (CHUNKS * chunk))
    return _assemble(recorder, share)


def _model(config: Gemma3Config, settings: TraceSettings) -> Gemma3:
    """Build the model, in bf16 where sharding gathers blocks in bf16, or where frozen weights are."""
    before = torch.get_default_dtype()
    half = settings.half_base or (settings.sharded and settings.precision == "bf16")
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    try:
        model = Gemma3(config, settings.kernel)
    finally:
        torch.set_default_dtype(before)
    if (lora := expected_lora(settings.lora, config.vocab_size)) is not None:
        add_lora(model, lora)
    return model


def _learns(parameter: Tensor) -> bool:
    return parameter.requires_grad


def _run(
    model: Gemma3,
    recorder: TraceMode,
    tokens: Tensor,
    documents: Tensor | None,
    targets: Tensor,
    settings: TraceSettings,
) -> None:
    """Run the forward and backward pass as a training step does, marking the segments."""

    def output_head(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        recorder.mark("loss", True)
        few = CHUNKS * loss_of_training.rows_at_once(vocabulary.shape[0], hidden.device)
        flat, goals = hidden.flatten(0, 1)[None], targets.flatten()[None]
        return loss_of_training.summed_loss(goals[:, :few])(flat[:, :few], vocabulary)

    def begin_backward(part: Part, gradient: Tensor) -> None:
        recorder.mark(part, False)
        recorder.mark_residual(gradient)

    def pre_forward(kind: Kind, first: bool, _block: Any, inputs: tuple[Any, ...]) -> None:
        recorder.mark(kind, True)
        recorder.mark_residual(inputs[0])
        if first and inputs[0].requires_grad:
            inputs[0].register_hook(partial(begin_backward, "embedding"))

    def post_forward(kind: Kind, _block: Any, _inputs: Any, output: Tensor) -> None:
        recorder.mark_residual(output)
        output.register_hook(partial(begin_backward, kind))  # type: ignore[no-untyped-call]

    recorder.mark("embedding", True)
    for number, (block, kind) in enumerate(zip(model.blocks, model.config.layer_kinds, strict=True)):
        block.register_forward_pre_hook(partial(pre_forward, kind, number == 0))
        block.register_forward_hook(partial(post_forward, kind))
    with autocast(torch.device("cpu"), settings.precision):
        loss = model(tokens, documents=documents, output_head=output_head)
    recorder.mark("loss", False)
    torch.autograd.backward(loss)


def _assemble(recorder: TraceMode, loss_repeats: float) -> Trace:
    """Cut the operations into segments at the marks; of marks at one index the last counts."""
    marks = recorder.marks
    ends = [start for start, *_ in marks[1:]] + [len(recorder.operations)]
    segments = [
        Segment(part, forward, start, stop)
        for (start, part, forward), stop in zip(marks, ends, strict=True)
        if start < stop
    ]
    buffers = [replace(buffer) for buffer in recorder.buffers]  # those of the model are freed with it
    return Trace(recorder.operations, segments, buffers, loss_repeats)


def is_attention(name: str) -> bool:
    """Whether an operation is a fused attention kernel."""
    return name.startswith("_scaled_dot_product")


def is_extern_kernel(name: str) -> bool:
    """Whether an operation is a matmul or attention, which Inductor does not fuse."""
    return name in MATMULS or is_attention(name)


def fuse(trace: Trace) -> Trace:
    """Return the trace with the blocks and the loss compiled; embedding and final norm stay eager."""
    buffers = [replace(buffer) for buffer in trace.buffers]
    materialized = _materialized(trace)
    # Buffers from which a fused value is recomputed.
    sources: dict[int, frozenset[int]] = {}
    operations: list[Operation] = []
    for index, operation in enumerate(trace.operations):
        segment = trace.segment_of(index)
        unfused = sources.keys().isdisjoint(operation.reads) and materialized.issuperset(operation.writes)
        if segment is None or not _compiled(segment) or is_extern_kernel(operation.name) or unfused:
            operations.append(operation)
            continue
        origins = frozenset().union(*(sources.get(number, {number}) for number in operation.reads))
        traffic = 0
        for number in dict.fromkeys(operation.writes):
            if number in materialized:
                traffic += buffers[number].size + sum(buffers[origin].size for origin in origins - {number})
            else:
                sources[number] = origins
        operations.append(operation._replace(bytes=traffic))
    for number, origins in sources.items():
        _extend_lifetime(buffers, number, origins)
        buffers[number].size = 0
    return trace._replace(operations=operations, buffers=buffers)


def _compiled(segment: Segment) -> bool:
    """Whether a segment is compiled."""
    return segment.part in ("local", "global") or (segment.part == "loss" and segment.forward)


def _extend_lifetime(buffers: list[Buffer], number: int, origins: frozenset[int]) -> None:
    """Keep the origins of a fused value until the value would have been freed."""
    freed = buffers[number].freed
    for origin in origins:
        last = buffers[origin].freed
        if last is not None:
            buffers[origin].freed = None if freed is None else max(last, freed)


def _materialized(trace: Trace) -> set[int]:
    """Return the materialized buffers: of extern kernels, of eager segments, or leaving their segment."""
    materialized = {number for number, buffer in enumerate(trace.buffers) if buffer.label in ("inputs", "gradients")}
    written_in: dict[int, Segment] = {}
    for index, operation in enumerate(trace.operations):
        segment = trace.segment_of(index)
        assert segment is not None
        if is_extern_kernel(operation.name) or not _compiled(segment):
            materialized.update(operation.reads, operation.writes)
        for number in operation.writes:
            written_in.setdefault(number, segment)
        materialized.update(number for number in operation.reads if _crosses(written_in.get(number), segment))
    return materialized


def _crosses(made: Segment | None, used: Segment) -> bool:
    """Whether a value leaves its compiled graph, other than from a block's forward to its backward pass."""
    if made is None or made is used:
        return False
    return made.part == "loss" or not (made.part == used.part and made.forward and not used.forward)
