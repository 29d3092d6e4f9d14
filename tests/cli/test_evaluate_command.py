import json
import math
from pathlib import Path

import pytest

from gemmule.train.metrics import read_json_lines
from runs import gemmule


def evaluate(model: Path, data: object, *options: object) -> dict[str, float]:
    ended = gemmule("evaluate", model, "--data", data, "--json", *options)
    assert ended.code == 0, ended.err
    figures: dict[str, float] = json.loads(ended.out)
    return figures


def test_figures_are_consistent(tiny_run: Path, tiny_recipe: Path) -> None:
    data = tiny_recipe.parent / "valid.txt"
    figures = evaluate(tiny_run, data)
    assert set(figures) == {"loss", "bits_per_byte", "perplexity", "tokens", "bytes", "documents"}
    texts = [text.strip() for text in data.read_text().split("<|endoftext|>") if text.strip()]
    assert figures["documents"] == len(texts)
    assert figures["bytes"] == sum(len(text.encode()) for text in texts)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] / math.log(2) * figures["tokens"] / figures["bytes"]
    )


def test_a_text_costs_what_validation_said(tiny_run: Path, tiny_recipe: Path) -> None:
    last = read_json_lines(tiny_run / "metrics.jsonl")[-1]
    figures = evaluate(tiny_run, tiny_recipe.parent / "valid.txt")
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)


def test_how_many_rows_at_once_changes_nothing(tiny_run: Path, tiny_recipe: Path) -> None:
    data = tiny_recipe.parent / "valid.txt"
    one, many = (evaluate(tiny_run, data, "--batch-size", size) for size in (1, 7))
    assert one == pytest.approx(many, rel=1e-5)


def test_the_first_documents_alone(tiny_run: Path, tiny_recipe: Path) -> None:
    assert evaluate(tiny_run, tiny_recipe.parent / "valid.txt", "--documents", 5)["documents"] == 5


def test_the_storybook_is_a_text_too(tiny_run: Path) -> None:
    assert evaluate(tiny_run, "storybook:2")["documents"] == 2


def test_without_json_the_figures_are_told(tiny_run: Path, tiny_recipe: Path) -> None:
    ended = gemmule("evaluate", tiny_run, "--data", tiny_recipe.parent / "valid.txt")
    assert (ended.code, ended.out) == (0, "")
    assert "60 documents, 2,473 bytes" in ended.err
    assert "nats per token" in ended.err
