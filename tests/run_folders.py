"""Run folders that were never trained, for tests of what is made of them."""

import json
import math
import random
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

RECIPE = """
[data]
train = ["storybook:40000"]
validation = ["storybook:500"]
license = "cc-by-4.0"

[tokenizer]
vocab_size = 3200

[model]
vocab_size = 3200
hidden_size = 128
intermediate_size = 512
num_hidden_layers = 4
sliding_window_pattern = 4
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 64
query_pre_attn_scalar = 64
sliding_window = 128

[train]
steps = {steps}
context = 256
"""

ENVIRONMENT = {
    "started": "2026-11-29T12:00:00+00:00", "step": 0, "gemmule": "0.1.0", "torch": "2.13.0", "python": "3.11.2",
    "system": "Linux-6.1", "processor": "Imaginary CPU 9000", "cores": 2, "memory": 25e9, "device": "cpu",
    "processes": 1, "commit": "1c60987b3fb11a8e096e4a448efbdfa527548721",
    "command": "gemmule train recipes/story.toml --out runs/story",
}  # fmt: skip


# As gemmule evaluate writes it.
EVALUATION = {
    "kind": "text", "model": "model", "data": "storybook:500", "limit": None, "context": 256, "stride": None,
    "loss": 0.63, "bits_per_byte": 0.212, "perplexity": 1.88, "tokens": 82_387, "bytes": 353_389, "documents": 500,
    "intervals": {"loss": [0.6243, 0.6357], "bits_per_byte": [0.2101, 0.2139], "perplexity": [1.87, 1.89]},
    "ends": {"count": 500, "loss": 0.003}, "items": [{"nats": 1.0}],
}  # fmt: skip


def write_evaluations(folder: Path, *results: dict[str, Any]) -> None:
    _write_json(folder / "evaluation.json", {"version": 1, "evaluations": results})


def metrics_lines(steps: int, seed: int = 0, floor: float | None = 0.6008) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run that falls towards the floor and is validated twenty times."""
    draw = random.Random(seed)
    every = max(1, steps // 20)
    for step in range(1, steps + 1):
        loss = 0.62 + 7.5 / (1 + step / 12)
        line = {
            "step": step, "tokens": step * 8143, "loss": loss + draw.gauss(0, 0.02),
            "grad_norm": 0.4 + draw.random() * 0.2, "lr": 0.02 * (1 - step / steps) + 1e-5,
            "tokens_per_second": 41_000 + draw.gauss(0, 500), "seconds": step * 0.2,
        }  # fmt: skip
        if step % every == 0:
            line |= {"val_loss": loss + 0.01, "val_bits_per_byte": loss * 0.34, "val_perplexity": math.exp(loss)}
            line |= {"val_floor": floor} if floor is not None else {}
        yield line


def write_lines(path: Path, lines: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def append_line(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_run(folder: Path, steps: int = 200, seed: int = 0, **recipe: str) -> Path:
    """Write a whole run folder, but for its model."""
    (folder / "data").mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(steps=steps), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metrics_lines(steps, seed))
    samples = [
        {"step": step, "prompt": "Once upon a time", "text": f"Once upon a time there were {step} owls."}
        for step in range(10, steps + 1, max(10, steps // 20))
    ]
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "environment.jsonl", [ENVIRONMENT])
    split = {"source": "storybook:40000", "read": 40_000, "kept": 40_000, "bytes": 28_186_518, "tokens": 6_604_158}
    held = {"source": "storybook:500", "read": 500, "kept": 500, "bytes": 353_389, "tokens": 82_887}
    _write_json(folder / "data" / "report.json", {"train": split, "validation": held, "sources": []})
    _write_json(folder / "data" / "dataset.json", {"fingerprint": recipe.get("tokenizer", "abc"), "settings": {}})
    plan = {"hours": steps * 0.1 / 3600, "kilowatt_hours": 0.01, "cost": 0.02}
    _write_json(
        folder / "plan.json",
        {
            "predicted": {"step_seconds": 0.1},
            "measured": {"step_seconds": 0.2},
            "off": {"step_seconds": -0.5},
            "plan": plan,
        },
    )
    write_evaluations(folder, EVALUATION)
    return folder


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """A page as a stranger's program reads it: text, tags with attributes, rows of tables by the id of the table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, dict[str, list[str]]] = {}
        self._open: list[str] = []
        self._table, self._cells = "", list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "link", "br", "input"):
            self._open.append(tag)
        if tag == "table":
            self._table = attributes.get("id") or ""
        if tag == "tr":
            self._cells = []
        if tag in ("td", "th"):
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is not what was open"
        if tag == "tr" and self._cells:
            self.rows.setdefault(self._table, {})[self._cells[0]] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.text += data
        if self._cells and ("td" in self._open or "th" in self._open):
            self._cells[-1] += data
