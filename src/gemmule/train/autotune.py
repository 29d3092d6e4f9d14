"""Trials before a run, on this machine and at the run's own shapes: what is fastest, and whether it is right.

Number formats and attention kernels are timed. What is chosen then computes a layer's output and gradients, compiled if
the run is, and they are compared with the reference kernel's in fp32 as it is written: a compiler, a library or a
kernel may be wrong on one processor, at one shape, and the loss need not show it.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gemmule.compiler import compile_block, compile_function, reason_not_to_compile, rebuilding
from gemmule.errors import DeviceError, RecipeError
from gemmule.model.attention import KERNELS, AttentionMask, block_size_for, packed_mask
from gemmule.model.config import Gemma3Config, Kind
from gemmule.model.gemma3 import Block, rotary_tables
from gemmule.runtime import autocast, choose_precision
from gemmule.settings import Problem
from gemmule.train.loss import IGNORED, losses_and_gradients, rows_at_once, summed_loss
from gemmule.train.settings import AUTO, TrainSettings

log = logging.getLogger(__name__)

TRIALS = 5

Precision = Literal["bf16", "fp32"]
FORMATS: tuple[Precision, ...] = ("bf16", "fp32")

# Tokens, and rows of the vocabulary, at which number formats are timed.
_TIMED_TOKENS, _TIMED_VOCABULARY = 2**11, 2**14
# Shape of the product that is timed first, and how many times as slow a format needs no further trial.
_PRODUCT, _FAR_SLOWER = (2**8, 2**8), 5.0
# Elements of attention scores that the reference holds at once; rows longer than that allows are compared with SDPA.
_SCORES_AT_ONCE = 2**27
# The relative error (length of the difference over length) that is always allowed: of sums in another order.
_ALWAYS_ALLOWED = {"fp32": 1e-3, "bf16": 2e-2}
# How much larger an error may be than that of the plain kernel in the same number format.
_ROOM = 4.0


class Trial(NamedTuple):
    """What a run computes with: its model and one micro-batch of a process."""

    config: Gemma3Config
    rows: int
    context: int
    masks_documents: bool
    device: torch.device


def tune(trial: Trial, settings: TrainSettings) -> TrainSettings:
    """Choose train.precision, train.compile and train.attention by trials on this machine, and log why.

    RecipeError for a kernel that cannot train this model, DeviceError where none computes what the reference does.
    """
    if settings.attention == "flex" and not flex_trains(trial.config, trial.device, settings.compile):
        advice = (
            'needs a GPU, train.compile and no model.attention_dropout; "auto" takes the fastest that can train here'
        )
        raise RecipeError(str(Problem("train.attention", "flex", advice)))
    precision = settle_precision(trial, settings.precision)
    reason = reason_not_to_compile(trial.device) if settings.compile else None
    if reason is not None:
        log.info(f"train.compile: disabled, because this machine cannot compile: {reason}")
    compiled = settings.compile and reason is None
    kernels = [settings.attention] if settings.attention != AUTO else _by_speed(trial, precision, compiled)
    kernel, compiled = _first_that_agrees(trial, kernels, precision, compiled)
    return settings.replace(precision=precision, compile=compiled, attention=kernel)


def settle_precision(trial: Trial, wanted: str) -> Precision:
    """Return the number format to compute in: the one that is named, or on a CPU the one that is faster."""
    if wanted == AUTO and trial.device.type == "cpu":
        seconds = time_precisions(trial)
        best, other = sorted(seconds, key=lambda precision: seconds[precision])
        log.info(f"train.precision: {best} is {seconds[other] / seconds[best]:.2f} times as fast as {other} here")
        return best
    return choose_precision(wanted, trial.device)


def _by_speed(trial: Trial, precision: Precision, compiled: bool) -> list[str]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    times = time_kernels(trial.config, trial.context, dtype, trial.device, compiled)
    kernels = sorted(times, key=lambda name: times[name])
    if times:
        others = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
        tokens = tokens_of_a_trial(trial.device)
        log.info(f"train.attention: {kernels[0]} is the fastest here ({others} for {tokens:,} tokens of a local layer)")
    return kernels or ["sdpa"]


def _first_that_agrees(trial: Trial, kernels: Sequence[str], precision: Precision, compiled: bool) -> tuple[str, bool]:
    """Return the first kernel that agrees with the reference, compiled if that is wanted and any does."""
    for now_compiled in (True, False) if compiled else (False,):
        for kernel in kernels:
            reason = disagreement(trial, kernel, precision, now_compiled)
            if reason is None:
                if compiled and not now_compiled:
                    log.info(
                        "train.compile: disabled, because compiled layers differ from the reference on this machine"
                    )
                return kernel, now_compiled
            how = f"{kernel}, compiled," if now_compiled else kernel
            log.info(f"train.attention: {how} is not used: on this machine it differs from the reference: {reason}")
    advice = "try train.precision = 'fp32', or train.attention = 'reference'"
    raise DeviceError(f"train.attention = {', '.join(kernels)!r}: computes something else than the reference; {advice}")


# --- speed ---


def tokens_of_a_trial(device: torch.device) -> int:
    """Return how many tokens take some hundredths of a second, and a GPU longer than it takes to launch its kernels."""
    return 2**15 if device.type == "cuda" else 2**11


def flex_trains(config: Gemma3Config, device: torch.device, compiled: bool) -> bool:
    """Whether FlexAttention can train this model: it has no backward pass on a CPU, and no dropout."""
    return device.type == "cuda" and compiled and not config.attention_dropout


def time_precisions(trial: Trial) -> dict[Precision, float]:
    """Return the seconds of a forward and backward pass in each number format, estimated from a layer and the head.

    Where one format is far slower, as bf16 on a processor without instructions for it, those of a single product.
    """
    products = {each: _product_seconds(each) for each in FORMATS}
    if max(products.values()) > _FAR_SLOWER * min(products.values()):
        return products
    timing = _Timing(trial._replace(rows=max(1, min(trial.rows, _TIMED_TOKENS // trial.context))))

    def once(precision: Precision) -> float:
        layer, head = timing.once(precision)
        return trial.config.num_hidden_layers * layer + head

    turns = [{precision: once(precision) for precision in FORMATS} for _ in range(1 + 3)]  # the first warms up
    return {precision: min(turn[precision] for turn in turns[1:]) for precision in FORMATS}


class _Timing:
    """A layer and the head of a model with their inputs, to be timed."""

    def __init__(self, trial: Trial) -> None:
        self._layer = _Layer(trial, "local" if "local" in trial.config.layer_kinds else "global")
        self._block = self._layer.block("block-local")
        self._device, size = trial.device, min(trial.config.vocab_size, _TIMED_VOCABULARY)
        shape = (size, trial.config.hidden_size)
        self._vocabulary = torch.nn.Parameter(torch.randn(shape, dtype=torch.float32, device=trial.device))
        self._targets = torch.randint(size, (trial.rows, trial.context), device=trial.device)
        self._part = size / trial.config.vocab_size

    def once(self, precision: Precision) -> tuple[float, float]:
        """Return the seconds of a forward and backward pass of the layer, and of the head."""
        began = time.perf_counter()
        self._layer.run(self._block, "block-local", precision)
        between = time.perf_counter()
        with autocast(self._device, precision):
            loss = summed_loss(self._targets)(self._layer.x, self._vocabulary)
        torch.autograd.backward(loss)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return between - began, (time.perf_counter() - between) / self._part


def time_layer_and_head(trial: Trial, precision: Precision) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass of a layer, and of the head with its loss, not compiled."""
    timing = _Timing(trial)
    turns = [timing.once(precision) for _ in range(1 + 2)]  # the first warms up
    return min(layer for layer, _ in turns[1:]), min(head for _, head in turns[1:])


def _product_seconds(precision: Precision) -> float:
    """Return the seconds of a small matrix product on the CPU."""
    left, right = torch.ones(2, *_PRODUCT, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(1 + 2):  # the first warms up
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def time_kernels(
    config: Gemma3Config,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
) -> dict[str, float]:
    """Return the seconds of each kernel, forward and backward for one local layer over rows of `context` tokens.

    Empty where all of them would do the same: long rows that no window cuts. Kernels that do not run here are logged.
    """
    window = config.window("local")
    if block_size_for(context, window, device) is None:
        return {}
    positions = torch.arange(context, device=device)[None]
    times: dict[str, float] = {}
    for name in ("sdpa", "block-local", *(["flex"] if flex_trains(config, device, compiled) else [])):
        mask = packed_mask(name, positions, window, None)
        try:
            timing = partial(_seconds, name, config, mask, dtype, device, compiled)
            times[name] = rebuilding(timing)
        except RuntimeError as error:  # the compiler's, or out of a GPU's shared memory
            log.info(f"train.attention: {name} does not run here: {str(error).strip().splitlines()[0]}")
    return times


def _seconds(
    name: str, config: Gemma3Config, mask: AttentionMask, dtype: torch.dtype, device: torch.device, compiled: bool
) -> float:
    context = mask.query_positions.shape[1]
    rows, scale = max(1, tokens_of_a_trial(device) // context), config.query_pre_attn_scalar**-0.5

    def drawn(heads: int) -> Tensor:
        return torch.randn(rows, heads, context, config.head_dim, dtype=dtype, device=device, requires_grad=True)

    query, key, value = map(drawn, (config.num_attention_heads, *2 * (config.num_key_value_heads,)))
    kernel = compile_function(KERNELS[name]) if compiled else KERNELS[name]
    times = []
    for _ in range(2 + TRIALS):  # the first two warm up
        began = time.perf_counter()
        torch.autograd.grad(kernel(query, key, value, mask, scale, 0.0).sum(), (query, key, value))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[2:])


# --- agreement with the reference ---


def disagreement(trial: Trial, kernel: str, precision: Precision, compiled: bool) -> str | None:
    """Return how a kernel's output or gradients differ from the reference on this machine, or None where they agree.

    Each kind of layer that the model has computes one micro-batch forward and backward, without dropout, and so does
    the loss where it is compiled.
    """
    try:
        for kind in dict.fromkeys(trial.config.layer_kinds):
            layer = _Layer(trial, kind)
            for name, off, allowed in layer.compare(kernel, precision, compiled):
                if not off <= allowed:  # NaN is not, either
                    what = f"the {name} of a {kind} layer, {trial.rows} x {trial.context} tokens in {precision}"
                    return f"{what}, is {_describe(off)}"
        return _loss_disagreement(trial, precision) if compiled else None
    finally:
        if compiled:
            torch.compiler.reset()  # compiled too often in one process, a block would be run as it is written


def _describe(off: float) -> str:
    return f"off by {off:.0%} of its length" if off < float("inf") else "not finite"


class _Layer:
    """A layer of one kind with first weights, a micro-batch that goes through it, and the gradient of its output."""

    def __init__(self, trial: Trial, kind: Kind) -> None:
        self.trial, self.kind = trial, kind
        self.config = trial.config.replace(dropout=0.0, attention_dropout=0.0)
        shape = (trial.rows, trial.context, self.config.hidden_size)
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, dtype=torch.float32, generator=generator).to(trial.device) for _ in range(2)]
        self.x, self.slope = drawn[0].requires_grad_(), drawn[1]
        self._positions = torch.arange(trial.context, device=trial.device)[None]
        # Two or three documents a row, at other places in each.
        length, start = max(1, 2 * trial.context // 5), 7 * torch.arange(trial.rows, device=trial.device)[:, None]
        documents = ((self._positions + start) // length).int()
        self._documents = documents if trial.masks_documents else None

    def block(self, kernel: str) -> Block:
        """Return the layer with an attention kernel, the same weights each time."""
        block = Block(self.config, self.config.layer_kinds.index(self.kind), kernel).float().train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(
                        torch.randn(parameter.shape, dtype=torch.float32, generator=generator)
                        * self.config.initializer_range
                    )
        return block.to(self.trial.device)

    def run(self, block: Block, kernel: str, precision: Precision, rows: slice = slice(None)) -> Tensor:
        """Go forward and backward, adding to the gradients; return the output of some rows."""
        documents = None if self._documents is None else self._documents[rows]
        config, window = self.config, self.config.window(self.kind)
        mask = packed_mask(kernel, self._positions, window, documents)
        rotary = rotary_tables(self._positions, config.head_dim, *config.rope(self.kind))
        with autocast(self.trial.device, precision):
            output = block(self.x[rows], rotary, mask)
        output.backward(self.slope[rows])
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        return output.detach()

    def compare(self, kernel: str, precision: Precision, compiled: bool) -> Iterator[tuple[str, float, float]]:
        """Yield what is compared, its relative error, and the error allowed."""
        config, length = self.config, self.trial.context
        at_once = _SCORES_AT_ONCE // (config.num_attention_heads * length * length)
        plain = "reference" if at_once else "sdpa"
        chunks = [slice(first, first + max(1, at_once)) for first in range(0, self.trial.rows, max(1, at_once))]
        formats: set[Precision] = {"fp32", precision}
        wanted = {each: self._results(plain, each, chunks, compiled=False) for each in formats}
        found = rebuilding(lambda: self._results(kernel, precision, [slice(None)], compiled))
        for name, expected in wanted["fp32"].items():
            allowed = max(_ROOM * _relative_error(wanted[precision][name], expected), _ALWAYS_ALLOWED[precision])
            yield name, _relative_error(found[name], expected), allowed

    def _results(self, kernel: str, precision: Precision, chunks: Sequence[slice], compiled: bool) -> dict[str, Tensor]:
        block, self.x.grad = self.block(kernel), None
        if compiled:
            compile_block(block)
        output = torch.cat([self.run(block, kernel, precision, rows) for rows in chunks])
        gradients = {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
        found = {"output": output, **gradients, "gradient of its input": self.x.grad}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def _loss_disagreement(trial: Trial, precision: Precision) -> str | None:
    """Compare the compiled loss of a chunk of logits, and its gradient, with the function as it is written."""
    size, dtype = trial.config.vocab_size, torch.bfloat16 if precision == "bf16" else torch.float32
    rows = min(trial.rows * trial.context, rows_at_once(size, trial.device))
    logits = torch.randn(rows, size, dtype=torch.float32, generator=torch.Generator().manual_seed(2)).to(
        trial.device, dtype
    )
    targets = torch.arange(rows, device=trial.device) % size
    targets[::5] = IGNORED
    wanted = losses_and_gradients(False)(logits.clone(), targets)
    found = rebuilding(lambda: losses_and_gradients(True)(logits.clone(), targets))
    for name, one, other in zip(("loss", "gradient of the logits"), found, wanted, strict=True):
        assert one is not None and other is not None  # noqa: PT018 - the gradient is asked for
        if not (off := _relative_error(one, other)) <= _ALWAYS_ALLOWED[precision]:
            return f"the {name} of {rows} x {size} logits in {precision} is {_describe(off)}"
    return None


def _relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    off = (found.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    return off.item() if bool(off.isfinite()) else float("inf")
