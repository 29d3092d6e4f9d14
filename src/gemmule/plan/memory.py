"""Peak memory of a device in a run, by class.

The peak is that of three phases: a micro-batch (`trace.py`, the real model), the optimizer step (weights, gradients,
optimizer state and working memory) and, on a CPU, the copies for a checkpoint.
"""

from collections import Counter
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import meta_model
from gemmule.model.lora import LoRA, add_lora
from gemmule.plan.trace import Operation, Trace, TraceMode, peak
from gemmule.train.muon import Muon, stacks
from gemmule.train.optim import OptimizerSettings

FP32, BF16 = 4, 2
# Bytes of the CUDA or HIP context and the workspaces of libraries.
CUDA_CONTEXT = 0.6e9
# Fragmentation, as a share of short-lived memory: of torch's caching allocator (assumed), and of glibc's heap, which
# returns no memory (cli/main.py), as measured by benchmarks/plan.py.
GPU_FRAGMENTATION, HEAP_FRAGMENTATION = 0.10, 0.43
# Classes without fragmentation: long-lived, or one large allocation at a time.
_UNFRAGMENTED = ("weights", "merged weights", "gradients", "optimizer", "copies for the checkpoint")
# Growth of the process in a run beside tensors, in bytes, as measured by benchmarks/plan.py on one machine: libraries
# loaded during the run (curves, kernels and their buffers, this plan), and the compiler.
LIBRARY_GROWTH, COMPILER_GROWTH = 160e6, 20e6


class ParameterCount(NamedTuple):
    """Number of parameters by part of the model."""

    embedding: int
    head: int  # 0 with tied embeddings
    attention: int
    mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self)

    @property
    def body(self) -> int:
        """Parameters without embedding and head."""
        return self.attention + self.mlp + self.norms


def count_parameters(config: Gemma3Config) -> ParameterCount:
    """ParameterCount a model's parameters from its config."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    vocabulary = config.vocab_size * D
    norms = L * (4 * D + 2 * H) + D
    attention = L * (2 * D * N * H + 2 * D * K * H)
    return ParameterCount(vocabulary, 0 if config.tie_word_embeddings else vocabulary, attention, L * 3 * D * F, norms)


class Sharding(NamedTuple):
    """How weights and optimizer state are sharded."""

    strategy: Literal["ddp", "fsdp", "hsdp"]
    gpus: int
    per_node: int

    @property
    def sharded(self) -> bool:
        """Whether a device holds a shard of the weights only."""
        return self.strategy != "ddp"

    @property
    def shards(self) -> int:
        """Number of shards of the weights."""
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": min(self.gpus, self.per_node)}[self.strategy]


class Weights(NamedTuple):
    """Bytes of all weights, and the number of those that learn."""

    bytes: int
    learning: int


def weights_of(config: Gemma3Config, lora: LoRA | None = None, half_base: bool = False) -> Weights:
    """Return the weights of a model, or of a frozen one with an adapter in fp32."""
    total = count_parameters(config).total
    if lora is None:
        return Weights(FP32 * total, total)
    model = meta_model(config)
    add_lora(model, lora)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Weights((BF16 if half_base else FP32) * total + FP32 * learning, learning)


class OptimizerStep(NamedTuple):
    """PeakMemory and operations of one optimizer step."""

    state: int  # bytes of optimizer state, over all shards
    working: int  # bytes of temporary memory, on one device
    operations: list[tuple[Operation, float]]  # with repetitions


@lru_cache(maxsize=32)
def trace_optimizer_step(
    config: Gemma3Config, settings: OptimizerSettings, precision: Literal["bf16", "fp32"], learning: int | None = None
) -> OptimizerStep:
    """Trace an optimizer step: AdamW has two moments per parameter, Muon one per matrix.

    `learning` is the number of parameters, where an adapter alone learns.
    """
    count = count_parameters(config)
    learning = count.total if learning is None else learning
    # Gradient norm and clipping.
    operations: list[tuple[Operation, float]] = [(Operation("clip", (), 0, 12 * learning, (), ()), 1)]
    matrices = count.attention + count.mlp if settings.name == "muon" else 0
    rest = learning - matrices
    operations.append((Operation("adamw", (), 0, 28 * rest, (), ()), 1))
    working = 0
    if matrices:
        traced = _trace_muon(config, torch.float32 if precision == "fp32" else torch.bfloat16)
        working = max(part[0] for part in traced)
        operations += [operation for part in traced for operation in part[1]]
    return OptimizerStep(FP32 * (matrices + 2 * rest), working, operations)


def _trace_muon(config: Gemma3Config, dtype: torch.dtype) -> list[tuple[int, list[tuple[Operation, float]]]]:
    """Run Muon on one stack of matrices per shape; return working memory, and operations with repetitions."""
    with torch.device("meta"):
        block = Gemma3(config.replace(num_hidden_layers=1)).blocks[0]
    shapes = Counter(tuple(parameter.shape) for parameter in block.parameters() if parameter.ndim == 2)
    found: list[tuple[int, list[tuple[Operation, float]]]] = []
    for shape, number in shapes.items():
        number *= config.num_hidden_layers
        matrices = [torch.empty(shape, dtype=torch.float32, device="meta", requires_grad=True) for _ in range(number)]
        stack = next(iter(stacks(matrices)))
        for matrix in stack:
            matrix.grad = torch.empty_like(matrix)
        muon = Muon(stack, 1.0, 0.0, 0.9, dtype)
        muon.step()  # allocates the momentum
        recorder = TraceMode()
        recorder.mark("embedding", False)
        with recorder:
            for matrix in stack:
                assert matrix.grad is not None
                for known in (matrix, matrix.grad, muon.state[matrix]["momentum_buffer"]):
                    recorder.number(known, "inputs")
            muon.step()
        working = _highest(recorder)
        times = number / len(stack)
        found.append((working, [(operation, times) for operation in recorder.operations]))
    return found


def _highest(recorder: TraceMode) -> int:
    """Return the peak bytes of the buffers allocated while recording."""
    changes: list[tuple[int, int, int]] = []
    for buffer in recorder.buffers:
        if buffer.label != "inputs":
            changes.append((buffer.allocated, 0, buffer.size))
            if buffer.freed is not None:
                changes.append((buffer.freed, 1, -buffer.size))
    return int(sum(peak((str(0), size) for _, _, size in sorted(changes)).values()))


class PeakMemory(NamedTuple):
    """Peak memory of one device, its phase and its classes."""

    phase: str
    classes: dict[str, float]  # bytes

    @property
    def total(self) -> float:
        """Total bytes."""
        return sum(self.classes.values())


def peak_memory(
    config: Gemma3Config,
    traced: Trace,
    optimizer_step: OptimizerStep,
    sharding: Sharding,
    precision: Literal["bf16", "fp32"],
    device: Literal["cpu", "gpu", "apple"],
    compiled: bool,
    gradient_accumulation: bool,
    process: float,
    adapted: Weights | None = None,
) -> PeakMemory:
    """Add up the classes of memory in each phase, and return the phase with the most.

    `adapted` are the weights where an adapter alone learns.
    """
    count = count_parameters(config)
    shares = sharding.shards
    all_weights = adapted or weights_of(config)
    weights, state = all_weights.bytes / shares, optimizer_step.state / shares
    learning = FP32 * all_weights.learning / shares
    persistent = {"weights": weights, "optimizer": state}
    micro_batch = dict(traced.peak(config.layer_kinds))
    micro_batch["gradients"] = micro_batch.get("gradients", 0) / shares
    if gradient_accumulation or "gradients" not in micro_batch:
        micro_batch["gradients"] = learning if gradient_accumulation else 0.0
    if sharding.sharded and sharding.gpus > 1:
        micro_batch["gathered weights"] = _gathered(config, count, precision)
    step = {"gradients": learning, "working memory": optimizer_step.working / shares}
    phases = {"the backward pass": persistent | micro_batch, "the optimizer step": persistent | step}
    if device == "cpu":
        # A checkpoint is copied before it is written, and again while it is serialized.
        phases["a checkpoint"] = persistent | {"copies for the checkpoint": 2 * (learning + state)}
    if adapted is not None:
        phases["merging the adapter"] = persistent | {"merged weights": FP32 * count.total}
    totals = (PeakMemory(name, _in_process(tensors, device, compiled, process)) for name, tensors in phases.items())
    return max(totals, key=lambda memory: memory.total)


def _gathered(config: Gemma3Config, count: ParameterCount, precision: Literal["bf16", "fp32"]) -> float:
    """Return the bytes that fsdp holds unsharded: the embedding, one block in use, and the next one, prefetched.

    In the backward pass these include a block's gradients, in its precision and in fp32 for the reduce-scatter.
    """
    width = BF16 if precision == "bf16" else FP32
    block = count.body / config.num_hidden_layers
    return width * (count.embedding + count.head) + block * (2 * width + width + FP32)


def _in_process(
    tensors: dict[str, float], device: Literal["cpu", "gpu", "apple"], compiled: bool, process: float
) -> dict[str, float]:
    """Add the memory of a process beside its tensors."""
    classes = {label: size for label, size in tensors.items() if size >= 1}
    short_lived = sum(size for label, size in classes.items() if label not in _UNFRAGMENTED)
    overhead = {"fragmentation": (HEAP_FRAGMENTATION if device == "cpu" else GPU_FRAGMENTATION) * short_lived}
    if device == "gpu":
        return classes | overhead | {"GPU context": CUDA_CONTEXT}
    return classes | overhead | {"Python and libraries": process + LIBRARY_GROWTH + COMPILER_GROWTH * compiled}
