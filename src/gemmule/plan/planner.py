"""Plan a recipe on a device: peak memory, time, energy, cost, and the assumptions of the estimate."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from gemmule.data.dataset import prepared_folder
from gemmule.errors import DeviceError, RecipeError
from gemmule.plan.cost_model import (
    LAUNCH_SECONDS,
    LINK_EFFICIENCY,
    Collective,
    CostModel,
    Roofline,
    collective_seconds,
    exposed_seconds,
    micro_batch_flops,
    micro_batch_seconds,
    optimizer_seconds,
    step_collectives,
)
from gemmule.plan.dataset_size import DatasetSize, dataset_size
from gemmule.plan.devices import DEVICES, Device, MeasuredCostModel, find_device, this_machine
from gemmule.plan.memory import (
    OptimizerStep,
    ParameterCount,
    PeakMemory,
    Sharding,
    count_parameters,
    peak_memory,
    trace_optimizer_step,
    weights_of,
)
from gemmule.plan.trace import Trace, TraceSettings, fuse, trace
from gemmule.processes import peak_memory as process_peak_memory
from gemmule.runtime import choose_precision
from gemmule.tokenizer import Tokenizer
from gemmule.train.autotune import settle_precision
from gemmule.train.lora import expected_lora
from gemmule.train.recipe import Recipe
from gemmule.train.resolve import base_dtype, resolve_vocabulary, trial_of
from gemmule.train.settings import AUTO

# Seconds of compilation before the first step, as in the project's own runs.
COMPILE_SECONDS = 30.0
# Kernel launches per layer and generated token; generation is not compiled.
_LAUNCHES = 80
# Compute-optimal training tokens per parameter outside the embedding (Hoffmann et al., arXiv 2203.15556).
COMPUTE_OPTIMAL = 20.0
# Share of the unified memory that macOS leaves to the GPU.
_APPLE_SHARE = 0.75


class Times(NamedTuple):
    """Seconds of an optimizer step and of other parts of a run."""

    forward: float  # all micro-batches
    backward: float
    optimizer: float
    communication: float  # exposed, not overlapped with compute
    validation: float  # each
    sample: float  # each
    start: float

    @property
    def step(self) -> float:
        """One optimizer step."""
        return self.forward + self.backward + self.optimizer + self.communication


class Plan(NamedTuple):
    """The plan of a recipe on a device."""

    recipe: Recipe
    device: Device
    sharding: Sharding
    precision: Literal["bf16", "fp32"]
    parameters: ParameterCount
    micro_batch: int  # sequences per device
    micro_batches: int  # per optimizer step
    flops_forward: float  # per token
    flops_backward: float
    flops_optimizer: float  # per step
    memory: PeakMemory
    capacity: float
    largest: int  # micro-batch that fits; 0 where none does
    times: Times
    steps: int
    collectives: list[tuple[Collective, float]]  # with seconds
    dataset: DatasetSize
    price: float
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        """Whether the peak memory fits."""
        return self.memory.total <= self.capacity

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.recipe.train.batch_size * self.recipe.train.context

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.tokens_per_step / self.times.step

    @property
    def hours(self) -> float:
        """Hours of the run, with validation and samples."""
        every = math.ceil(self.steps / self.recipe.train.validate_every)
        training = self.times.start + self.steps * self.times.step
        return (training + every * (self.times.validation + self.times.sample)) / 3600

    @property
    def kilowatt_hours(self) -> float:
        """Energy of the devices at full power."""
        return self.hours * self.sharding.gpus * self.device.watts / 1000

    @property
    def cost(self) -> float:
        """Cost in US dollars."""
        return self.hours * self.sharding.gpus * self.price

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization (MFU); None where no peak is published."""
        peak = self.device.bf16 if self.precision == "bf16" else self.device.fp32
        if self.device.name == "cpu" or not peak:
            return None
        return (self.flops_forward * 3) * self.tokens_per_second / (peak * self.sharding.gpus)


def planner_of(recipe: Recipe, device: str | None = None, gpus: int = 1, price: float | None = None) -> "Planner":
    """Settle device, vocabulary and precision of a recipe; DeviceError or RecipeError where it cannot run there."""
    process = process_peak_memory()  # before the measurements allocate memory
    if device is None and recipe.train.device == "cpu":
        device = "cpu"
    chosen = device_at_hand() if device is None else this_machine() if device == "cpu" else find_device(device)
    if chosen.name == "cpu" and gpus > 1:
        raise DeviceError(f"--gpus {gpus}: needs a GPU; choose one with --device, such as h100")
    if recipe.train.batch_size % gpus:
        nearest = max(gpus, recipe.train.batch_size // gpus * gpus)
        raise RecipeError(
            f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {gpus} GPUs, such as {nearest}"
        )
    recipe = resolve_vocabulary(recipe, _known_vocabulary(recipe))
    settings = recipe.train.replace(precision=_resolve_precision(recipe, chosen))
    return Planner(recipe.replace(train=settings), chosen, gpus, process, price)


class Planner:
    """Plans a recipe, and variants of it, on one device."""

    def __init__(self, recipe: Recipe, device: Device, gpus: int, process: float, price: float | None = None) -> None:
        """Take a recipe whose vocabulary and precision are settled.

        `process` is the memory of this process without a model, in bytes.
        """
        self.recipe, self.device, self._process = recipe, device, process
        self.precision: Literal["bf16", "fp32"] = "bf16" if recipe.train.precision == "bf16" else "fp32"
        self.sharding = Sharding(recipe.parallel.strategy, gpus, device.per_node)
        self.price = device.price if price is None else price
        self.half_base = base_dtype(recipe, self.precision) == torch.bfloat16
        lora = expected_lora(recipe.lora, recipe.model.vocab_size)
        self.adapted = None if lora is None else weights_of(recipe.model, lora, self.half_base)

    def variant(self, recipe: Recipe, gpus: int) -> "Planner":
        """Return a planner of a changed recipe on the same device."""
        return Planner(recipe, self.device, gpus, self._process, self.price)

    def plan(self, search: bool = True) -> Plan:
        """Make the plan; `search` also finds the largest micro-batch that fits."""
        recipe, settings, model = self.recipe, self.recipe.train, self.recipe.model
        rank_batch_size = settings.batch_size // self.sharding.gpus
        rows = min(settings.micro_batch_size or rank_batch_size, rank_batch_size)
        memory = self.memory(rows)
        eager, traced = _traced(self.trace_settings(rows))
        optimizer_step = self.optimizer_step()
        flops = micro_batch_flops(traced, model.layer_kinds)
        cost_model: CostModel = Roofline(self.device, self.precision)
        if self.device.name == "cpu":
            cost_model = MeasuredCostModel(rows * settings.context * model.hidden_size * 4)
        count = count_parameters(model)
        dataset = dataset_size(recipe)
        micro_batches = rank_batch_size // rows
        matrices = count.attention + count.mlp if recipe.optimizer.name == "muon" else 0
        collectives = step_collectives(
            count, model.num_hidden_layers, matrices, self.sharding, micro_batches, self.precision
        )
        times = self._times(eager, traced, optimizer_step, cost_model, collectives, dataset, rows, micro_batches)
        steps = settings.steps
        if settings.minutes is not None:
            first = recipe.schedule.restart_step
            steps = first + max(1, min(steps - first, int(60 * settings.minutes / times.step)))
        tokens = rows * settings.context
        return Plan(
            recipe, self.device, self.sharding, self.precision, count, rows, micro_batches,
            flops.forward / tokens, flops.backward / tokens,
            sum(operation.flops * repeats for operation, repeats in optimizer_step.operations),
            memory, self.capacity, self._largest(rows, rank_batch_size, memory) if search else rows, times, steps,
            [(one, collective_seconds(one, self.device)) for one in collectives], dataset, self.price,
            [*cost_model.assumptions, *self._assumptions(dataset)],
        )  # fmt: skip

    def trace_settings(self, rows: int) -> TraceSettings:
        """Describe a micro-batch of `rows` sequences."""
        settings, recipe = self.recipe.train, self.recipe
        # The plan that a run makes knows the resolved "auto", which on a CPU is usually "block-local"; FlexAttention is
        # planned as the SDPA that it replaces.
        likely = {AUTO: "block-local" if self.device.name == "cpu" else "sdpa", "flex": "sdpa"}
        kernel = likely.get(settings.attention, settings.attention)
        return TraceSettings(
            model=recipe.model,
            rows=rows,
            context=settings.context,
            mask_documents=recipe.data.masks_documents,
            precision=self.precision,
            kernel=kernel if self.device.fused_attention else "reference",
            activation_checkpointing=recipe.parallel.activation_checkpointing,
            compiled=settings.compile,
            sharded=self.sharding.sharded,
            gradient_accumulation=settings.batch_size // self.sharding.gpus > rows,
            lora=recipe.lora,
            half_base=self.half_base and self.adapted is not None,
        )

    def memory(self, rows: int) -> PeakMemory:
        """Return the peak memory of a device with micro-batches of `rows` sequences."""
        settings = self.trace_settings(rows)
        kind: Literal["cpu", "gpu", "apple"] = "gpu"
        if self.device.name == "cpu":
            kind = "cpu"
        elif not self.device.fused_attention:
            kind = "apple"
        traced = _traced(settings)[1]
        options = (self.precision, kind, settings.compiled, settings.gradient_accumulation, self._process)
        return peak_memory(self.recipe.model, traced, self.optimizer_step(), self.sharding, *options, self.adapted)

    def optimizer_step(self) -> OptimizerStep:
        """Return memory and operations of an optimizer step."""
        learning = None if self.adapted is None else self.adapted.learning
        return trace_optimizer_step(self.recipe.model, self.recipe.optimizer, self.precision, learning)

    @property
    def capacity(self) -> float:
        """Bytes available on one device."""
        return self.device.memory * (1.0 if self.device.fused_attention else _APPLE_SHARE)

    def _largest(self, rows: int, rank_batch_size: int, memory: PeakMemory) -> int:
        """Find the largest micro-batch that fits and divides the batch of a rank; memory is linear in its size."""
        other = rows // 2 if rows > 1 else 2
        slope = max(1.0, (memory.total - self.memory(other).total) / (rows - other))
        room = rows + (self.capacity - memory.total) / slope
        fitting = [size for size in range(1, rank_batch_size + 1) if rank_batch_size % size == 0 and size <= room]
        while fitting and self.memory(fitting[-1]).total > self.capacity:
            fitting.pop()
        return fitting[-1] if fitting else 0

    def _times(
        self,
        eager: Trace,
        traced: Trace,
        optimizer_step: OptimizerStep,
        cost_model: CostModel,
        collectives: list[Collective],
        dataset: DatasetSize,
        rows: int,
        micro_batches: int,
    ) -> Times:
        settings, kinds = self.recipe.train, self.recipe.model.layer_kinds
        forward, backward = (micro_batches * part for part in micro_batch_seconds(traced, kinds, cost_model))
        optimizer = optimizer_seconds(optimizer_step, self.sharding.shards, cost_model)
        overlap = backward if self.sharding.strategy == "ddp" else forward + backward
        communication = exposed_seconds(collectives, self.device, overlap, len(kinds)) if collectives else 0.0
        validation_tokens = settings.validation_tokens or dataset.validation_tokens or 0
        eager_forward = micro_batch_seconds(eager, kinds, cost_model)[0]
        validation = eager_forward * validation_tokens / (rows * settings.context) / self.sharding.gpus
        sample = settings.sample_tokens * len(kinds) * _LAUNCHES * LAUNCH_SECONDS
        start = COMPILE_SECONDS * settings.compile
        return Times(forward, backward, optimizer, communication, validation, sample, start)

    def _assumptions(self, dataset: DatasetSize) -> list[str]:
        found = [f"dataset size: {dataset.source}"]
        found.append(
            f"compute-optimal: {COMPUTE_OPTIMAL:g} tokens per parameter outside the embedding (arXiv 2203.15556)"
        )
        if self.device.name != "cpu":
            found.append(
                f"energy of the devices only, {self.device.watts:g} W each; price ${self.price:.2f} per device and hour"
            )
        if self.recipe.train.compile:
            found.append(
                f"compilation takes {COMPILE_SECONDS:g} s before step 1; compiled blocks save the inputs of matmuls"
            )
        if not self.device.fused_attention:
            found.append(
                f"attention materializes T x T scores, as on MPS; macOS leaves {_APPLE_SHARE:.0%} of memory to the GPU"
            )
        if self.sharding.gpus > 1:
            per_node = min(self.sharding.gpus, self.device.per_node)
            found.append(
                f"{per_node} GPUs per node: {self.device.intra_node / 1e9:g} GB/s within a node, "
                f"{self.device.inter_node / 1e9:g} GB/s per GPU between nodes, at {LINK_EFFICIENCY:.0%} efficiency; "
                "communication overlaps with compute"
            )
        return found


@lru_cache(maxsize=32)
def _traced(settings: TraceSettings) -> tuple[Trace, Trace]:
    """Return the trace of an eager micro-batch, and of one as the recipe runs it, compiled or not."""
    eager = trace(settings)
    return eager, fuse(eager) if settings.compiled else eager


def device_at_hand() -> Device:
    """Return the GPU of this machine if it is a known device, else the machine itself."""
    if torch.cuda.is_available():
        title = torch.cuda.get_device_name().lower().replace(" ", "")
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
        named = [device for name, device in DEVICES.items() if name.partition("-")[0] in title]
        if named:
            return min(named, key=lambda device: abs(device.memory / 1e9 - gigabytes))
    return this_machine()


class Saving(NamedTuple):
    """A setting that reduces peak memory."""

    setting: str  # as written after --set
    bytes: float
    fits: bool  # whether it then fits


def savings(planner: Planner, rows: int, largest: int) -> list[Saving]:
    """Return settings that reduce peak memory: the largest micro-batch that fits, then the largest savings."""
    recipe, sharding = planner.recipe, planner.sharding
    now = planner.memory(rows).total
    changes: dict[str, tuple[Recipe, int]] = {}
    smaller = largest or 1
    if smaller < rows:
        changes[f"train.micro_batch_size={smaller}"] = (recipe, smaller)
    if recipe.parallel.activation_checkpointing != "full":
        parallel = recipe.parallel.replace(activation_checkpointing="full")
        changes["parallel.activation_checkpointing=full"] = (recipe.replace(parallel=parallel), rows)
    if sharding.gpus > 1 and sharding.strategy == "ddp":
        changes["parallel.strategy=fsdp"] = (
            recipe.replace(parallel=recipe.parallel.replace(strategy="fsdp")),
            rows,
        )
    if recipe.optimizer.name == "adamw":
        optimizer = recipe.optimizer.replace(name="muon")
        changes["optimizer.name=muon"] = (recipe.replace(optimizer=optimizer), rows)
    if not recipe.train.compile:
        changes["train.compile=true"] = (recipe.replace(train=recipe.train.replace(compile=True)), rows)
    found = []
    for name, (changed, size) in changes.items():
        needed = planner.variant(changed, sharding.gpus).memory(size).total
        found.append(Saving(name, now - needed, needed <= planner.capacity))
    found.sort(key=lambda saving: (not (saving.fits and "micro_batch" in saving.setting), -saving.bytes))
    return [saving for saving in found if saving.bytes > 0]


def fewest_gpus(planner: Planner) -> int | None:
    """Return the smallest number of GPUs, a power of two up to 4096, on which one sequence fits with fsdp, or None."""
    recipe = planner.recipe
    changed = recipe.replace(parallel=recipe.parallel.replace(strategy="fsdp"))
    for gpus in (2**power for power in range(1, 13)):
        batch = changed.replace(train=changed.train.replace(batch_size=gpus, micro_batch_size=1))
        if (other := planner.variant(batch, gpus)).memory(1).total <= other.capacity:
            return gpus
    return None


def _resolve_precision(recipe: Recipe, device: Device) -> Literal["bf16", "fp32"]:
    if recipe.train.precision != AUTO:
        return choose_precision(recipe.train.precision, torch.device("cpu"))
    if device.name == "cpu":
        return settle_precision(trial_of(recipe, torch.device("cpu")), AUTO)
    return "bf16" if device.bf16 else "fp32"


def _known_vocabulary(recipe: Recipe) -> int | None:
    """Return how many ids the recipe's tokenizer has, None where it is still to be trained."""
    folder = prepared_folder(recipe.data) or recipe.tokenizer.path
    return Tokenizer.load(Path(folder).expanduser()).vocab_size if folder else None
