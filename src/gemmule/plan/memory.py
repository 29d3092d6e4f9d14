"""What fills a device's memory in a run, by class, and when it is fullest.

A run has three moments: a micro-batch (`trace.py`, the real model), the update (weights, gradients, what the optimizer
remembers and works with) and, on a CPU, the copies for a checkpoint.
"""

import resource
import sys
from collections import Counter
from typing import Literal, NamedTuple

import torch

from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.plan.trace import Operation, Recorder, Trace, peak
from gemmule.train.muon import Muon, stacks
from gemmule.train.optim import OptimizerSettings

FP32, BF16 = 4, 2
# What a process of a CUDA device holds beside its tensors: the context, the libraries' workspaces.
CUDA_CONTEXT = 0.6e9
# What an allocator holds in pieces that fit nothing, as a share of what comes and goes: torch's caching one (assumed),
# and glibc's heap, which keeps all that is freed (cli/main.py), as benchmarks/plan.py found.
FRAGMENTS, HOLES = 0.10, 0.43
# What leaves none: it stays where it is, or is one large piece at a time.
_SOLID = ("weights", "gradients", "optimizer", "copies for the checkpoint")
# Bytes by which a run's process grows beside its tensors, as benchmarks/plan.py found on one machine: what is loaded on
# the way (curves, kernels and their buffers, this plan), and the compiler.
GROWTH, COMPILER = 160e6, 20e6


class Count(NamedTuple):
    """The parameters of a model by what they are."""

    embedding: int
    head: int  # none where it is tied
    attention: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def body(self) -> int:
        """All but embedding and head."""
        return self.attention + self.mlp + self.norms


def count_parameters(config: Gemma3Config) -> Count:
    """Count a model's parameters from its config."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    vocabulary = config.vocab_size * D
    norms = L * (4 * D + 2 * H) + D
    attention = L * (2 * D * N * H + 2 * D * K * H)
    return Count(vocabulary, 0 if config.tie_word_embeddings else vocabulary, attention, L * 3 * D * F, norms)


class Sharing(NamedTuple):
    """How the weights of a run lie on its devices."""

    strategy: Literal["ddp", "fsdp", "hsdp"]
    gpus: int
    per_machine: int

    @property
    def sharded(self) -> bool:
        """Whether a device has a share of the weights only."""
        return self.strategy != "ddp"

    @property
    def shards(self) -> int:
        """The number of devices that share one copy of the weights."""
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": min(self.gpus, self.per_machine)}[self.strategy]


class Update(NamedTuple):
    """What one update of all weights takes."""

    state: int  # bytes remembered from step to step, on all devices that share a copy together
    working: int  # bytes for its duration, on one device
    operations: list[tuple[Operation, float]]  # each so many times


def update_of(config: Gemma3Config, settings: OptimizerSettings, precision: Literal["bf16", "fp32"]) -> Update:
    """Trace the optimizer: AdamW remembers two moments of a parameter, Muon one of a matrix."""
    count = count_parameters(config)
    # The norm of all gradients is taken, and they are shortened to it.
    operations: list[tuple[Operation, float]] = [(Operation("clip", (), 0, 12 * count.total, (), ()), 1)]
    matrices = count.attention + count.mlp if settings.name == "muon" else 0
    rest = count.total - matrices
    operations.append((Operation("adamw", (), 0, 28 * rest, (), ()), 1))
    working = 0
    if matrices:
        traced = _trace_muon(config, torch.float32 if precision == "fp32" else torch.bfloat16)
        working = max(part[0] for part in traced)
        operations += [operation for part in traced for operation in part[1]]
    return Update(FP32 * (matrices + 2 * rest), working, operations)


def _trace_muon(config: Gemma3Config, dtype: torch.dtype) -> list[tuple[int, list[tuple[Operation, float]]]]:
    """Run Muon on one stack of each shape; return its working memory and its operations, with how often they come."""
    with torch.device("meta"):
        block = Gemma3(config.replace(num_hidden_layers=1)).blocks[0]
    shapes = Counter(tuple(parameter.shape) for parameter in block.parameters() if parameter.ndim == 2)
    found: list[tuple[int, list[tuple[Operation, float]]]] = []
    for shape, number in shapes.items():
        number *= config.num_hidden_layers
        matrices = [torch.empty(shape, device="meta", requires_grad=True) for _ in range(number)]
        stack = next(iter(stacks(matrices)))
        for matrix in stack:
            matrix.grad = torch.empty_like(matrix)
        muon = Muon(stack, 1.0, 0.0, 0.9, dtype)
        muon.step()  # remembers its first momentum
        recorder = Recorder()
        recorder.mark("embedding", False)
        with recorder:
            for matrix in stack:
                assert matrix.grad is not None
                for known in (matrix, matrix.grad, muon.state[matrix]["momentum_buffer"]):
                    recorder.number(known, "given")
            muon.step()
        working = _highest(recorder)
        times = number / len(stack)
        found.append((working, [(operation, times) for operation in recorder.operations]))
    return found


def _highest(recorder: Recorder) -> int:
    """Return the most bytes that what was made while recording held at once."""
    changes: list[tuple[int, int, int]] = []
    for buffer in recorder.buffers:
        if buffer.label != "given":
            changes.append((buffer.born, 0, buffer.size))
            if buffer.freed is not None:
                changes.append((buffer.freed, 1, -buffer.size))
    return int(sum(peak((str(0), size) for _, _, size in sorted(changes)).values()))


class Memory(NamedTuple):
    """The fullest moment of one device."""

    moment: str
    classes: dict[str, float]  # bytes

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.classes.values())


def fullest_moment(
    config: Gemma3Config,
    traced: Trace,
    update: Update,
    sharing: Sharing,
    precision: Literal["bf16", "fp32"],
    device: Literal["cpu", "gpu", "apple"],
    compiled: bool,
    accumulating: bool,
    process: float,
) -> Memory:
    """Put the classes of memory together, for each moment, and return the fullest."""
    count = count_parameters(config)
    shares = sharing.shards
    weights, state = FP32 * count.total / shares, update.state / shares
    always = {"weights": weights, "optimizer": state}
    micro = dict(traced.peak(config.layer_kinds))
    micro["gradients"] = micro.get("gradients", 0) / shares
    if accumulating or "gradients" not in micro:
        micro["gradients"] = weights if accumulating else 0.0
    if sharing.sharded and sharing.gpus > 1:
        micro["gathered weights"] = _gathered(config, count, precision)
    updating = {"gradients": weights, "working memory": update.working / shares}
    moments = {"the way back through the model": always | micro, "the update": always | updating}
    if device == "cpu":
        # A checkpoint is copied before it is written, and once more on its way to the file.
        moments["a checkpoint"] = always | {"copies for the checkpoint": 2 * (weights + state)}
    full = (Memory(name, _in_process(tensors, device, compiled, process)) for name, tensors in moments.items())
    return max(full, key=lambda memory: memory.total)


def _gathered(config: Gemma3Config, count: Count, precision: Literal["bf16", "fp32"]) -> float:
    """Count what fsdp gathers at once: the embedding for the whole step, one block in use and the next on its way.

    On the way back a block's gradients are whole for as long: in its own precision, and in fp32 to be summed.
    """
    width = BF16 if precision == "bf16" else FP32
    block = count.body / config.num_hidden_layers
    return width * (count.embedding + count.head) + block * (2 * width + width + FP32)


def _in_process(
    tensors: dict[str, float], device: Literal["cpu", "gpu", "apple"], compiled: bool, process: float
) -> dict[str, float]:
    """Add what a process holds beside its tensors."""
    classes = {label: size for label, size in tensors.items() if size >= 1}
    passing = sum(size for label, size in classes.items() if label not in _SOLID)
    beside = {"allocator's fragments": (HOLES if device == "cpu" else FRAGMENTS) * passing}
    if device == "gpu":
        return classes | beside | {"CUDA context": CUDA_CONTEXT}
    return classes | beside | {"Python and libraries": process + GROWTH + COMPILER * compiled}


def process_bytes() -> float:
    """Return the largest memory that this process has had, with torch loaded and no model: what a run starts with."""
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts, in bytes
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
