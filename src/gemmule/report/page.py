"""The report of one or several runs as one HTML page: sections in a fixed order, each with what there is."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import gemmule
from gemmule.data.report import TITLES
from gemmule.report.architecture_svg import architecture_svg, parameter_counts, tensor_shapes
from gemmule.report.charts import axes_of, draw_charts
from gemmule.report.figures import duration, figure, measures, memory_size
from gemmule.report.html import render_page
from gemmule.report.logs import Sample, is_number
from gemmule.report.summary import RunFacts, subtable
from gemmule.report.verdict import answers, best_validation, machine, verdict
from gemmule.train.metrics import REMEDIES

_MOST_LAYERS = 128  # that are drawn
_SHOWN_RECIPE = 20_000  # characters


class Row(NamedTuple):
    """A row of a table: a name, and a cell for each column."""

    name: str
    cells: Sequence[str]


class ShownMemorization(NamedTuple):
    """What of some generated texts occurs in the training text, beside held-out text."""

    rows: list[Row]
    sentence: str
    span: str  # the longest one that was copied


class ShownSample(NamedTuple):
    """A sample: pieces of its text, and whether each stayed as in the sample before."""

    sample: Sample
    pieces: list[tuple[str, bool]]
    cut: str  # what is said of the rest, where there is one


def report_page(runs: Sequence[RunFacts], live: bool = False) -> str:
    """Return the page of a report; a `live` one asks its server for news."""
    reason = compared_in_bits(runs)
    charts, taught = draw_charts(runs, bits_only=reason is not None)
    names = [facts.name for facts in runs]
    content = {
        "runs": runs,
        "names": names,
        "warnings": [*([reason] if reason else []), *_warnings(runs)],
        "verdicts": [verdict(facts) for facts in runs],
        "answers": _rows([answers(facts) for facts in runs]),
        "axes": axes_of(runs),
        "charts": charts,
        "taught": taught,
        "counts": [_counts(facts) for facts in runs],
        "samples": [_samples(facts) for facts in runs],
        "samples_left_out": [facts.logs.samples.left_out for facts in runs],
        "architectures": [_architecture(facts, number) for number, facts in enumerate(runs)],
        "data_rows": [_data_rows(facts) for facts in runs],
        "sources": [_source_rows(facts) for facts in runs],
        "evaluations": [_evaluations(facts) for facts in runs],
        "memorizations": [_memorizations(facts) for facts in runs],
        "plans": [_plan_rows(facts) for facts in runs],
        "certificates": [_certificates(facts) for facts in runs],
        "recipes": [_recipe(facts) for facts in runs],
        "differing": _differing(runs),
        "environments": [_environments(facts) for facts in runs],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": gemmule.__version__,
    }
    return render_page(
        "report.html",
        ", ".join(names),
        styles=("page.css", "report.css", "uPlot.min.css"),
        scripts=("uPlot.min.js", "report.js", *(("live.js",) if live else ())),
        data={"curves-data": {"charts": [chart.data for chart in (*charts, *taught)], "runs": names}},
        live=live,
        **content,
    )


def compared_in_bits(runs: Sequence[RunFacts]) -> str | None:
    """Say why runs are compared in bits per byte only; None where their losses can be compared."""
    if len(runs) < 2:
        return None
    known = {facts.tokenizer for facts in runs}
    if None in known:
        return "It is not known whether these runs have the same tokenizer, so they are compared in bits per byte only."
    if len(known) > 1:
        return (
            "These runs have different tokenizers: nats per token mean something else in each, so they are compared in "
            "bits per byte only."
        )
    return None


def _warnings(runs: Sequence[RunFacts]) -> Iterator[str]:
    texts = {str(subtable(facts.data, "validation")) for facts in runs if facts.data}
    if len(texts) > 1:
        yield "These runs were validated on different texts: differences between figures need not come from the models."
    for facts in runs:
        said, metrics = f"{facts.name}: ", facts.logs.metrics
        if not metrics.lines:
            yield f"{said}no metrics are logged yet."
        if facts.logs.damaged:
            yield f"{said}{facts.logs.damaged:,} lines of its logs could not be read."
        if metrics.not_finite:
            yield f"{said}{metrics.not_finite:,} logged values are NaN or infinite; the curves leave them out."
        if metrics.overlaps:
            yield f"{said}steps were logged again {metrics.overlaps:,} times; the newest count."
        if facts.overfits:
            yield f"{said}overfitting: {best_validation(facts)}, while the training loss fell; {REMEDIES}."
        if facts.recipe_text and not facts.recipe:
            yield f"{said}{facts.run.recipe.name} is no TOML that can be read."


def _rows(tables: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return the rows of tables with the same keys, one column each."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [Row(key, [table.get(key, "") for table in tables]) for key in keys]


def _counts(facts: RunFacts) -> str:
    metrics, skipped = facts.logs.metrics, int(facts.last.get("skipped_steps", 0))
    parts = (
        (metrics.lines, "logged step"),
        (metrics.validations, "validation"),
        (len(metrics.spikes), "spike"),
        (skipped, "skipped step"),
        (len(facts.resumes), "resume"),
    )
    return ", ".join(f"{count:,} {noun}{'' if count == 1 else 's'}" for count, noun in parts)


def _samples(facts: RunFacts) -> list[tuple[str, list[ShownSample]]]:
    return [(prompt, list(_shown(samples))) for prompt, samples in facts.logs.samples.prompts.items()]


def _shown(samples: Sequence[Sample]) -> Iterator[ShownSample]:
    before: list[str] | None = None
    for sample in samples:
        words = re.findall(r"\s+|[^\s]+", sample.text)
        pieces = [(sample.text, False)] if before is None else list(_changes(before, words))
        left = sample.characters - len(sample.text)
        yield ShownSample(sample, pieces, f"{left:,} more characters are left out" if left else "")
        before = words


def _changes(before: Sequence[str], words: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield pieces of a text, and whether each stayed as in the text before."""
    for kind, _, _, start, stop in difflib.SequenceMatcher(None, before, words, autojunk=False).get_opcodes():
        if stop > start:
            yield "".join(words[start:stop]), kind == "equal"


def _architecture(facts: RunFacts, number: int) -> dict[str, Any] | None:
    config = facts.config
    if config is None:
        return None
    counts = parameter_counts(config)
    return {
        "drawing": architecture_svg(config, f"architecture-{number}")
        if config.num_hidden_layers <= _MOST_LAYERS
        else "",
        "counts": [Row(name, [f"{count:,}", f"{count / sum(counts.values()):.1%}"]) for name, count in counts.items()],
        "total": f"{sum(counts.values()):,}",
        "tensors": [
            Row(each.name, [" x ".join(f"{size:,}" for size in each.shape), f"{each.layers:,}", f"{each.parameters:,}"])
            for each in tensor_shapes(config)
        ],
    }


def _data_rows(facts: RunFacts) -> list[Row]:
    splits = [subtable(facts.data, split) for split in ("train", "validation")]
    shown = []
    for title, key in TITLES.items():
        values = [split.get(key) for split in splits]
        if key == "bytes_per_token":
            values = [_ratio(split, "bytes", "tokens") for split in splits]
        if any(map(is_number, values)) and any(values):
            shown.append(Row(title.strip(), [figure(value, 3) if is_number(value) else "" for value in values]))
    return shown


def _source_rows(facts: RunFacts) -> list[Row]:
    listed = facts.data.get("sources")
    sources = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    keys = ("documents", "bytes", "tokens")
    return [
        Row(str(each.get("source")), [figure(each[key]) if is_number(each.get(key)) else "" for key in keys])
        for each in sources
    ]


def _evaluations(facts: RunFacts) -> list[tuple[str, list[Row]]]:
    shown = []
    for name, result in facts.evaluations.items():
        rows = [
            Row(each.name.replace("_", " "), [figure(each.value), figure(each.low), figure(each.high)])
            if each.low is not None
            else Row(each.name.replace("_", " "), [figure(each.value), "", ""])
            for each in measures(result)
        ]
        if rows:
            shown.append((name, rows))
    return shown


def _memorizations(facts: RunFacts) -> dict[str, ShownMemorization]:
    """Return the newest result of each model and suite."""
    shown = {}
    for result in facts.evaluations.values():
        found = subtable(result, "memorization")
        columns = [subtable(found, side) for side in ("generated", "held_out")]
        if not is_number(columns[0].get("share")):
            continue
        ngrams = f"{figure(found['ngram'])}-grams" if is_number(found.get("ngram")) else "n-grams"
        names = {"share": f"share of {ngrams}", "longest_span": "words of the longest span", "words": "words of text"}
        rows = [Row(name, [_memorization_cell(key, side.get(key)) for side in columns]) for key, name in names.items()]
        title = ", ".join(str(result[key]) for key in ("suite", "model") if result.get(key))
        span = columns[0].get("span")
        shown[title] = ShownMemorization(rows, _memorized(facts, found), span[:2000] if isinstance(span, str) else "")
    return shown


def _memorization_cell(key: str, value: Any) -> str:
    if not is_number(value):
        return ""
    return f"{value:.1%}" if key == "share" else figure(value)


def _memorized(facts: RunFacts, found: Mapping[str, Any]) -> str:
    """Say whether text that a model generates after several epochs is copied more than held-out text."""
    if facts.epochs is None or facts.epochs < 2:
        return ""
    more = found.get("more_than_held_out")
    after, than = f"After {figure(facts.epochs, 3)} epochs", "in common with the training text than held-out text has"
    if not isinstance(more, bool):
        return f"{after}, whether generated text has more {than} is not known: too little text was compared."
    if not more:
        return f"{after}, generated text has no more {than}."
    return f"{after}, generated text has more {than}: some of it is memorized."


def _plan_rows(facts: RunFacts) -> list[Row]:
    units = {"step_seconds": duration, "peak_memory": memory_size}
    predicted, measured = subtable(facts.plan, "predicted"), subtable(facts.plan, "measured")
    rows = []
    for key, value in measured.items():
        if not is_number(value):
            continue
        guess, words = predicted.get(key), units.get(key, figure)
        off = f"{guess / value - 1:+.0%}" if is_number(guess) and value else ""
        rows.append(Row(key.replace("_", " "), [words(guess) if is_number(guess) else "", words(value), off]))
    hours = facts.planned("hours")
    if hours and facts.hours is not None and facts.finished:
        whole = [duration(hours * 3600), duration(facts.hours * 3600), f"{hours / facts.hours - 1:+.0%}"]
        rows.append(Row("whole run", whole if facts.hours else [whole[0], "", ""]))
    return rows


def _certificates(facts: RunFacts) -> list[tuple[str, list[Row]]]:
    return [
        (name, [Row(key.replace("_", " "), [_said(value)]) for key, value in certificate.items()])
        for name, certificate in facts.certificates.items()
    ]


def _recipe(facts: RunFacts) -> str:
    left = len(facts.recipe_text) - _SHOWN_RECIPE
    return facts.recipe_text[:_SHOWN_RECIPE] + (f"\n# {left:,} more characters are left out here\n" if left > 0 else "")


def _differing(runs: Sequence[RunFacts]) -> list[Row]:
    """Return the settings in which the recipes of several runs differ."""
    tables = [
        {
            f"{section}.{key}": value
            for section, table in facts.recipe.items()
            if isinstance(table, dict)
            for key, value in table.items()
        }
        for facts in runs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [
        Row(key, [_said(table.get(key, "not set")) for table in tables])
        for key in keys
        if len({repr(table.get(key)) for table in tables}) > 1
    ]


def _environments(facts: RunFacts) -> list[Row]:
    keys = ("started", "step", "gemmule", "torch", "python", "system", "commit", "command")
    tables = [
        {key: _said(each[key]) for key in keys if key in each} | {"machine": machine(each)}
        for each in facts.environments
    ]
    return _rows(tables[-4:])


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(each)}" for key, each in value.items())[:2000]
    if isinstance(value, list):
        return ", ".join(map(_said, value))[:2000]
    return figure(value) if is_number(value) else str(value)[:2000]


def _ratio(table: Mapping[str, Any], above: str, below: str) -> float | None:
    one, other = table.get(above), table.get(below)
    return one / other if is_number(one) and is_number(other) and other else None
