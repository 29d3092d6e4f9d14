"""The rule of `gemmule grow`: every setting that it chooses, each with its reason (docs/scaling.md)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from gemmule.data.report import LENGTHS, SplitReport, counted
from gemmule.errors import RecipeError
from gemmule.grow.law import LAW, Law
from gemmule.grow.machine import COMPILED, Speed
from gemmule.grow.shapes import block_parameters, parameters, shape
from gemmule.model.config import Gemma3Config
from gemmule.settings import Problem

# Candidates: vocabulary sizes, of which each entry needs so many bytes of text to be seen often enough, and the bytes
# of a token: an assumption until the tokenizer has been trained, between those of English stories and of other text.
_VOCABULARIES, _BYTES_PER_ENTRY = (512, 1024, 2048, 4096, 8192, 16_384, 32_768), 150
_BYTES_PER_TOKEN = {512: 2.4, 1024: 3.0, 2048: 3.5, 4096: 3.8, 8192: 4.0, 16_384: 4.2, 32_768: 4.3}
# Hidden sizes, and layers, of which a model has at most one for each so many units of width.
_WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
_LAYERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
_WIDTH_PER_LAYER = (24, 96)
# Parameters for each byte of text, at most: more would learn the text by heart.
_PARAMETERS_PER_BYTE = 5.0
# Tokens of an optimizer step, and how many steps a run should have for it.
_TOKENS_PER_STEP, _STEPS = (2048, 65_536), 300
# Bytes that are held out, where they are between 1 and 10 % of the text, and the fewest of a very short one.
_HELD_OUT, _LEAST_HELD_OUT = 50_000, 77
# Contexts, and the share of documents that fit into the one that is chosen.
_CONTEXTS, _FITTING = (128, 256, 512, 1024), 0.75
# The context where most documents are longer than all of these, as a book is.
_LONG_DOCUMENTS = 256
# Seconds that compiling takes before the first step.
_COMPILE_SECONDS = 30.0
# Validations of a short run and of others, and the minutes of a short one.
_VALIDATIONS, _SHORT = (6, 12), 3.0
# Repetition from which a run needs dropout and watches its validation, and dropout by epochs.
_REPEATED = 2.0
_DROPOUT = ((4.0, 0.0), (10.0, 0.1), (math.inf, 0.2))
# Most epochs over a text: later ones are worth little, and memorize.
_MOST_EPOCHS = 40.0
# Learning rate of AdamW at which a published model of so many parameters goes on learning.
_CONTINUED_RATE, _CONTINUED_PARAMETERS = 2e-5, 270e6
# Bytes and steps below which the command warns.
LITTLE_TEXT, FEW_STEPS = 50_000, 60


@dataclass(frozen=True)
class Choice:
    """A recipe: settings by section and name, and the reasons for some of them by dotted key."""

    table: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    epochs: float  # as estimated
    warnings: tuple[str, ...]


class Budget(NamedTuple):
    """What may be spent: minutes of training, and the number of parameters where the user has set it."""

    minutes: float
    parameters: int | None = None


def choose_vocabulary(text_bytes: int, budget: Budget, speed: Speed, law: Law = LAW) -> tuple[int, str]:
    """Return the vocabulary size for a training text, and the reason."""
    best: dict[int, float] = {}
    for size in _VOCABULARIES:
        text = _Text(text_bytes, text_bytes / _BYTES_PER_TOKEN[size], _LONG_DOCUMENTS, "")
        if size == _VOCABULARIES[0] or size * _BYTES_PER_ENTRY <= text_bytes:
            found = [_Plan.of(config, text, budget, speed) for config in _candidates(size, text, budget.parameters)]
            best[size] = min((plan.loss(text, law) for plan in found), default=math.inf)
    size = min(best, key=best.__getitem__)
    sizes = " and ".join(f"{each:,}" for each in (min(best), max(best)))
    reason = f"between {sizes}, which the text allows, the lowest loss by the scaling law in this time"
    return size, reason if len(best) > 1 else "the text is too short for more entries to be seen often enough"


def holdout_for(text_bytes: int | None) -> tuple[float, str]:
    """Return the share of a text that is held out, and the reason; None is a text of unknown size."""
    if text_bytes is None:
        return 0.01, "1 % of a text whose size is not known before it is read"
    share = _HELD_OUT / max(1, text_bytes)
    if share < 0.01:
        return 0.01, f"1 %, which is more than {_HELD_OUT:,} bytes"
    if share <= 0.1:
        return round(share, 3), f"about {_HELD_OUT:,} bytes"
    least = _LEAST_HELD_OUT / max(1, text_bytes)
    if least > 0.1:
        return round(min(0.5, least), 3), f"about {_LEAST_HELD_OUT} bytes, the least that measures anything"
    return 0.1, f"10 %, at most; {_HELD_OUT:,} bytes would be more"


def choose(train: SplitReport, vocab_size: int, budget: Budget, speed: Speed, law: Law = LAW) -> Choice:
    """Choose a recipe for a prepared text; RecipeError where no shape has about the wanted number of parameters."""
    text = _Text(train.bytes, train.tokens, *choose_context(train))
    candidates = list(_candidates(vocab_size, text, budget.parameters))
    if not candidates:
        least = parameters(shape(_WIDTHS[0], _LAYERS[0], vocab_size))
        most = parameters(shape(_WIDTHS[-1], _LAYERS[-1], vocab_size))
        advice = f"no shape has about so many parameters with {vocab_size:,} tokens; use {least:,} to {most:,}"
        raise RecipeError(str(Problem("--size", budget.parameters, advice)))
    plans = [_Plan.of(config, text, budget, speed) for config in candidates]
    plan = min(plans, key=lambda each: each.loss(text, law))
    return _recipe(plan, train, text, budget)


def choose_continuation(config: Gemma3Config, train: SplitReport, budget: Budget, speed: Speed) -> Choice:
    """Choose how a model that exists learns a prepared text (continued pretraining)."""
    text = _Text(train.bytes, train.tokens, *choose_context(train))
    if text.context > config.max_position_embeddings:
        text = text._replace(context=config.max_position_embeddings, why="the longest that the model can take")
    plan = _Plan.of(config, text, budget, speed)._replace(compiled=False)
    rate = _CONTINUED_RATE * (_CONTINUED_PARAMETERS / parameters(config)) ** 0.5
    table: dict[str, dict[str, Any]] = {
        "train": _train_table(plan, text, budget) | {"early_stopping": 4, "final_model": "best"},
        "optimizer": {"name": "adamw", "learning_rate": float(f"{rate:.1e}"), "weight_decay": 0.0},
        "schedule": {"name": "cosine", "warmup_share": 0.1, "final": 0.1},
    }
    reasons = _reasons(plan, text, budget) | {
        "optimizer.name": "the weights are good already: small steps for all of them, by one optimizer",
        "optimizer.learning_rate": f"{_CONTINUED_RATE:g} for {_CONTINUED_PARAMETERS:,.0f} parameters, and more for "
        f"fewer, by the square root; this model has {parameters(config):,}",
        "schedule.warmup_share": "the optimizer begins without memory",
    }
    return Choice(table, _given(reasons, table), plan.epochs, tuple(_warnings(train, plan.steps, budget)))


class _Text(NamedTuple):
    bytes: float
    tokens: float
    context: int
    why: str  # of the context


class _Plan(NamedTuple):
    """How a shape would be trained."""

    config: Gemma3Config
    batch_size: int
    compiled: bool
    steps: float
    epochs: float
    capped: bool  # by the epochs, before the time is up

    @classmethod
    def of(cls, config: Gemma3Config, text: _Text, budget: Budget, speed: Speed) -> "_Plan":
        """Train until the time is up, or until the text has been read often enough."""
        seconds, batch_size = 60 * budget.minutes, _TOKENS_PER_STEP[1] // text.context
        compiled = COMPILED * seconds > 2 * _COMPILE_SECONDS
        while True:
            steps = seconds / speed.step_seconds(config, batch_size, text.context, compiled)
            most = _MOST_EPOCHS * text.tokens / (batch_size * text.context)
            if min(steps, most) >= _STEPS or batch_size * text.context <= _TOKENS_PER_STEP[0]:
                break
            batch_size //= 2
        epochs = _MOST_EPOCHS * min(1.0, steps / most)
        return cls(config, batch_size, compiled, min(steps, most), epochs, steps > most)

    def loss(self, text: _Text, law: Law) -> float:
        """Return the predicted loss above the floor of the text."""
        seen = self.epochs * text.bytes
        return law.loss(block_parameters(self.config), self.config.vocab_size, seen, text.bytes)


def choose_context(train: SplitReport) -> tuple[int, str]:
    """Return the sequence length into which most documents fit, within bounds, and the reason."""
    if train.tokens <= 2 * _CONTEXTS[0]:
        return max(1, train.tokens // 2), f"half of the text, which has {train.tokens:,} tokens"
    fitting = 0
    for bound, count in zip(LENGTHS[1:], train.lengths, strict=False):
        fitting += count
        found = next((each for each in _CONTEXTS if bound <= each < train.tokens), None)
        if fitting >= _FITTING * train.kept and found:
            return found, f"at least {_FITTING:.0%} of the documents have at most so many tokens"
    return _LONG_DOCUMENTS, "most documents are longer than any context of the rule; they are read in parts"


def _candidates(vocab_size: int, text: _Text, wanted: int | None) -> Iterator[Gemma3Config]:
    """Yield the shapes that the text allows; where a number of parameters is wanted, those within a quarter of it."""
    smallest = True
    for width, layers in product(_WIDTHS, _LAYERS):
        if not _WIDTH_PER_LAYER[0] <= width / layers <= _WIDTH_PER_LAYER[1]:
            continue
        config = shape(width, layers, vocab_size)
        size = parameters(config)
        allowed = smallest or size <= _PARAMETERS_PER_BYTE * text.bytes
        if allowed if wanted is None else abs(size / wanted - 1) <= 0.25:
            yield config
        smallest = False


def _recipe(plan: _Plan, train: SplitReport, text: _Text, budget: Budget) -> Choice:
    config, steps, epochs = plan.config, plan.steps, plan.epochs
    dropout = next(rate for bound, rate in _DROPOUT if epochs <= bound)
    memory = min(20.0, max(5.0, steps / 150))
    stopping = {"early_stopping": 4, "final_model": "best"} if epochs > _REPEATED else {}
    table: dict[str, dict[str, Any]] = {
        "model": config.model_dump(exclude_unset=True, exclude={"vocab_size"}),
        "train": _train_table(plan, text, budget) | {"damp_branches": True} | stopping,
        "optimizer": {
            "name": "muon", "learning_rate": 0.01, "adamw_learning_rate": 0.01, "momentum": round(1 - 1 / memory, 3),
            "weight_decay": 0.1,
        },
        "schedule": {"name": "wsd", "warmup_share": 0.01, "decay_share": 0.5, "final": 0.0},
    }  # fmt: skip
    if dropout:
        table["model"]["dropout"] = dropout
    reasons = _reasons(plan, text, budget) | {
        "model.hidden_size": f"{parameters(config):,} parameters"
        + (
            ": of the shapes that the text allows, the lowest loss by the scaling law in this time"
            if budget.parameters is None
            else f", about the {budget.parameters:,} that were asked for"
        ),
        "model.dropout": f"about {epochs:.1f} epochs over the same text, as estimated",
        "optimizer.name": "Muon for the blocks' matrices, AdamW for embedding and norms: fewer steps to the same loss",
        "optimizer.momentum": f"averages about {memory:.0f} steps of about {steps:,.0f}, as estimated",
    }
    return Choice(table, _given(reasons, table), epochs, tuple(_warnings(train, steps, budget)))


def _train_table(plan: _Plan, text: _Text, budget: Budget) -> dict[str, Any]:
    every = max(1, round(plan.steps / _VALIDATIONS[budget.minutes > _SHORT]))
    return {
        "minutes": budget.minutes, "steps": math.ceil(plan.steps) if plan.capped else 100_000,
        "batch_size": plan.batch_size, "context": text.context, "validate_every": every, "checkpoint_every": every,
        "validation_tokens": 50_000, "log_every": max(1, every // 10), "compile": plan.compiled, "attention": "auto",
        "sample_tokens": 100,
    }  # fmt: skip


def _reasons(plan: _Plan, text: _Text, budget: Budget) -> dict[str, str]:
    ending = f"{plan.epochs:.0f} epochs of the text: later ones would memorize it"
    return {
        "train.minutes": "at most; train.steps ends the run before" if plan.capped else "as asked",
        "train.steps": ending if plan.capped else "more than fit into the minutes, by which they are counted",
        "train.batch_size": f"about {plan.steps:,.0f} steps, as estimated; a smaller batch makes noisier ones",
        "train.context": text.why,
        "train.compile": f"saves about {COMPILED:.0%} of a step and takes about {_COMPILE_SECONDS:.0f} s, as assumed",
        "train.validate_every": f"about {_VALIDATIONS[budget.minutes > _SHORT]} validations, as estimated",
        "train.early_stopping": f"about {plan.epochs:.1f} epochs, as estimated: the text is memorized at some point",
    }


def _given(reasons: dict[str, str], table: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the reasons of the settings that are set."""
    return {key: reason for key, reason in reasons.items() if key.partition(".")[2] in table[key.partition(".")[0]]}


def _warnings(train: SplitReport, steps: float, budget: Budget) -> Iterator[str]:
    if train.bytes < LITTLE_TEXT:
        yield (
            f"{train.bytes:,} bytes of text are enough to learn its characters and most frequent words, not to write "
            "new sentences; some hundred thousand are a start"
        )
    # A text that is read often enough in fewer steps is short, and longer training would not help.
    if steps < FEW_STEPS and train.bytes >= LITTLE_TEXT:
        minutes = math.ceil(budget.minutes * FEW_STEPS / steps)
        yield (
            f"only about {counted(round(steps), 'step')} of this model fit into the time on this machine, which teach "
            f"little: samples will hardly have words; use --minutes {minutes:,} or more"
        )
