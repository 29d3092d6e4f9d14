"""What tests of the server's page in a browser do with it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Served

Opened = Callable[..., Any]


def opened(open_page: Opened, served: Served, width: int = 1280, **options: Any) -> Any:
    page = open_page(f"{served.server.address}/", width, **options)
    page.wait_for_selector("body[data-ready]")
    page.set_default_timeout(15_000)
    page.locator("#settings-box").evaluate("box => { box.open = true; }")
    setting(page, "seed", "5")
    return page


def write(page: Any, text: str, tokens: int = 12) -> None:
    """Write a text and let the model continue it."""
    setting(page, "max_tokens", str(tokens))
    page.click("#editor")
    page.keyboard.press("Control+End")
    page.keyboard.type(text)
    proceed(page)


def setting(page: Any, name: str, value: str) -> None:
    page.fill(f"#settings [name={name}]", value)
    page.dispatch_event(f"#settings [name={name}]", "change")


def proceed(page: Any) -> None:
    page.keyboard.press("Control+Enter")
    finish(page)


def finish(page: Any) -> None:
    page.wait_for_selector("#go:not(:disabled)")
    for _ in range(100):
        if page.inner_text("#status"):
            break
        page.wait_for_timeout(20)
    page.wait_for_selector("#stop:disabled")


def text_of(page: Any) -> str:
    return str(page.evaluate("document.getElementById('editor').textContent"))


def word(page: Any, number: int) -> Any:
    """Return a token of the model that shows a letter; nonsense has parts of characters, too."""
    return page.locator("#editor .t").filter(has_text=re.compile("[A-Za-z]")).nth(number)


def change_requests(page: Any, **fields: Any) -> None:
    """Send fields that the page does not."""

    def changed(route: Any) -> None:
        route.continue_(post_data=json.dumps(route.request.post_data_json | fields))

    page.route("**/v1/completions", changed)


def branches(page: Any) -> int:
    return int(page.locator("#branches button").count())


def export(page: Any) -> Any:
    if not page.locator("#export").is_visible():
        page.click(".menu summary")
    with page.expect_download() as found:
        page.click("#export")
    return json.loads(Path(found.value.path()).read_text(encoding="utf-8"))


def check_accessible(page: Any, width: int) -> None:
    """Check that the page fits its width, and breaks no rule of axe-core; skips the test where that is missing."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra browser is not installed")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
