"""A recipe's plan: what it needs of memory, time, energy and money on a device, and what it rests on."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from gemmule.data.dataset import prepared_folder
from gemmule.errors import DeviceError, RecipeError
from gemmule.plan.clock import flops, micro_batch_seconds, update_seconds
from gemmule.plan.devices import DEVICES, Device, find_device
from gemmule.plan.fusion import fuse
from gemmule.plan.memory import (
    Count,
    Memory,
    Sharing,
    Update,
    count_parameters,
    fullest_moment,
    process_bytes,
    update_of,
)
from gemmule.plan.network import LINK_SHARE, Collective, exchanges, exposed, seconds
from gemmule.plan.prices import LAUNCH, Prices, Roofline
from gemmule.plan.probe import Probe, this_machine
from gemmule.plan.text import Text, text_of
from gemmule.plan.trace import Shape, Trace, trace
from gemmule.runtime import choose_precision
from gemmule.tokenizer import Tokenizer
from gemmule.train.probe import AUTO
from gemmule.train.run import Recipe

# Seconds that compiling takes before the first step, as in the project's own runs.
COMPILING = 30.0
# Of a generated token, operations that each layer starts; generation is not compiled.
_STARTS = 80
# Training tokens for each parameter outside the embedding, where compute buys most (Hoffmann et al., arXiv 2203.15556).
OPTIMAL = 20.0
# macOS leaves a GPU so much of the memory it shares.
_APPLE_SHARE = 0.75


class Times(NamedTuple):
    """Seconds of a run and its parts."""

    forward: float  # of all micro-batches of a step
    backward: float
    update: float
    exchange: float  # that computing does not hide
    validation: float  # each
    sample: float  # each
    start: float

    @property
    def step(self) -> float:
        """One optimizer step."""
        return self.forward + self.backward + self.update + self.exchange


class Plan(NamedTuple):
    """What was found out about a recipe on a device."""

    recipe: Recipe
    device: Device
    sharing: Sharing
    precision: Literal["bf16", "fp32"]
    parameters: Count
    micro_batch: int  # rows on a device at once
    micro_batches: int  # of a step
    flops_forward: float  # a token
    flops_backward: float
    flops_update: float  # a step
    memory: Memory
    capacity: float
    largest: int  # rows that would fit at once; 0 where none do
    times: Times
    steps: int
    exchanged: list[tuple[Collective, float]]  # with seconds
    text: Text
    price: float
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
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
        """While it trains."""
        return self.tokens_per_step / self.times.step

    @property
    def hours(self) -> float:
        """From start to end, with validation and samples."""
        every = math.ceil(self.steps / self.recipe.train.validate_every)
        whole = self.times.start + self.steps * self.times.step
        return (whole + every * (self.times.validation + self.times.sample)) / 3600

    @property
    def kilowatt_hours(self) -> float:
        """What the devices draw at full power."""
        return self.hours * self.sharing.gpus * self.device.watts / 1000

    @property
    def cost(self) -> float:
        """In dollars."""
        return self.hours * self.sharing.gpus * self.price

    @property
    def utilisation(self) -> float | None:
        """Return the share of the published peak that the model's own FLOPs use; None where no peak is published."""
        peak = self.device.bf16 if self.precision == "bf16" else self.device.fp32
        if self.device.name == "cpu" or not peak:
            return None
        return (self.flops_forward * 3) * self.tokens_per_second / (peak * self.sharing.gpus)


class Planner:
    """Plans variants of one recipe on one device; what was traced once is not traced again."""

    def __init__(self, recipe: Recipe, device: str | None = None, gpus: int = 1, price: float | None = None) -> None:
        """Settle what the recipe leaves open; DeviceError or RecipeError where it cannot be run so."""
        if device is None and recipe.train.device == "cpu":
            device = "cpu"
        self.device = device_at_hand() if device is None else this_machine() if device == "cpu" else find_device(device)
        if self.device.name == "cpu" and gpus > 1:
            raise DeviceError(f"--gpus {gpus}: counts GPUs; name one by --device, such as h100")
        if recipe.train.batch_size % gpus:
            nearest = max(gpus, recipe.train.batch_size // gpus * gpus)
            raise RecipeError(
                f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {gpus} GPUs, such as {nearest}"
            )
        self.recipe = recipe.replace(model=recipe.model.replace(vocab_size=_vocabulary(recipe), size=None))
        self.sharing = Sharing(recipe.parallel.strategy, gpus, self.device.per_machine)
        self.price = self.device.price if price is None else price
        self.precision = _precision(recipe, self.device)
        self._traces: dict[Shape, tuple[Trace, Trace]] = {}
        self._process = process_bytes()  # before anything is measured here

    def variant(self, recipe: Recipe, gpus: int) -> "Planner":
        """Return a planner of a changed recipe that knows what this one has traced."""
        other = Planner(recipe, self.device.name, gpus, self.price)
        other._traces, other._process = self._traces, self._process
        return other

    def plan(self, search: bool = True) -> Plan:
        """Work everything out; without `search` no other micro-batch is tried."""
        recipe, settings, model = self.recipe, self.recipe.train, self.recipe.model
        here = settings.batch_size // self.sharing.gpus
        rows = min(settings.micro_batch_size or here, here)
        memory = self.memory(rows)
        eager, traced = self._traced(self.shape(rows))
        update = self.update()
        work = flops(traced, model.layer_kinds)
        prices: Prices = Roofline(self.device, self.precision)
        if self.device.name == "cpu":
            prices = Probe(rows * settings.context * model.hidden_size * 4)
        count = count_parameters(model)
        text = text_of(recipe)
        parts = here // rows
        matrices = count.attention + count.mlp if recipe.optimizer.name == "muon" else 0
        found = exchanges(count, model.num_hidden_layers, matrices, self.sharing, parts, self.precision)
        times = self._times(eager, traced, update, prices, found, text, rows, parts)
        steps = settings.steps
        if settings.minutes is not None:
            steps = max(1, min(steps, int(60 * settings.minutes / times.step)))
        tokens = rows * settings.context
        return Plan(
            recipe, self.device, self.sharing, self.precision, count, rows, parts,
            work.forward / tokens, work.backward / tokens, sum(o.flops * times for o, times in update.operations),
            memory, self.capacity, self._largest(rows, here, memory) if search else rows, times, steps,
            [(one, seconds(one, self.device)) for one in found], text, self.price,
            [*prices.assumptions, *self._assumptions(text)],
        )  # fmt: skip

    def shape(self, rows: int) -> Shape:
        """Describe a micro-batch of so many rows."""
        settings, recipe = self.recipe.train, self.recipe
        # A run's own plan knows what "auto" became, which on a CPU is "folded" as a rule; what only a GPU can run is
        # planned as what it replaces.
        likely = {AUTO: "folded" if self.device.name == "cpu" else "sdpa", "flex": "sdpa"}
        kernel = likely.get(settings.attention, settings.attention)
        return Shape(
            model=recipe.model,
            rows=rows,
            context=settings.context,
            masked=recipe.data.mask_documents,
            precision=self.precision,
            kernel=kernel if self.device.fused_attention else "reference",
            recomputed=recipe.parallel.activation_checkpointing,
            compiled=settings.compile,
            sharded=self.sharing.sharded,
            accumulating=settings.batch_size // self.sharing.gpus > rows,
        )

    def memory(self, rows: int) -> Memory:
        """Return the fullest moment of a device that takes so many rows at once."""
        shape = self.shape(rows)
        kind: Literal["cpu", "gpu", "apple"] = "gpu"
        if self.device.name == "cpu":
            kind = "cpu"
        elif not self.device.fused_attention:
            kind = "apple"
        traced = self._traced(shape)[1]
        options = (self.precision, kind, shape.compiled, shape.accumulating, self._process)
        return fullest_moment(self.recipe.model, traced, self.update(), self.sharing, *options)

    def update(self) -> Update:
        """Return what one update of the weights takes."""
        return update_of(self.recipe.model, self.recipe.optimizer, self.precision)

    @property
    def capacity(self) -> float:
        """Bytes that one device offers."""
        return self.device.memory * (1.0 if self.device.fused_attention else _APPLE_SHARE)

    def _traced(self, shape: Shape) -> tuple[Trace, Trace]:
        """Return a micro-batch as written and as it is run, which is compiled perhaps."""
        if shape not in self._traces:
            eager = trace(shape)
            self._traces[shape] = (eager, fuse(eager) if shape.compiled else eager)
        return self._traces[shape]

    def _largest(self, rows: int, here: int, memory: Memory) -> int:
        """Search the largest micro-batch that divides a device's rows and fits: memory grows with rows in a line."""
        other = rows // 2 if rows > 1 else 2
        slope = max(1.0, (memory.total - self.memory(other).total) / (rows - other))
        room = rows + (self.capacity - memory.total) / slope
        fitting = [size for size in range(1, here + 1) if here % size == 0 and size <= room]
        while fitting and self.memory(fitting[-1]).total > self.capacity:
            fitting.pop()
        return fitting[-1] if fitting else 0

    def _times(
        self,
        eager: Trace,
        traced: Trace,
        update: Update,
        prices: Prices,
        found: list[Collective],
        text: Text,
        rows: int,
        parts: int,
    ) -> Times:
        settings, kinds = self.recipe.train, self.recipe.model.layer_kinds
        there, back = (parts * part for part in micro_batch_seconds(traced, kinds, prices))
        moving = update_seconds(update, self.sharing.shards, prices)
        hiding = back if self.sharing.strategy == "ddp" else there + back
        waiting = exposed(found, self.device, hiding, len(kinds)) if found else 0.0
        measured = settings.validation_tokens or text.validation_tokens or 0
        forward = micro_batch_seconds(eager, kinds, prices)[0]
        validation = forward * measured / (rows * settings.context) / self.sharing.gpus
        sample = settings.sample_tokens * len(kinds) * _STARTS * LAUNCH
        return Times(there, back, moving, waiting, validation, sample, COMPILING * settings.compile)

    def _assumptions(self, text: Text) -> list[str]:
        said = [f"tokens of the data: {text.how}"]
        said.append(f"{OPTIMAL:g} tokens a parameter outside the embedding are compute-optimal (arXiv 2203.15556)")
        if self.device.name != "cpu":
            said.append(
                f"electricity of the devices alone, at {self.device.watts:g} W each; {self.price:g} $ an hour each"
            )
        if self.recipe.train.compile:
            said.append(
                f"compiling takes {COMPILING:g} s before the first step; compiled blocks store what products use"
            )
        if not self.device.fused_attention:
            said.append(
                f"attention keeps its table, as torch's on MPS does; macOS leaves {_APPLE_SHARE:.0%} of the memory"
            )
        if self.sharing.gpus > 1:
            here = min(self.sharing.gpus, self.device.per_machine)
            said.append(
                f"machines of {here}: {self.device.inside / 1e9:g} GB/s inside, {self.device.between / 1e9:g} GB/s for "
                f"each GPU between them, of which {LINK_SHARE:.0%} are reached; exchanges hide behind computing"
            )
        return said


def device_at_hand() -> Device:
    """Return the machine's GPU where its name is known, else the machine itself."""
    if torch.cuda.is_available():
        title = torch.cuda.get_device_name().lower().replace(" ", "")
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
        named = [device for name, device in DEVICES.items() if name.partition("-")[0] in title]
        if named:
            return min(named, key=lambda device: abs(device.memory / 1e9 - gigabytes))
    return this_machine()


def savings(planner: Planner, rows: int) -> list[tuple[str, float]]:
    """Return settings that would need less memory, and the bytes each saves alone, the largest first."""
    recipe, sharing = planner.recipe, planner.sharing
    now = planner.memory(rows).total
    changes: dict[str, tuple[Recipe, int]] = {}
    if rows > 1:
        changes["train.micro_batch_size = 1"] = (recipe, 1)
    if recipe.parallel.activation_checkpointing != "full":
        parallel = recipe.parallel.replace(activation_checkpointing="full")
        changes['parallel.activation_checkpointing = "full"'] = (recipe.replace(parallel=parallel), rows)
    if sharing.gpus > 1 and sharing.strategy == "ddp":
        changes['parallel.strategy = "fsdp"'] = (
            recipe.replace(parallel=recipe.parallel.replace(strategy="fsdp")),
            rows,
        )
    if recipe.optimizer.name == "adamw":
        optimizer = recipe.optimizer.replace(name="muon")
        changes['optimizer.name = "muon"'] = (recipe.replace(optimizer=optimizer), rows)
    if not recipe.train.compile:
        changes["train.compile = true"] = (recipe.replace(train=recipe.train.replace(compile=True)), rows)
    saved = []
    for name, (changed, size) in changes.items():
        other = planner.variant(changed, sharing.gpus)
        saved.append((name, now - other.memory(size).total))
    return sorted((item for item in saved if item[1] > 0), key=lambda item: -item[1])


def fewest_gpus(planner: Planner) -> int | None:
    """Return the fewest GPUs, in powers of two, on which one row at a time fits under fsdp; None up to 4096."""
    recipe = planner.recipe
    changed = recipe.replace(parallel=recipe.parallel.replace(strategy="fsdp"))
    for gpus in (2**power for power in range(1, 13)):
        batch = changed.replace(train=changed.train.replace(batch_size=gpus, micro_batch_size=1))
        if (other := planner.variant(batch, gpus)).memory(1).total <= other.capacity:
            return gpus
    return None


def _precision(recipe: Recipe, device: Device) -> Literal["bf16", "fp32"]:
    if device.name == "cpu" or recipe.train.precision != "auto":
        return choose_precision(recipe.train.precision, torch.device("cpu"))
    return "bf16" if device.bf16 else "fp32"


def _vocabulary(recipe: Recipe) -> int:
    """Return the rows of the embedding: the model's own, or as many as the tokenizer has."""
    if "vocab_size" in recipe.model.model_fields_set:
        return recipe.model.vocab_size
    folder = prepared_folder(recipe.data) or recipe.tokenizer.path
    return Tokenizer.load(Path(folder).expanduser()).vocab_size if folder else recipe.tokenizer.vocab_size
