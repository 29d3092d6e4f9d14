"""What a stranger asks of a run, answered from its facts: a verdict in three sentences, and ten questions."""

import math
from collections.abc import Mapping
from typing import Any

from gemmule.report.architecture_svg import parameter_counts
from gemmule.report.figures import Measure, duration, figure, large, measures, memory_size
from gemmule.report.logs import is_number
from gemmule.report.summary import RunFacts, subtable

NOT_RECORDED = "not recorded by this run"


def verdict(facts: RunFacts) -> list[str]:
    """Return three sentences: what was trained from what, how well and how sure, at what cost."""
    tokens = facts.last.get("tokens")
    size = f" of {large(parameters)} parameters" if (parameters := parameter_count(facts)) else ""
    amount = f"{large(tokens)} tokens" if tokens else "no token yet"
    first = f"{facts.name} is a Gemma 3{size}, trained {_first_weights(facts)} on {amount} of {_sources(facts)}"
    return [f"{first}.", f"{progress(facts)}, {_quality(facts)}.", f"{_cost(facts)}."]


def answers(facts: RunFacts) -> dict[str, str]:
    """Return the answers to ten questions, in the order in which a page shows them."""
    return {
        "What": _what(facts),
        "From what": _from_what(facts),
        "How well": f"{progress(facts)}: {_quality(facts)}",
        "How sure": how_sure(facts),
        "Floor": _floor(facts),
        "Cost": _cost(facts),
        "Machine": machine(facts.environment),
        "Commit": _commit(facts.environment),
        "Command": "gemmule train recipe.toml --out runs/again, with the recipe below as recipe.toml",
        "License of the data": facts.license or "not given (the setting data.license is where to give it)",
    }


def parameter_count(facts: RunFacts) -> int | None:
    """Return the number of parameters of the model."""
    return sum(parameter_counts(facts.config).values()) if facts.config else None


def progress(facts: RunFacts) -> str:
    """Say how far a run is."""
    steps = facts.number("train", "steps")
    if not facts.step:
        return "Before its first logged step"
    if facts.finished:
        return f"After all {facts.step:,} steps"
    if steps is not None and facts.stopped_early:
        return f"After {facts.step:,} of at most {int(steps):,} steps, ended by early stopping"
    known = steps is not None and facts.setting("train", "minutes") is None
    return f"After {facts.step:,} of {int(steps):,} steps" if known and steps else f"After {facts.step:,} steps"


def headline(facts: RunFacts) -> tuple[str, Measure] | None:
    """Return the newest bits per byte of an evaluation, or else another figure that has an interval, and of what."""
    newest = reversed(facts.evaluations.items())
    found = [(name, each) for name, result in newest for each in measures(result)]
    known = [pair for pair in found if pair[1].low is not None] or found
    return next((pair for pair in known if pair[1].name == "bits_per_byte"), None) or next(iter(known), None)


def how_sure(facts: RunFacts) -> str:
    """Say what interval the figures have, or how to get one."""
    best = headline(facts)
    if best is not None and best[1].low is not None:
        name, measure = best
        return f"{measure.name.replace('_', ' ')} {measure.text} on {name}; one run, one seed"
    text = subtable(facts.data, "validation")
    amount = f" over {figure(text.get('kept'))} documents" if is_number(text.get("kept")) else ""
    return f"no interval is known: one run, one seed, one validation text{amount}; gemmule evaluate measures one"


def machine(environment: Mapping[str, Any]) -> str:
    """Describe the machine of an environment."""
    if not environment:
        return NOT_RECORDED
    device, processes = environment.get("device"), environment.get("processes")
    parts = [str(environment.get("processor") or "unknown processor")]
    if is_number(cores := environment.get("cores")):
        parts.append(f"{cores} core{'s' * (cores != 1)}")
    if is_number(memory := environment.get("memory")):
        parts.append(f"{memory_size(memory)} of memory")
    if device and device != "cpu":
        parts.append(str(device))
    if is_number(processes):
        parts.append(f"{processes} process{'es' * (processes != 1)}")
    return ", ".join(parts)


def _what(facts: RunFacts) -> str:
    config = facts.config
    if config is None:
        return "A Gemma 3, whose shape is not recorded"
    kinds, context = config.layer_kinds, facts.number("train", "context")
    trained = f", trained on sequences of {context:,} tokens" if context else ""
    return (
        f"A Gemma 3 of {figure(parameter_count(facts))} parameters: {len(kinds)} layers ({kinds.count('local')} local "
        f"with a window of {config.sliding_window:,} tokens, {kinds.count('global')} global), {config.hidden_size:,} "
        f"wide, {config.vocab_size:,} tokens of vocabulary{trained}; {_first_weights(facts)}"
    )


def _first_weights(facts: RunFacts) -> str:
    start = facts.setting("train", "start")
    return "from random weights" if start is None else f"from the weights of {start}"


def _sources(facts: RunFacts) -> str:
    return ", ".join(facts.sources) or "text that is not recorded"


def _from_what(facts: RunFacts) -> str:
    text = subtable(facts.data, "train")
    parts = [_sources(facts)]
    if all(is_number(text.get(key)) for key in ("kept", "bytes", "tokens")):
        parts.append(f"{text['kept']:,} documents, {memory_size(text['bytes'])} of text, {text['tokens']:,} tokens")
        if facts.epochs:
            parts.append(f"{figure(facts.epochs, 3)} epochs were trained on")
    return "; ".join(parts)


def _quality(facts: RunFacts) -> str:
    last = facts.last
    if "val_loss" not in last:
        loss = f"; the last training loss is {figure(last['loss'])} nats per token" if "loss" in last else ""
        return f"it was not validated{loss}"
    text, bits = subtable(facts.data, "validation"), last.get("val_bits_per_byte")
    documents = f" of {text['kept']:,} documents" if is_number(text.get("kept")) else ""
    loss = f"{figure(last['val_loss'])} nats per token"
    sentence = f"it predicts validation text{documents} at " + (
        f"{figure(bits)} bits per byte ({loss})" if bits is not None else loss
    )
    above = facts.above_floor
    if above is not None:
        sentence += f", {above:.1%} above the floor that no model can beat"
    if best := best_validation(facts):
        sentence += f"; {best}{' (overfitting)' if facts.overfits else ''}"
    interval = headline(facts)
    known = interval is not None and interval[1].low is not None
    if interval is not None and known:
        return f"{sentence}; evaluated on {interval[0]}: {interval[1].name.replace('_', ' ')} {interval[1].text}"
    return f"{sentence}; no interval is known"


def best_validation(facts: RunFacts) -> str | None:
    """Say at which step validation was best, and how much worse the last one is; None where it is the best."""
    best = facts.logs.metrics.best
    if best is None or not facts.worse:
        return None
    said = f"validation was best at step {best['step']:,} ({figure(best['val_loss'])} nats per token)"
    if facts.setting("train", "final_model") == "best" and (facts.finished or facts.stopped_early):
        said += ", whose weights the model has"
    return f"{said}; the last one is {figure(100 * facts.worse, 2)}% worse"


def _floor(facts: RunFacts) -> str:
    if facts.floor is None:
        return "unknown: the entropy of this text is not known, as it is of the storybook"
    above = facts.above_floor
    beside = "" if above is None else f"; the last validation is {above:.1%} above it"
    return f"{figure(facts.floor)} nats per token, the entropy of the validation text{beside}"


def _cost(facts: RunFacts) -> str:
    seconds = facts.last.get("seconds")
    if seconds is None:
        return "The time it took is not recorded"
    environment = facts.environment
    place = f" on {environment['device']}" if environment.get("device") not in (None, "cpu") else ""
    if not place and environment.get("processor"):
        place = f" on {environment['processor']}"
    processes = environment.get("processes")
    many = f" in {processes} processes" if is_number(processes) and processes > 1 else ""
    resumes = f", resumed {len(facts.resumes)} time{'s' * (len(facts.resumes) > 1)}" if facts.resumes else ""
    energy, price = facts.in_proportion("kilowatt_hours"), facts.in_proportion("cost")
    parts = [f"about {figure(energy, 2)} kWh"] if energy and math.isfinite(energy) else []
    parts.append(f"about ${price:,.2f}" if price else "no price is known for this machine")
    return f"It took {duration(seconds)} of training{place}{many}{resumes}; {', '.join(parts)}"


def _commit(environment: Mapping[str, Any]) -> str:
    if not environment:
        return NOT_RECORDED
    commit = environment.get("commit") or "no git checkout"
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("gemmule", "torch", "python") if name in environment
    )
    return f"{commit} ({versions})"
