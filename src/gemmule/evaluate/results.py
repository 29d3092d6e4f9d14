"""The results of evaluations: as JSON with every document, in sentences, compared, and kept in the run folder."""

import json
import logging
import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from gemmule.data.report import counted
from gemmule.errors import OutputError
from gemmule.evaluate.intervals import FEWEST, Difference, paired_difference, ratio_interval
from gemmule.evaluate.overlap import SPAN
from gemmule.evaluate.text import Mask, TextScores
from gemmule.files import atomic_write
from gemmule.run_folder import RunFolder

log = logging.getLogger(__name__)

VERSION = 1


def text_result(scores: TextScores, overlapping: Mask | None = None, share: float = 1.0) -> dict[str, Any]:
    """Return the figures of a text with their intervals, and each document in `items`.

    `overlapping` says which documents have a span in common with the training data, of which `share` was searched.
    """
    result = scores.figures() | {"dropped": scores.dropped, **_intervals(scores)}
    result |= {"context": scores.window.context, "stride": scores.window.stride}
    items = scores.items()
    if overlapping is not None:
        rest = scores.figures(~overlapping) if not overlapping.all() else None
        result["overlap"] = {
            "span": SPAN,
            "documents": int(overlapping.sum()),
            "searched": share,
            "without": rest and {name: rest[name] for name in ("loss", "bits_per_byte", "perplexity", "documents")},
        }
        items = [item | {"overlap": bool(hit)} for item, hit in zip(items, overlapping, strict=True)]
    return {**result, "items": items}


def _intervals(scores: TextScores) -> dict[str, Any]:
    loss = ratio_interval(scores.nats, scores.tokens)
    known = scores.lossless and scores.bytes.sum() > 0
    bits = ratio_interval(scores.nats / math.log(2), scores.bytes) if known else None
    perplexity = None if loss is None else tuple(math.exp(min(bound, 700.0)) for bound in loss)
    return {"intervals": {"loss": loss, "bits_per_byte": bits, "perplexity": perplexity}}


def compare(named: Mapping[str, TextScores], alike: bool) -> list[dict[str, Any]]:
    """Return the paired differences of all pairs of models, in bits per byte or, where not known, nats per token.

    `alike` says whether all have the same tokenizer: else only bits per byte compare, and there may be no measure.
    """
    lossless = all(scores.lossless and scores.bytes.sum() > 0 for scores in named.values())
    measure = "bits_per_byte" if lossless else "loss" if alike else None
    if measure is None:
        return []
    return [
        {"of": one, "to": other, "measure": measure, **_difference(named[one], named[other], measure)._asdict()}
        for one, other in combinations(named, 2)
    ]


def _difference(one: TextScores, other: TextScores, measure: str) -> Difference:
    if measure == "loss":
        return paired_difference((one.nats, other.nats), (one.tokens, other.tokens))
    return paired_difference((one.nats / math.log(2), other.nats / math.log(2)), (one.bytes, other.bytes))


def describe_text(result: Mapping[str, Any]) -> list[str]:
    """Put the figures of a text into sentences."""
    counts = (
        f"{counted(result['documents'], 'document')}, {counted(result['bytes'], 'byte')}, "
        f"{counted(result['tokens'], 'token')}"
    )
    sentences = [f"{counts}: {_measures(result, result['intervals'])}"]
    if result["ends"]["count"] and result["without_ends"]:
        ends = f"the ends of documents cost {result['ends']['loss']:.4f} nats each"
        sentences.append(f"{ends}; without them: {_measures(result['without_ends'])}")
    if result["intervals"]["loss"] is None:
        sentences.append(f"no interval: it needs {FEWEST} documents, here {_are(result['documents'])}")
    if overlap := result.get("overlap"):
        sentences.append(_describe_overlap(overlap, result["documents"]))
    return sentences


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _measures(figures: Mapping[str, Any], intervals: Mapping[str, Any] | None = None) -> str:
    def of(name: str, form: str) -> str:
        interval = (intervals or {}).get(name)
        return format(figures[name], form) + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")

    bits = [f"{of('bits_per_byte', '.4f')} bits per byte"] if figures["bits_per_byte"] is not None else []
    return ", ".join([f"{of('loss', '.4f')} nats per token", *bits, f"perplexity {of('perplexity', '.2f')}"])


def _describe_overlap(overlap: Mapping[str, Any], documents: int) -> str:
    searched = "" if overlap["searched"] == 1 else f" (the first {overlap['searched']:.0%} of it)"
    have = "has" if overlap["documents"] == 1 else "have"
    start = f"{overlap['documents']:,} of {counted(documents, 'document')} {have} a span of {overlap['span']} words in "
    start += f"common with the training data{searched}"
    if not overlap["documents"]:
        return start
    if overlap["without"] is None:
        return f"{start}: none is left without"
    return f"{start}; the other {overlap['without']['documents']:,}: {_measures(overlap['without'])}"


def describe_difference(difference: Mapping[str, Any], documents: int) -> str:
    """Put a paired difference into a sentence."""
    units = {"bits_per_byte": "bits per byte", "loss": "nats per token"}[difference["measure"]]
    value, interval, needed = difference["difference"], difference["interval"], difference["needed"]
    pair = f"{difference['of']} against {difference['to']}: {value:+.4f} {units}"
    if interval is None:
        return f"{pair}; no interval: it needs {FEWEST} documents, here {_are(documents)}"
    pair += f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    if difference["significant"]:
        return f"{pair}: {difference['of' if value < 0 else 'to']} is better"
    enough = "they predict the same" if needed is None else f"that would take about {counted(needed, 'document')}"
    return f"{pair}: no significant difference; {enough}"


def describe_stories(result: Mapping[str, Any]) -> list[str]:
    """Put what the stories of a suite show into sentences."""

    def rate(each: Mapping[str, Any]) -> str:
        low, high = each["interval"]
        return f"{each['hits']} ({low:.0%} to {high:.0%})"

    def mean(each: Mapping[str, Any], form: str = ".1f") -> str:
        return "not known" if each["mean"] is None else format(each["mean"], form)

    stories = "the one story" if result["stories"] == 1 else f"{result['stories']:,} stories"
    sentences = [
        f"of {stories}, {rate(result['ended'])} end; {rate(result['quotes_closed'])} close their quotation marks, "
        f"{rate(result['names_closed'])} bring no new name in the last third; {result['different']} are different",
        f"on average {mean(result['words'])} words, {mean(result['distinct_1'], '.0%')} of them and "
        f"{mean(result['distinct_2'], '.0%')} of their pairs different; the longest span that occurs again has "
        f"{mean(result['repeated_span'])} words",
    ]
    if result["copied_span"]["mean"] is not None:
        longest = max(item["copied_span"] for item in result["items"])
        sentences.append(
            f"the longest span copied from the training data has {mean(result['copied_span'])} words on average, "
            f"{longest} at most"
        )
    if book := result.get("storybook"):
        sentence = f"{rate(book['consistent'])} are whole and consistent; the storybook could have told "
        sentence += rate(book["possible"])
        if book["surprise"]["mean"] is not None:
            sentence += (
                f", whose surprise to it is {book['surprise']['mean']:.1f} nats (its entropy: {book['entropy']:.1f})"
            )
        sentences.append(sentence)
    return sentences


def keep(run: RunFolder, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Add a result to the evaluations of a run; one of the same key is replaced.

    The file is whole at any time and it alone is written, so that a run may be in training.
    Where it cannot be written, that is logged and no failure.
    """
    entry = {**key, **result}
    kept = [other for other in read_evaluations(run) if any(other.get(name) != key[name] for name in key)]
    try:
        with atomic_write(run.evaluation) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, "evaluations": [*kept, entry]}), encoding="utf-8")
    except OutputError as error:
        log.info(f"the result is not kept: {error}")


def read_evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """Return what was kept of the evaluations of a run, the newest last; none where the file is damaged."""
    try:
        found = json.loads(run.evaluation.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        log.info(f"{run.evaluation}: cannot be read, and is left out")
        return []
    entries = found.get("evaluations") if isinstance(found, dict) and found.get("version") == VERSION else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
