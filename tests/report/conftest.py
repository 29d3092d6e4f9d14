"""A browser that opens our pages."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, or another, driven by playwright; where one of them is missing the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def may_load() -> Callable[[str], bool]:
    """Whether a page may load an address besides its own; a module whose pages hold pictures replaces this."""
    return lambda url: url == "data:,"


@pytest.fixture
def open_page(browser: Any, may_load: Callable[[str], bool]) -> Iterator[Opened]:
    """Open a page; at the end, it has asked for nothing but itself, and its console is empty."""
    contexts, said, asked = [], list[str](), set[str]()

    def opened(address: Path | str, width: int = 1100, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        url = address.as_uri() if isinstance(address, Path) else address
        page.goto(url)
        asked.discard(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not may_load(url)} == set()
