"""The page of `gemmule explain` in Debian's Chromium, driven by playwright: slow, since it starts a browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemmule.evaluate.explain import as_json, compare, explain
from gemmule.report.explain_page import explanation_page
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

pytestmark = pytest.mark.slow
Opened = Callable[..., Any]
TEXT = "Mia found a red kite.\n</script><b>The owl \U0001f984 said:\t\u202e\u0645\u0631\u062d\u0628\u0627 it is mine!"


@pytest.fixture
def may_load() -> Callable[[str], bool]:
    return lambda url: url.startswith("data:")


@pytest.fixture(scope="module")
def files(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pages of one model, and of two."""
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_position_embeddings=999)
    names = ("runs/story/checkpoints/step-00000100", "runs/story")
    explained = [explain(lively_model(config, seed=seed), tiny_tokenizer, TEXT, names[seed]) for seed in (0, 1)]
    folder = tmp_path_factory.mktemp("pages")
    values = [as_json(each) for each in explained]
    (folder / "one.html").write_text(explanation_page(values[:1]), encoding="utf-8")
    (folder / "two.html").write_text(explanation_page(values, as_json(compare(*explained))), encoding="utf-8")
    return [folder / "one.html", folder / "two.html"]


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_and_breaks_no_rule_of_accessibility(
    open_page: Opened, files: list[Path], width: int, scheme: str
) -> None:
    """axe-core: contrast of 4.5:1, names, landmarks, everything that scrolls reachable by keyboard, and the rest."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra browser is not installed")
    for file in files:
        page = open_page(file, width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()


def test_a_chosen_token_and_head_show_what_was_looked_at(open_page: Opened, files: list[Path]) -> None:
    for file in files:
        page = open_page(file)
        for panel in page.locator(".look").all():
            panel.locator("select").select_option("2 3")
            chosen = page.locator(f'.head.chosen[data-model="{panel.get_attribute("data-model")}"]')
            assert (chosen.get_attribute("data-layer"), chosen.get_attribute("data-head")) == ("2", "3")
            panel.locator(".t").nth(1).focus()
            page.keyboard.press("Enter")
            looked = panel.locator("[title]").all()
            assert 1 <= len(looked) <= 2, "itself and bos"
            assert sum(float(str(each.get_attribute("title"))[:-1]) for each in looked) == pytest.approx(100, abs=0.3)
            figure = page.locator(f'.head[data-model="{panel.get_attribute("data-model")}"]').first
            figure.focus()
            page.keyboard.press("Enter")
            assert panel.locator("select").input_value() == "0 0"


def test_without_javascript_it_is_whole(open_page: Opened, files: list[Path]) -> None:
    for file in files:
        page = open_page(file, java_script_enabled=False)
        assert page.locator(".look").locator("visible=true").count() == 0
        assert "Mia found a red kite" in page.locator(".reading").first.inner_text()
        page.locator("a.t").nth(5).click()
        row = page.locator("tr:target")
        assert row.is_visible()
        assert "%" in row.inner_text()
        assert page.locator(".head img").first.evaluate("image => image.naturalWidth") > 1


def test_it_prints_black_on_white_and_whole(open_page: Opened, files: list[Path]) -> None:
    page = open_page(files[0], color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".look").locator("visible=true").count() == 0
    script = "all => all.every(box => box.scrollHeight <= box.clientHeight + 1)"
    assert page.eval_on_selector_all(".tall", script), "nothing is left to be scrolled to"
    assert page.pdf().startswith(b"%PDF")
