"""The page answers a stranger, opens with what there is, and is never led by what a run wrote."""

import json
import math
import re
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gemmule.report.html import embedded_json, render_page
from gemmule.report.page import report_page
from gemmule.report.summary import RunError, read_run, read_runs
from run_folders import (
    ENVIRONMENT,
    EVALUATION,
    Page,
    append_line,
    metrics_lines,
    write_evaluations,
    write_lines,
    write_run,
)

SECTIONS = ["verdict", "curves", "samples", "architecture", "data", "evaluation", "plan", "certificate", "repeat"]


def page_of(*folders: Path, live: bool = False) -> str:
    return report_page(read_runs(folders), live=live)


def curves_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="curves-data">(.*?)</script>', html)
    assert found is not None
    return {chart["id"]: chart for chart in json.loads(found[1])["charts"]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "story")


def test_a_stranger_with_only_the_file_has_ten_answers(run: Path) -> None:
    answers = {question: cells[0] for question, cells in Page(page_of(run)).rows["answers"].items()}
    assert "1,395,328 parameters" in answers["What"]
    assert "3 local with a window of 128 tokens, 1 global" in answers["What"]
    assert "storybook:40000; 40,000 documents, 28.2 MB of text" in answers["From what"]
    assert re.search(r"After all 200 steps: .* 0\.\d+ bits per byte", answers["How well"])
    assert "0.2120 (95 % interval 0.2101 to 0.2139) on storybook:500" in answers["How sure"]
    assert re.search(r"0\.6008 nats per token.*% above", answers["Floor"])
    assert "40 seconds of training on Imaginary CPU 9000" in answers["Cost"]
    assert "about 0.020 kWh, about $0.04" in answers["Cost"]  # the plan's, for twice its hours
    assert answers["Machine"] == "Imaginary CPU 9000, 2 cores, 25 GB of memory, 1 process"
    assert str(ENVIRONMENT["commit"]) in answers["Commit"]
    assert answers["Command"].startswith("gemmule train recipe.toml")
    assert answers["License of the data"] == "cc-by-4.0"
    assert len(answers) == 10


def test_the_verdict_is_three_sentences(run: Path) -> None:
    html = page_of(run)
    assert "<title>story</title>" in html
    text = unescape(re.search(r'class="verdict">(.*?)</p>', html, re.DOTALL)[1])  # type: ignore[index]
    assert len(re.findall(r"\.(?= [A-Z]|$)", text)) == 3
    assert "1.4 million parameters, trained from random weights on 1.63 million tokens of storybook:40000" in text


def test_a_run_that_started_from_a_model_says_so(run: Path) -> None:
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("[train]", '[train]\nstart = "runs/<b>other"'))
    html = page_of(run)
    assert "trained from the weights of runs/&lt;b&gt;other on" in html
    assert "random weights" not in html


def test_sections_come_in_the_order_that_was_promised(run: Path) -> None:
    tags = Page(page_of(run)).tags
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == SECTIONS
    append_line(run / "metrics.jsonl", {"step": 201, "loss": 1.0, "reward": 0.5})
    tags = Page(page_of(run)).tags
    taught = [*SECTIONS[:6], "taught", *SECTIONS[6:]]
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == taught


def test_the_page_asks_for_nothing(run: Path) -> None:
    html = page_of(run)
    for tag, attributes in Page(html).tags:
        assert not {"src", "srcset", "action", "style", "onclick"} & attributes.keys(), tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:,")), attributes
    policy = str(next(each["content"] for tag, each in Page(html).tags if each.get("http-equiv")))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in unescape(page_of(run, live=True))


HOSTILE = [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u202eright to left\u202c مرحبا", "\0\x01",
    "{{ 7 * 7 }}{% raw %}", "x" * 10_000_000, "\U0001f984\u2028\u2029",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_text_of_models_and_data_is_never_markup(run: Path, text: str) -> None:
    tags = Page(page_of(run)).tags
    write_lines(run / "samples.jsonl", [{"step": step, "prompt": text[:100], "text": text} for step in (1, 2)])
    append_line(run / "metrics.jsonl", {"step": 201, "loss": 1.0, text[:100]: 1.0})
    write_evaluations(run, EVALUATION | {text[:100]: 1.0, "data": text[:100]})
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(
        recipe.replace('"storybook:40000"', json.dumps(text[:100].replace("\0\x01", ""), ensure_ascii=False))
    )
    html = page_of(run)
    page = Page(html)
    assert len(html) < 400_000
    assert "{{ 7 * 7 }}" in html or "7 * 7" not in text
    shown = text[:2000].replace("\0", "\ufffd")
    assert shown in page.text
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in tags].count("script")
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in tags} | {"br"} - {"br"}
    if len(text) > 2000:
        assert "9,998,000 more characters are left out" in page.text


def test_names_of_folders_are_no_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<b>&'\"")
    page = Page(page_of(run, write_run(tmp_path / "other")))
    assert "a<b>&'\"" in page.text
    assert "b" not in {tag for tag, _ in page.tags}


def test_json_inside_a_page_ends_no_script() -> None:
    assert str(embedded_json({"a": "</script>&", "b": [math.nan, math.inf]})) == (
        '{"a":"\\u003c/script\\u003e\\u0026","b":[null,null]}'
    )


def test_lone_surrogates_end_as_question_marks() -> None:
    assert "<title>a?b</title>" in render_page("base.html", "a\ud800b")


@pytest.mark.parametrize(
    "missing",
    [
        "recipe.toml",
        "metrics.jsonl",
        "samples.jsonl",
        "plan.json",
        "environment.jsonl",
        "evaluation.json",
        "data",
        ".plain",
    ],
)
@pytest.mark.parametrize("how", ["missing", "empty", "damaged"])
def test_a_page_opens_with_what_there_is(run: Path, missing: str, how: str) -> None:
    if missing == "data":
        files = list((run / "data").iterdir())
    else:
        files = [run / missing] if (run / missing).exists() else [each for each in run.iterdir() if each.is_file()]
    if missing == ".plain":
        files.remove(run / ("recipe.toml" if how == "missing" else "plan.json"))
    for file in files:
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(b"" if how == "empty" else file.read_bytes()[:57] + b"\xff\0[{" * 5)
    page = Page(page_of(run))
    assert len(page.rows["answers"]) == 10
    assert [each["id"] for tag, each in page.tags if tag == "section"] == SECTIONS


# As gemmule evaluate writes it.
MEMORIZATION: dict[str, Any] = {
    "texts": 20, "ngram": 8, "searched": 1.0, "more_than_held_out": True,
    "generated": {"share": 0.312, "words": 900, "ngrams": 800, "copied_ngrams": 250, "longest_span": 24,
                  "span": "<b>once there was a fox"},
    "held_out": {"share": 0.12, "words": 900, "ngrams": 800, "copied_ngrams": 96, "longest_span": 17, "span": ""},
    "difference": {"difference": 0.192, "interval": [0.1, 0.3], "significant": True, "needed": 10},
}  # fmt: skip

SHAPES: list[Any] = [None, 1, "x", [], {}, [1], {"a": {"b": [1]}}, True, -1e999, [[["x"]]]]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_json_of_any_shape_is_passed_over(run: Path, shape: Any) -> None:
    """What another version may write: every value of every file replaced by something else."""
    for file in ("plan.json", "data/report.json", "data/dataset.json"):
        table = json.loads((run / file).read_text())
        (run / file).write_text(json.dumps(dict.fromkeys(table, shape)))
    odd: list[dict[str, Any]] = [MEMORIZATION | {key: shape} for key in MEMORIZATION]
    odd += [MEMORIZATION | {"generated": {"share": 0.5} | {key: shape}} for key in MEMORIZATION["generated"]]
    results = [EVALUATION | {"memorization": each, "model": str(number)} for number, each in enumerate([shape, *odd])]
    results += [dict.fromkeys(EVALUATION, shape), EVALUATION | {"intervals": shape, "ends": shape}]
    write_evaluations(run, *results)
    write_lines(run / "environment.jsonl", [dict.fromkeys(ENVIRONMENT, shape)] * 2)
    (run / "certificate.json").write_text(json.dumps({"passed": shape}))
    keys = next(metrics_lines(1)) | {"val_loss": 0, "val_floor": 0, "spike": 1, "skipped_steps": 1}
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 1.0}, dict.fromkeys(keys, shape) | {"step": 2}])
    write_lines(run / "samples.jsonl", [dict.fromkeys(("step", "prompt", "text"), shape)])
    assert len(Page(page_of(run)).rows["answers"]) == 10


@pytest.mark.parametrize("section", ["data", "model", "train", "tokenizer"])
@pytest.mark.parametrize("value", ["1", '"x"', "[]", "{}", '{steps = "x", train = 3, vocab_size = -1}'])
def test_recipes_of_another_version_are_shown(run: Path, section: str, value: str) -> None:
    (run / "recipe.toml").write_text(f"{section} = {value}\n[[odd]]\n")
    page = Page(page_of(run))
    assert f"{section} = {value}" in page.text


def test_evaluations_are_shown_with_their_intervals(run: Path) -> None:
    rate = {"rate": 0.94, "hits": 94, "count": 100, "interval": [0.87, 0.97]}
    stories = {"kind": "stories", "model": "model", "suite": "stories", "ended": rate, "words": {"mean": 81.5}}
    write_evaluations(run, EVALUATION, stories | {"storybook": {"consistent": rate}, "items": []})
    rows = Page(page_of(run)).rows[""]
    assert rows["bits per byte"] == ["0.2120", "0.2101", "0.2139"]
    assert rows["ends: loss"] == ["0.003000", "", ""]
    assert rows["ended"] == rows["storybook: consistent"] == ["0.9400", "0.8700", "0.9700"]
    assert rows["words"] == ["81.50", "", ""]


def epochs(run: Path, tokens: int) -> None:
    """Make the training text of so many tokens, of which the run has seen 1.6 million."""
    report = json.loads((run / "data" / "report.json").read_text())
    report["train"]["tokens"] = tokens
    (run / "data" / "report.json").write_text(json.dumps(report))


def test_what_was_memorized_is_shown_beside_held_out_text(run: Path) -> None:
    write_evaluations(run, EVALUATION | {"memorization": MEMORIZATION})
    page = Page(page_of(run))
    assert page.rows[""]["in the training text"] == ["generated text", "held-out text"]
    assert page.rows[""]["share of 8-grams"] == ["31.2%", "12.0%"]
    assert page.rows[""]["words of the longest span"] == ["24", "17"]
    assert "<b>once there was a fox" in page.text
    assert "Memorization, model" in page.text
    assert "epochs, generated text" not in page.text, "a quarter of an epoch"
    assert not any("memorization" in name or "generated" in name for name in page.rows[""])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            True,
            "generated text has more in common with the training text than held-out text has: some of it is memorized.",
        ),
        (False, "generated text has no more in common with the training text than held-out text has."),
        (None, "whether generated text has more in common with the training text than held-out text has is not known"),
    ],
)
def test_after_several_epochs_it_is_said_whether_it_is_more(run: Path, more: bool | None, said: str) -> None:
    epochs(run, 100_000)
    write_evaluations(run, EVALUATION | {"memorization": MEMORIZATION | {"more_than_held_out": more}})
    assert f"After 16.3 epochs, {said}" in Page(page_of(run)).text


def test_the_newest_memorization_of_a_model_is_shown(run: Path) -> None:
    older = {"kind": "memorization", "model": "model", "memorization": MEMORIZATION}
    newer = EVALUATION | {"memorization": MEMORIZATION | {"generated": {"share": 0.5}}}
    suite = {"kind": "stories", "model": "model", "suite": "stories", "memorization": MEMORIZATION}
    write_evaluations(run, older, suite, newer)
    text = Page(page_of(run)).text
    assert text.count("Memorization, model") == text.count("Memorization, stories, model") == 1
    assert "50.0%" in text


def overfit(run: Path, last: int = 100) -> None:
    """Let the run validate every 10 steps, best at step 50, 20 % worse from step 60 on, and train well to the last."""
    lines = [{"step": step, "tokens": 100 * step, "loss": 4 - step / 30} for step in range(1, last + 1)]
    for line in lines[9::10]:
        line["val_loss"] = 4 - line["step"] / 50 if line["step"] <= 50 else 3.6
    write_lines(run / "metrics.jsonl", lines)


def test_of_a_run_that_overfits_the_best_and_the_last_validation_are_named_and_what_helps(run: Path) -> None:
    overfit(run)
    page = Page(page_of(run))
    best = "alidation was best at step 50 (3 nats per token); the last one is 20% worse"
    assert f"v{best} (overfitting)" in page.rows["answers"]["How well"][0]
    assert page.text.count(f"V{best}.") == 1, "the caption of the loss"
    (warning,) = re.findall(r"story: overfitting: .*", page.text)
    assert f"v{best}, while the training loss fell; more text, dropout (model.dropout) or fewer steps" in warning
    assert "train.early_stopping" in warning
    assert 'train.final_model = "best"' in warning
    compared = Page(page_of(run, write_run(run.parent / "other"))).text
    assert f"story: v{best}." in compared
    assert "other: validation was best" not in compared


def test_one_worse_validation_is_no_overfitting(run: Path) -> None:
    overfit(run, last=70)
    text = Page(page_of(run)).text
    assert "the last one is 20% worse" in text
    assert "overfitting" not in text


def test_a_run_that_stopped_early_is_said_to_be_over(run: Path) -> None:
    overfit(run)
    recipe = (run / "recipe.toml").read_text()
    stopping = '\nearly_stopping = 5\nvalidate_every = 10\nfinal_model = "best"\n'
    (run / "recipe.toml").write_text(recipe.replace("[train]", f"[train]{stopping}"))
    said = Page(page_of(run)).rows["answers"]["How well"][0]
    assert said.startswith("After 100 of at most 200 steps, ended by early stopping: ")
    assert "best at step 50 (3 nats per token), whose weights the model has; the last one is 20% worse" in said
    overfit(run, last=90)
    said = Page(page_of(run)).rows["answers"]["How well"][0]
    assert said.startswith("After 90 of 200 steps: ")
    assert "whose weights" not in said


def test_without_evaluations_it_is_said_that_no_interval_is_known(run: Path) -> None:
    write_evaluations(run, EVALUATION | {"intervals": {"loss": None, "bits_per_byte": None}})
    answers = Page(page_of(run)).rows["answers"]
    assert "no interval is known: one run, one seed, one validation text over 500 documents" in answers["How sure"][0]


def test_nan_and_infinity_are_left_out_and_counted(run: Path) -> None:
    lines = list(metrics_lines(100))
    lines[50]["loss"], lines[60]["grad_norm"], lines[99]["val_loss"] = math.nan, math.inf, math.nan
    write_lines(run / "metrics.jsonl", lines)
    page = page_of(run)
    assert "3 logged values are NaN or infinite" in Page(page).text
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_just_begun_is_shown(run: Path, steps: int) -> None:
    write_lines(run / "metrics.jsonl", list(metrics_lines(100))[:steps])
    page = Page(page_of(run))
    assert ("no metrics are logged yet" in page.text) == (steps == 0)


def test_spikes_skipped_steps_and_resumes_are_marked(run: Path) -> None:
    lines = list(metrics_lines(200))
    lines[120] |= {"loss": 9.0, "spike": 1}
    lines[150] = {key: lines[150][key] for key in ("step", "tokens", "seconds", "lr")} | {"skipped_steps": 1}
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "environment.jsonl", [ENVIRONMENT, ENVIRONMENT | {"step": 60}, ENVIRONMENT | {"step": 90}])
    html = page_of(run)
    marks = {mark["kind"]: mark for mark in curves_of(html)["loss"]["marks"]}
    assert (marks["spike"]["step"], marks["spike"]["y"]) == ([121], [9.0])
    assert (marks["skipped"]["step"], marks["resume"]["step"]) == ([151], [60, 90])
    assert "200 logged steps, 20 validations, 1 spike, 1 skipped step, 2 resumes" in Page(html).text
    assert html.count('class="mark spike"') == 3  # by step, tokens and time
    assert "resumed 2 times" in Page(html).rows["answers"]["Cost"][0]


def test_runs_are_laid_over_each_other_by_step_tokens_and_time(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, steps) for name, steps in (("one", 200), ("two", 120))]
    html = page_of(*folders)
    series = {each["name"]: each for each in curves_of(html)["loss"]["series"]}
    assert set(series) == {f"{name}, {what}" for name in ("one", "two") for what in
                           ("training", "training, smoothed", "validation")} | {"entropy floor"}  # fmt: skip
    own = series["two, training"]
    assert (own["step"][-1], own["tokens"][-1], own["time"][-1]) == (120, 120 * 8143, 24.0)
    assert len(re.findall(r'class="drawing scroll by-(step|tokens|time)" [^>]*Loss by', html)) == 3
    assert Page(html).rows["answers"]["What"][0].startswith("one: ")
    assert "train.steps" in Page(html).text


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte_only(tmp_path: Path) -> None:
    same = [write_run(tmp_path / name) for name in ("a", "b")]
    other = write_run(tmp_path / "c", tokenizer="def")
    assert "loss" in curves_of(page_of(*same))
    html = page_of(*same, other)
    assert "bits per byte only" in Page(html).text
    assert "loss" not in curves_of(html)
    assert {each["name"] for each in curves_of(html)["bits"]["series"]} == {f"{name}, validation" for name in "abc"}
    (other / "data" / "dataset.json").unlink()
    assert "not known whether" in Page(page_of(*same, other)).text


def test_runs_that_were_validated_on_different_texts_are_significant(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    assert "different texts" not in page_of(*folders)
    report = json.loads((folders[1] / "data" / "report.json").read_text())
    report["validation"]["bytes"] += 1
    (folders[1] / "data" / "report.json").write_text(json.dumps(report))
    assert "validated on different texts" in page_of(*folders)


def test_runs_of_one_name_are_significant(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [facts.name for facts in read_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("what", ["nothing", "file", "other", "model"])
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "runs"
    if what == "file":
        folder.write_text("")
    elif what in ("other", "model"):
        folder = write_run(tmp_path / "runs") / "data" if what == "model" else folder
        folder.mkdir(exist_ok=True)
    with pytest.raises(RunError, match=re.escape(str(folder))):
        read_run(folder)


@pytest.mark.slow  # writes 150,000 lines of metrics first
def test_a_long_report_of_three_runs_is_quick_and_small_and_keeps_every_spike(tmp_path: Path) -> None:
    folders = []
    for number in range(3):
        folders.append(write_run(tmp_path / f"run-{number}", 25_000, seed=number))
        lines = list(metrics_lines(25_000, seed=number))
        for step in (7001 + number, 20_001):
            lines[step - 1] |= {"loss": 6.5 + number, "spike": 1}
        write_lines(folders[-1] / "metrics.jsonl", lines)
    began = time.process_time()
    html = page_of(*folders)
    assert time.process_time() - began < 3
    assert len(html.encode()) < 1_500_000
    series = {each["name"]: each for each in curves_of(html)["loss"]["series"]}
    for number in range(3):
        own = series[f"run-{number}, training"]
        spikes = [step for step, loss in zip(own["step"], own["y"], strict=True) if loss > 6 and step > 5000]
        assert spikes == [7001 + number, 20_001]
