"""README.md of a run's model folder: a Hub model card with what the run knows of it."""

import re
from collections.abc import Iterator
from pathlib import Path

from gemmule.formats.model_card import CardResult, hub_card
from gemmule.formats.opening import is_repository
from gemmule.report.figures import measures
from gemmule.report.summary import RunFacts
from gemmule.report.verdict import answers, verdict


def model_card(facts: RunFacts) -> str:
    """Return the model card of a run, in Markdown with front matter."""
    results = list(_results(facts))
    hub = ["/".join(re.split("[/:]", source)[1:3]) for source in facts.sources if source.startswith("hf:")]
    lines = [f"# {_plain(facts.name)}", "", _plain(" ".join(verdict(facts))), ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_plain(said)} |" for key, said in answers(facts).items()), ""]
    if results:
        lines += ["## Results", "", "| text | measure | value | 95 % from | to |", "|---|---|---|---|---|"]
        lines += [f"| {_plain(each.dataset)} | {_plain(each.metric)} | {_cells(each)} |" for each in results]
        lines.append("")
    lines += ["## Recipe", "", *(f"    {line}" for line in facts.recipe_text.splitlines()), ""]
    start = facts.setting("train", "start")
    base = str(start) if start and is_repository(Path(str(start))) else None
    return hub_card(facts.name, "\n".join(lines), base_model=base, datasets=hub, results=results)


def _results(facts: RunFacts) -> Iterator[CardResult]:
    """Yield the last validation, and what files of `gemmule evaluate` say."""
    text = facts.setting("data", "validation") or "held-out documents"
    name = ", ".join(map(str, text)) if isinstance(text, list) else str(text)
    for key in ("val_loss", "val_bits_per_byte", "val_perplexity"):
        if key in facts.last:
            yield CardResult(name, key.removeprefix("val_"), facts.last[key])
    for name, result in facts.evaluations.items():
        for each in measures(result):
            yield CardResult(name, each.name, each.value, each.low, each.high)


def _cells(result: CardResult) -> str:
    return " | ".join("" if value is None else f"{value:.5g}" for value in (result.value, result.low, result.high))


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>|#&" else letter for letter in text)
    return " ".join(escaped.split())
