import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from gemmule.evaluate.results import (
    compare,
    describe_difference,
    describe_text,
    keep,
    read_evaluations,
    text_result,
)
from gemmule.evaluate.text import Numbers, TextScores, Window
from gemmule.run_folder import RunFolder


def scores(nats: list[float], lossless: bool = True) -> TextScores:
    """Documents of 10 tokens, the last of which is an end that costs half a nat."""
    ones: Numbers = np.ones(len(nats))
    return TextScores(np.array(nats), ones * 10, ones * 40, ones / 2, Window(512), lossless)


def test_ends_of_documents_are_given_apart() -> None:
    figures = scores([5.0, 7.0]).figures()
    assert figures["loss"] == 0.6
    assert figures["bits_per_byte"] == pytest.approx(12 / 80 / math.log(2))
    assert figures["ends"] == {"count": 2, "loss": 0.5}
    assert figures["without_ends"]["loss"] == pytest.approx(11 / 18)
    assert figures["without_ends"]["bits_per_byte"] == pytest.approx(11 / 80 / math.log(2))
    assert figures["without_ends"]["tokens"] == 18


def test_every_document_is_in_the_result() -> None:
    result = text_result(scores([5.0, 7.0] * 10))
    assert result["items"][1] == {"nats": 7.0, "tokens": 10, "bytes": 40, "end_nats": 0.5}
    low, high = result["intervals"]["loss"]
    assert low < result["loss"] < high
    assert result["intervals"]["perplexity"] == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))
    assert json.loads(json.dumps(result)) is not None


def test_one_document_has_no_interval_and_that_is_said() -> None:
    result = text_result(scores([5.0]))
    assert result["intervals"] == {"loss": None, "bits_per_byte": None, "perplexity": None}
    assert "no interval: it needs 10 documents, here is 1" in describe_text(result)


def test_figures_without_the_documents_that_overlap_are_beside() -> None:
    overlapping = np.array([True, False, False, True])
    result = text_result(scores([5.0, 7.0, 8.0, 5.0]), overlapping, share=0.25)
    assert result["overlap"]["documents"] == 2
    assert result["overlap"]["without"]["loss"] == 0.75
    assert [item["overlap"] for item in result["items"]] == [True, False, False, True]
    said = describe_text(result)[-1]
    assert said.startswith("2 of 4 documents have a span of 13 words in common with the training data (the first 25%")
    assert "the other 2: 0.7500 nats per token" in said
    everything = text_result(scores([5.0]), np.array([True]))
    assert everything["overlap"]["without"] is None
    assert describe_text(everything)[-1].endswith("none is left without")


def test_models_are_compared_in_pairs() -> None:
    random = np.random.default_rng(0)
    base = random.normal(60, 10, 200)
    named = {
        "a": scores((base * random.normal(1, 0.02, 200)).tolist()),
        "b": scores((base * random.normal(1, 0.02, 200)).tolist()),
        "c": scores((base * random.normal(1.03, 0.02, 200)).tolist()),
    }
    found = {(each["of"], each["to"]): each for each in compare(named, alike=True)}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [each["significant"] for each in found.values()] == [False, True, True]
    assert {each["measure"] for each in found.values()} == {"bits_per_byte"}
    assert describe_difference(found["b", "c"], 200).endswith("b is better")
    assert "no significant difference; that would take about" in describe_difference(found["a", "b"], 200)
    assert "they predict the same" in describe_difference(compare({"a": named["a"], "d": named["a"]}, True)[0], 200)


def test_without_bytes_tokens_are_compared_where_the_tokenizer_is_one() -> None:
    named = {"a": scores([5.0] * 20, lossless=False), "b": scores([6.0] * 20)}
    assert compare(named, alike=False) == []
    (found,) = compare(named, alike=True)
    assert (found["measure"], found["significant"], found["difference"]) == ("loss", True, pytest.approx(-0.1))


def test_results_of_a_run_are_kept_and_replaced_by_newer_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    keep(run, {"kind": "text", "data": "a"}, {"loss": 1.0})
    keep(run, {"kind": "text", "data": "b"}, {"loss": 2.0})
    keep(run, {"kind": "text", "data": "a"}, {"loss": 3.0})
    expected = [{"kind": "text", "data": "b", "loss": 2.0}, {"kind": "text", "data": "a", "loss": 3.0}]
    assert read_evaluations(run) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "content", ["", "[1", "[]", '{"version": 9, "evaluations": [{}]}', '{"version": 1}', "[" * 9999]
)
def test_a_damaged_file_of_results_is_left_out(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.evaluation.write_text(content)
    assert read_evaluations(run) == []
    keep(run, {"kind": "text"}, {"loss": 1.0})
    assert read_evaluations(run) == [{"kind": "text", "loss": 1.0}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(tmp_path: Path, messages: list[str]) -> None:
    tmp_path.chmod(0o500)
    keep(RunFolder(tmp_path), {"kind": "text"}, {"loss": 1.0})
    assert messages[-1].startswith("the result is not kept: ")
