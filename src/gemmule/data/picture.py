"""report.png: how long the documents are, and what became of those that were read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmule.data.report import LABELS, LENGTHS, CorpusReport, SplitReport

_TRAIN, _VALIDATION, _KEPT, _DROPPED = "#1f4e8c", "#c0392b", "#2e7d32", "#b0b0b0"


def draw_report(report: CorpusReport, file: Path) -> bool:
    """Draw the report of a corpus; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    lengths, fates = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_lengths(lengths, report)
    _draw_fates(fates, report.train)
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return True


def _draw_lengths(axes: Any, report: CorpusReport) -> None:
    for split, color, name in ((report.train, _TRAIN, "train"), (report.validation, _VALIDATION, "validation")):
        shares = [count / split.kept for count in split.lengths]
        label = f"{name}: {split.kept:,} documents, {split.tokens:,} tokens"
        axes.stairs(shares, LENGTHS[: len(shares) + 1], color=color, label=label, linewidth=1.6, fill=False)
    counted = [report.train.lengths, report.validation.lengths]
    first = min(next(place for place, count in enumerate(lengths) if count) for lengths in counted)
    last = max(map(len, counted))
    axes.set_xscale("log", base=2)
    axes.set_xlim(LENGTHS[max(0, first - 1)], LENGTHS[min(last + 1, len(LENGTHS) - 1)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set(xlabel="tokens of a document", ylabel="share of the documents", title="lengths")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    _unbox(axes)


def _draw_fates(axes: Any, split: SplitReport) -> None:
    """Draw a bar for what was kept and for each reason to drop; on a logarithm, for some reasons are rare."""
    bars = [("kept", split.kept, _KEPT), ("held out", split.held_out, _VALIDATION)]
    reasons = {label: name for label, name in LABELS.items() if "dropped" in label}
    bars += [
        (label.strip().removeprefix("dropped: "), getattr(split, name), _DROPPED) for label, name in reasons.items()
    ]
    shown: Sequence[tuple[str, int, str]] = [bar for bar in bars if bar[1]][::-1]
    axes.barh([bar[0] for bar in shown], [bar[1] for bar in shown], color=[bar[2] for bar in shown], height=0.6)
    for place, (_, count, _) in enumerate(shown):
        axes.annotate(f" {count:,}", (count, place), va="center", fontsize="small")
    axes.set_xscale("log")
    axes.set_xlim(0.7, 20 * split.read)
    axes.set_ylim(-0.8, max(len(shown), 4) - 0.2)
    axes.set(xlabel="documents", title=f"{split.read:,} train documents were read")
    _unbox(axes)


def _unbox(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
