"""Makes docs/results.md from run folders.

    python benchmarks/results.py --add runs/story runs/tinystories-cpu
    python benchmarks/results.py

`--add` copies what the page needs of each run folder into docs/results/NAME: recipe, environment, evaluation, report of
the data, plan, the last samples, the loss curves, and lines of metrics.jsonl, thinned to some hundred. What lies there
is a run folder itself, which `gemmule report docs/results/NAME` opens. Then the page is written from all of them. The
validation text of a run should be evaluated first: `gemmule evaluate RUN`.
"""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemmule.report.figures import figure
from gemmule.report.summary import RunFacts, read_run
from gemmule.report.verdict import headline, machine, parameter_count, verdict

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs/results"
PAGE = ROOT / "docs/results.md"

COPIED = ("recipe.toml", "environment.jsonl", "plan.json", "loss.svg", "data/report.json", "data/dataset.json")
_LINES = 300  # of metrics.jsonl
_ITEMS = "items"  # of an evaluation: one of each document

# Nats per token and bytes per token as published, and where.
PUBLISHED = (
    ("llama2.c 15M", 1.07, 3.75, "[llama2.c](https://github.com/karpathy/llama2.c)"),
    ("llama2.c 42M", 0.85, 3.75, "the same"),
    ("llama2.c 110M", 0.76, 3.75, "the same"),
)
_NATS_PER_BIT = 0.6931471805599453

INTRODUCTION = """# Results

Made from run folders by `python benchmarks/results.py`; what it reads is kept in `docs/results`,
and `gemmule report docs/results/story` shows one of them as a page. Times are those of the machine
that is named, and differ from day to day on hosted machines. Bits per byte do not depend on the
tokenizer, nats per token do. Those of the table are of `gemmule evaluate`, each document alone;
while it trains, a run validates rows that are cut from all documents together, which is a little
harder.
"""

PUBLISHED_NOTE = """## What others published on TinyStories

Nats per token of a vocabulary of 32,000 (3.75 bytes per token), validated on stories that are cut
to rows with an end-of-text token between them; divided by 3.75 and by ln 2 they are bits per byte,
to be compared with a run on TinyStories and not with one on the storybook. They were trained on all
of TinyStories, for hours on several GPUs; no interval was published.
"""


def add(run: Path, kept: Path) -> None:
    """Copy what the page needs of a run folder."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in COPIED:
        if (run / name).is_file():
            (kept / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(run / name, kept / name)
    _write_lines(kept / "metrics.jsonl", _thinned(_read_lines(run / "metrics.jsonl")))
    samples = _read_lines(run / "samples.jsonl") if (run / "samples.jsonl").is_file() else []
    _write_lines(kept / "samples.jsonl", [line for line in samples if line["step"] == samples[-1]["step"]])
    if (run / "evaluation.json").is_file():
        found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        for entry in found["evaluations"]:
            entry.pop(_ITEMS, None)
        (kept / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def results_page(runs: Sequence[RunFacts]) -> str:
    """Return docs/results.md of some runs."""
    columns = ("run", "parameters", "steps", "bits per byte", "95 % interval", "nats per token", "above the floor")
    lines = [INTRODUCTION, f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_row(facts))} |" for facts in runs]
    for facts in runs:
        lines += ["", *_section(facts)]
    lines += ["", PUBLISHED_NOTE, "| model | nats per token | bits per byte | source |", "|---|---|---|---|"]
    for name, nats, size, source in PUBLISHED:
        lines.append(f"| {name} | {nats:.2f} | {nats / size / _NATS_PER_BIT:.3f} | {source} |")
    return "\n".join(lines) + "\n"


def kept_runs() -> list[RunFacts]:
    """Return the runs that docs/results holds."""
    return [read_run(folder) for folder in sorted(KEPT.iterdir()) if folder.is_dir()]


def _row(facts: RunFacts) -> Iterator[str]:
    last, best = facts.last, headline(facts)
    bits, nats, interval = last.get("val_bits_per_byte"), last.get("val_loss"), "not measured"
    if best is not None and best[1].name == "bits_per_byte" and best[1].low is not None:
        bits, interval = best[1].value, f"{figure(best[1].low)} to {figure(best[1].high)}"
        nats = facts.evaluations[best[0]].get("loss")
    above = facts.above_floor
    yield f"[{facts.name}](#{facts.name})"
    yield figure(parameter_count(facts))
    yield figure(facts.step)
    yield figure(bits)
    yield interval
    yield figure(nats)
    yield "unknown" if above is None else f"{above:+.1%}"


def _section(facts: RunFacts) -> Iterator[str]:
    yield f"## {facts.name}"
    yield ""
    yield _wrapped(" ".join(verdict(facts)))
    yield ""
    yield f"- Machine: {machine(facts.environment)}"
    yield f"- Recipe, resolved: [recipe.toml](results/{facts.name}/recipe.toml)"
    yield f"- Command: `gemmule train docs/results/{facts.name}/recipe.toml --out runs/again`"
    if (facts.run.path / "loss.svg").is_file():
        yield ""
        yield f"![Loss of {facts.name} by step](results/{facts.name}/loss.svg)"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return evenly spaced lines, and all that were validated or begin or end the run."""
    every = max(1, len(lines) // _LINES)
    ends = (0, len(lines) - 1)
    return [line for number, line in enumerate(lines) if "val_loss" in line or number in ends or number % every == 0]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Add runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="RUN")
    options = parser.parse_args()
    for run in options.add:
        add(run, KEPT / run.resolve().name)
    PAGE.write_text(results_page(kept_runs()), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
