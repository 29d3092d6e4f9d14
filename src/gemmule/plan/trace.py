"""One micro-batch of a recipe, forward and backward, without numbers: every operation and every piece of memory.

The model that trains is called on torch's fake tensors, which have shapes and no data, with one block of each kind and
a few chunks of the loss; a step of any depth is made of these parts. So what is counted is what the code does.
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
from gemmule.recipe import Settings
from gemmule.runtime import autocast
from gemmule.train import loss as loss_of_training
from gemmule.train.parallel import recompute

Part = Literal["embedding", "local", "global", "loss"]
CHUNKS = 3  # of the loss that are traced; any more repeat the second


class Shape(Settings):
    """What decides one micro-batch: the model, the rows, and how they are computed."""

    model: Gemma3Config
    rows: int
    context: int
    masked: bool
    precision: Literal["bf16", "fp32"]
    kernel: str
    recomputed: Literal["none", "selective", "full"]
    compiled: bool
    # Under fsdp and hsdp blocks are gathered in the precision of their products, and so is the residual stream.
    sharded: bool
    # Whether an earlier micro-batch has left its gradients.
    accumulating: bool


class Operand(NamedTuple):
    """A tensor that a kernel is given, as far as its time depends on it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool  # whether its last two dimensions lie the other way round in memory


class Operation(NamedTuple):
    """One call of a kernel."""

    name: str  # aten's, such as mm
    call: tuple[Operand, ...]
    flops: int
    bytes: int  # read and written
    reads: tuple[int, ...]  # buffers, by number
    writes: tuple[int, ...]


@dataclass
class Buffer:
    """One piece of memory, from the operation that fills it to the last that needs it."""

    size: int
    label: str
    born: int
    freed: int | None = None
    # Whether one block hands it on to the next: the residual stream and its gradient.
    handed_on: bool = False


class Segment(NamedTuple):
    """A part of the step in one direction, and where its operations lie."""

    part: Part
    forward: bool
    start: int
    stop: int


class Trace(NamedTuple):
    """What was seen: operations in order, the segments they fall into, the memory they use."""

    operations: list[Operation]
    segments: list[Segment]
    buffers: list[Buffer]
    # Of the loss's chunks there are so many times more than were traced.
    loss_share: float

    def step(self, kinds: Sequence[Kind]) -> Iterator[tuple[Segment, list[tuple[str, float]]]]:
        """Yield the segments of a model with layers of these kinds, in order, and what memory gains and loses in each.

        Memory comes in (label, bytes). What a block leaves to a part that comes less often is freed there as often.
        """
        times: dict[Part, int] = {
            "embedding": 1,
            "loss": 1,
            "local": kinds.count("local"),
            "global": kinds.count("global"),
        }
        place = {(segment.part, segment.forward): (segment, self._changes(segment, times)) for segment in self.segments}
        order: list[tuple[Part, bool]] = [("embedding", True), *((kind, True) for kind in kinds)]
        order += [("loss", True), ("loss", False), *((kind, False) for kind in reversed(kinds)), ("embedding", False)]
        yield from (place[key] for key in order if key in place)

    def peak(self, kinds: Sequence[Kind]) -> dict[str, float]:
        """Return the bytes of each label at the moment of a micro-batch when most memory is held."""
        return peak(change for _, changes in self.step(kinds) for change in changes)

    def segment_of(self, place: int) -> Segment | None:
        """Return the segment of an operation, or of what was there before them all."""
        return next((segment for segment in self.segments if segment.start <= place < segment.stop), None)

    def _changes(self, here: Segment, times: dict[Part, int]) -> list[tuple[str, float]]:
        found: list[tuple[int, int, str, float]] = []
        for buffer in self.buffers:
            if buffer.label == "given":
                continue
            if here.start <= buffer.born < here.stop:
                found.append((buffer.born, 0, buffer.label, buffer.size))
            if buffer.freed is not None and here.start <= buffer.freed < here.stop:
                home = self.segment_of(buffer.born)
                share = 1.0 if buffer.handed_on or home is None else times[home.part] / times[here.part]
                found.append((buffer.freed, 1, buffer.label, -buffer.size * share))
        return [(label, size) for _, _, label, size in sorted(found, key=lambda change: change[:2])]


def peak(changes: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the bytes of each label at the moment when most memory is held."""
    held: dict[str, float] = {}
    highest: dict[str, float] = {}
    total = most = 0.0
    for label, size in changes:
        held[label] = held.get(label, 0) + size
        total += size
        if total > most:
            most, highest = total, dict(held)
    return {label: size for label, size in highest.items() if size > 0}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that torch performs inside the block, and the life of every buffer it makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.buffers: list[Buffer] = []
        self.marks: list[tuple[int, Part, bool]] = []
        self._numbers: dict[int, int] = {}

    def mark(self, part: Part, forward: bool) -> None:
        """Let what follows belong to a part of the step."""
        self.marks.append((len(self.operations), part, forward))

    def number(self, tensor: Tensor, label: str | None = None) -> int:
        """Return the number of a tensor's buffer, a new one where it has not been seen."""
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

    def hand_on(self, tensor: Tensor) -> None:
        """Note that a tensor goes from one part to the next."""
        self.buffers[self.number(tensor)].handed_on = True

    def _freed(self, key: int) -> None:
        self.buffers[self._numbers.pop(key)].freed = max(0, len(self.operations) - 1)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Perform an operation and note it."""
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
        moved = sum(map(_extent, given)) + sum(map(_extent, made))
        name = function._schema.name.removeprefix("aten::")
        if name == "_to_copy" and given[0].ndim == 2 and self.buffers[reads[0]].label == "given":
            self.buffers[writes[0]].label = "weights in bf16"  # autocast keeps them for the way back
        call = tuple(Operand(tuple(tensor.shape), tensor.dtype, _transposed(tensor)) for tensor in given)
        self.operations.append(Operation(name, call, _flops(function, args, kwargs, result), moved, reads, writes))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _transposed(tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and tensor.stride(-2) < tensor.stride(-1)


def _extent(tensor: Tensor) -> int:
    """Count the bytes that a view really covers: an expanded tensor is read from a small place."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Count the multiplications and additions of matrix products, as torch's own counter does."""
    name = function._schema.name
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu":
        return attention_flops(args[0], args[1], products=2)
    if name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
        return attention_flops(args[1], args[2], products=5)
    count = flop_registry.get(function.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def attention_flops(query: Tensor, key: Tensor, products: int) -> int:
    """Count the products of attention, (B,N,T,H) with (B,K,S,H), over the whole table, seen or not."""
    return products * 2 * prod(query.shape) * key.shape[2]


def trace(shape: Shape) -> Trace:
    """Run one micro-batch on fake tensors."""
    kinds = tuple(dict.fromkeys(shape.model.layer_kinds))
    pattern = 1 if kinds == ("global",) else 2
    config = shape.model.replace(num_hidden_layers=len(kinds), sliding_window_pattern=pattern)
    recorder = Recorder()
    with FakeTensorMode():
        model = _model(config, shape)
        recompute(model, shape.recomputed)
        tokens, targets = (torch.zeros((shape.rows, shape.context), dtype=torch.int64) for _ in "ab")
        documents = torch.zeros((shape.rows, shape.context), dtype=torch.int32) if shape.masked else None
        if shape.accumulating:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with recorder:
            for tensor in _tensors([*model.parameters(), *model.buffers(), tokens, targets, documents]):
                recorder.number(tensor, "given")
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            for tensor in grads:
                recorder.number(tensor, "given")
            _run(model, recorder, tokens, documents, targets, shape)
            for parameter in model.parameters():
                assert parameter.grad is not None
                recorder.buffers[recorder.number(parameter.grad)].label = "gradients" if not grads else "given"
    chunk = loss_of_training.rows_at_once(config.vocab_size, tokens.device)
    share = max(1.0, shape.rows * shape.context / (CHUNKS * chunk))
    return _assemble(recorder, share)


def _model(config: Gemma3Config, shape: Shape) -> Gemma3:
    """Make the model in the precision in which its blocks compute."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if shape.sharded and shape.precision == "bf16" else torch.float32)
    try:
        return Gemma3(config, shape.kernel)
    finally:
        torch.set_default_dtype(before)


def _run(
    model: Gemma3, recorder: Recorder, tokens: Tensor, documents: Tensor | None, targets: Tensor, shape: Shape
) -> None:
    """Call model and loss as a training step does, marking where each part begins, there and back."""

    def readout(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        recorder.mark("loss", True)
        few = CHUNKS * loss_of_training.rows_at_once(vocabulary.shape[0], hidden.device)
        flat, goals = hidden.flatten(0, 1)[None], targets.flatten()[None]
        return loss_of_training.summed_loss(goals[:, :few])(flat[:, :few], vocabulary)

    def back(part: Part, gradient: Tensor) -> None:
        recorder.mark(part, False)
        recorder.hand_on(gradient)

    def enter(kind: Kind, first: bool, _block: Any, inputs: tuple[Any, ...]) -> None:
        recorder.mark(kind, True)
        recorder.hand_on(inputs[0])
        if first:
            inputs[0].register_hook(partial(back, "embedding"))

    def leave(kind: Kind, _block: Any, _inputs: Any, output: Tensor) -> None:
        recorder.hand_on(output)
        output.register_hook(partial(back, kind))  # type: ignore[no-untyped-call]

    recorder.mark("embedding", True)
    for number, (block, kind) in enumerate(zip(model.blocks, model.config.layer_kinds, strict=True)):
        block.register_forward_pre_hook(partial(enter, kind, number == 0))
        block.register_forward_hook(partial(leave, kind))
    with autocast(torch.device("cpu"), shape.precision):
        loss = model(tokens, documents=documents, readout=readout)
    recorder.mark("loss", False)
    torch.autograd.backward(loss)


def _assemble(recorder: Recorder, loss_share: float) -> Trace:
    """Cut the operations at the marks; of marks in one place the last counts."""
    marks = recorder.marks
    ends = [start for start, *_ in marks[1:]] + [len(recorder.operations)]
    segments = [
        Segment(part, forward, start, stop)
        for (start, part, forward), stop in zip(marks, ends, strict=True)
        if start < stop
    ]
    buffers = [replace(buffer) for buffer in recorder.buffers]  # the model's own are freed when it is let go
    return Trace(recorder.operations, segments, buffers, loss_share)
