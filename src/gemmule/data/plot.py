"""report.png: a histogram of document lengths, and a bar chart of documents kept and dropped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmule.data.report import LENGTHS, TITLES, CorpusReport, SplitReport, counted

_TRAIN, _VALIDATION, _KEPT, _DROPPED = "#1f4e8c", "#c0392b", "#2e7d32", "#b0b0b0"


def plot_report(report: CorpusReport, file: Path) -> bool:
    """Plot the report of a corpus to a PNG file; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    lengths, counts = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_lengths(lengths, report)
    _plot_counts(counts, report.train)
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return True


def _plot_lengths(axes: Any, report: CorpusReport) -> None:
    for split, color, name in ((report.train, _TRAIN, "train"), (report.validation, _VALIDATION, "validation")):
        shares = [count / split.kept for count in split.lengths]
        label = f"{name}: {counted(split.kept, 'document')}, {split.tokens:,} tokens"
        axes.stairs(shares, LENGTHS[: len(shares) + 1], color=color, label=label, linewidth=1.6, fill=False)
    both = [report.train.lengths, report.validation.lengths]
    first = min(next(index for index, count in enumerate(lengths) if count) for lengths in both)
    last = max(map(len, both))
    axes.set_xscale("log", base=2)
    axes.set_xlim(LENGTHS[max(0, first - 1)], LENGTHS[min(last + 1, len(LENGTHS) - 1)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set(xlabel="tokens of a document", ylabel="share of the documents", title="lengths")
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    _style(axes)


def _plot_counts(axes: Any, split: SplitReport) -> None:
    """Plot the documents kept and those dropped per reason, on a logarithmic axis, since some reasons are rare."""
    bars = [("kept", split.kept, _KEPT), ("held out", split.held_out, _VALIDATION)]
    reasons = {label: name for label, name in TITLES.items() if "dropped" in label}
    bars += [
        (label.strip().removeprefix("dropped: "), getattr(split, name), _DROPPED) for label, name in reasons.items()
    ]
    shown: Sequence[tuple[str, int, str]] = [bar for bar in bars if bar[1]][::-1]
    axes.barh([bar[0] for bar in shown], [bar[1] for bar in shown], color=[bar[2] for bar in shown], height=0.6)
    for row, (_, count, _) in enumerate(shown):
        axes.annotate(f" {count:,}", (count, row), va="center", fontsize="small")
    axes.set_xscale("log")
    axes.set_xlim(0.7, 20 * split.read)
    axes.set_ylim(-0.8, max(len(shown), 4) - 0.2)
    axes.set(xlabel="documents", title=f"{split.read:,} train document{'s were' if split.read != 1 else ' was'} read")
    _style(axes)


def _style(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
