"""The page in a real browser, Debian's Chromium driven by playwright: slow, since it starts one."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmule.report.page import report_page
from gemmule.report.summary import read_runs
from gemmule.report.watch import LOOPBACK, WatchServer
from run_folders import ENVIRONMENT, append_line, metrics_lines, write_lines, write_run

pytestmark = pytest.mark.slow
Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One run with everything that a page can show, and two to compare it with."""
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / name, 400, seed) for seed, name in enumerate(("one", "two", "three"))]
    lines = list(metrics_lines(400))
    lines[200] |= {"loss": 5.0, "spike": 1}
    for line in lines:
        line |= {"reward": line["step"] / 400, "memory": 2e9}
    write_lines(runs[0] / "metrics.jsonl", lines)
    write_lines(runs[0] / "environment.jsonl", [ENVIRONMENT, ENVIRONMENT | {"step": 100}])
    append_line(
        runs[0] / "samples.jsonl", {"step": 401, "prompt": "\u202eodd", "text": "</script> مرحبا " + "x" * 9000}
    )
    (runs[0] / "certificate.json").write_text('{"passed": true, "versions": {"torch": "2"}}')
    return runs


@pytest.fixture(scope="module")
def page_file(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page(read_runs(folders[:1])), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def three_file(folders: list[Path], page_file: Path) -> Path:
    file = page_file.with_name("three.html")
    file.write_text(report_page(read_runs(folders)), encoding="utf-8")
    return file


def wait_for(page: Any, selector: str, text: str) -> None:
    """Wait until an element shows a text; the page's policy forbids playwright's own way."""
    end = time.monotonic() + 120
    while text not in page.inner_text(selector):
        assert time.monotonic() < end, f"{text} is not shown"
        page.wait_for_timeout(100)


def shown(page: Any, selector: str) -> list[str]:
    """Return the ids or classes of the elements that are displayed."""
    script = "all => all.filter(each => each.checkVisibility()).map(each => each.id || each.className)"
    return list(page.eval_on_selector_all(selector, script))


@pytest.mark.parametrize("width", [360, 1100, 1900])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_and_breaks_no_rule_of_accessibility(
    open_page: Opened, page_file: Path, three_file: Path, width: int, scheme: str
) -> None:
    """axe-core: contrast of 4.5:1, names, landmarks, everything that scrolls reachable by keyboard, and the rest."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra browser is not installed")
    for file in (page_file, three_file):
        page = open_page(file, width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()


def test_charts_are_drawn_over_the_curves_of_the_page(open_page: Opened, page_file: Path) -> None:
    page = open_page(page_file)
    charts = page.evaluate("report.shown().map(({figure}) => figure.id)")
    assert charts == [
        "loss", "bits", "metric-lr", "metric-grad-norm", "metric-tokens-per-second", "metric-memory", "metric-reward",
    ]  # fmt: skip
    assert shown(page, ".drawing") == []
    assert len(shown(page, ".interactive")) == len(charts)
    page.check('input[value="tokens"]')
    assert page.evaluate("report.shown()[0].plot.scales.x.max") == 400 * 8143
    page.check('input[value="time"]')
    assert page.evaluate("report.shown()[0].plot.scales.x.max") == 80
    assert page.evaluate("Math.max(...report.shown()[0].plot.data[1].filter(y => y))") > 4.9, "the spike"


def test_without_javascript_it_is_whole(open_page: Opened, page_file: Path) -> None:
    page = open_page(page_file, java_script_enabled=False)
    drawings = page.locator(".drawing").locator("visible=true")
    assert drawings.count() == 7
    assert page.locator(".interactive").count() == 0
    assert page.locator(".scripted").locator("visible=true").count() == 0
    assert page.locator(".by-step").locator("visible=true").count() == 7
    page.check('input[value="tokens"]')
    assert page.locator(".by-tokens").locator("visible=true").count() == 1
    assert page.locator("#loss .by-step").locator("visible=true").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_prints_black_on_white_with_the_curves_of_the_page(
    open_page: Opened, page_file: Path, scheme: str, tmp_path: Path
) -> None:
    page = open_page(page_file, color_scheme=scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(shown(page, ".drawing")) == 7
    assert shown(page, ".interactive") == []
    assert shown(page, ".axes, .skip, .scripted") == []
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20


def test_the_keyboard_reaches_everything_and_moves_the_charts(open_page: Opened, page_file: Path) -> None:
    page = open_page(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        place = "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
        reached.add(page.evaluate(place))
    script = """() => {
        const all = [...document.querySelectorAll('*')];
        const wanted = all.filter(each => each.matches('input:checked, [tabindex="0"]') && each.checkVisibility());
        return wanted.map(each => all.indexOf(each));
    }"""
    assert set(page.evaluate(script)) <= reached
    chart = page.locator("#loss .interactive")
    chart.focus()
    whole = page.evaluate("[report.shown()[0].plot.scales.x.min, report.shown()[0].plot.scales.x.max]")
    page.keyboard.press("ArrowRight")
    before = chart.locator(".u-legend").inner_text()
    page.keyboard.press("ArrowRight")
    assert chart.locator(".u-legend").inner_text() != before
    page.keyboard.press("+")
    low, high = page.evaluate("[report.shown()[0].plot.scales.x.min, report.shown()[0].plot.scales.x.max]")
    assert high - low < 0.6 * (whole[1] - whole[0])
    page.keyboard.press("0")
    assert page.evaluate("[report.shown()[0].plot.scales.x.min, report.shown()[0].plot.scales.x.max]") == whole


def test_three_long_runs_are_drawn_within_a_second(
    open_page: Opened, page_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("long")
    runs = [write_run(root / str(number), 25_000, number) for number in range(3)]
    file = page_file.with_name("long.html")
    file.write_text(report_page(read_runs(runs)), encoding="utf-8")
    times = []
    for _ in range(3):  # the machine may be busy with something else
        page = open_page(file)
        assert page.evaluate("report.shown().length") >= 5
        page.evaluate("new Promise(requestAnimationFrame)")
        times.append(page.evaluate("performance.now()"))
    assert min(times) < 1000


def test_a_live_page_takes_what_is_new_and_keeps_what_the_reader_chose(
    folders: list[Path], browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemmule.report.watch._SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr("gemmule.report.watch._SHARE", 1e9)
    run = write_run(tmp_path / "run", 50)
    said = list[str]()
    with WatchServer([run], LOOPBACK, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        try:
            page.goto(server.address)
            page.check('input[value="tokens"]')
            page.locator("#loss .interactive").focus()
            write_lines(run / "metrics.jsonl", metrics_lines(80))
            wait_for(page, "main", "80 logged steps")
            assert page.is_checked('input[value="tokens"]')
            assert page.evaluate("report.shown()[0].plot.scales.x.max") == 80 * 8143
            assert page.evaluate("document.activeElement.closest('figure').id") == "loss"
            assert said == []
        finally:
            server.shutdown()
            thread.join()
    wait_for(page, ".live", "does not answer")
    assert "80 logged steps" in page.inner_text("main")
    page.close()
