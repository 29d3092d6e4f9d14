"""What tests of several packages share; tiny models are in `tiny.py`, so that torch is loaded only where needed."""

import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES

# A busy machine is not a failure.
settings.register_profile("gemmule", deadline=None)
settings.load_profile("gemmule")

# To models this small a second thread is no help, and on a busy machine the two wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# nohup and a shell's background jobs ignore these, and child processes would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A file that says of all its tests that they are slow; MARKS are those of the tests of parity.
ALL_SLOW = re.compile(r"^pytestmark = \[?\s*(?:pytest\.mark\.slow|\*?MARKS)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import for the quick tests what has none: such files load the largest libraries."""
    quick = config.getoption("markexpr") == "not slow" and collection_path.suffix == ".py"
    return True if quick and ALL_SLOW.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: a run that is stopped by a time limit prints no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else report.longreprtext[-2000:]
        print(f"\n{report.when} of {report.nodeid} failed: {message}", flush=True)  # noqa: T201


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What Gemmule logs in the test, from INFO up."""
    logged: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("gemmule")
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: drawing takes longer than a small preparation or run itself."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A vocabulary of 380 ids trained on a few sentences."""
    return train_tokenizer(SENTENCES, vocab_size=380)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that trains a small model in a second."""
    import runs

    return runs.write_recipe_file(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def tiny_training(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> tuple[Path, str]:
    """The run folder of `tiny_recipe`, trained to its end, and what was printed meanwhile."""
    import runs

    folder = tmp_path_factory.mktemp("run") / "tiny"
    ended = runs.gemmule("train", tiny_recipe, "--out", folder)
    assert ended.code == 0
    return folder, ended.err


@pytest.fixture(scope="session")
def tiny_run(tiny_training: tuple[Path, str]) -> Path:
    """The run folder of `tiny_recipe`, trained to its end; shared, so leave it as it is."""
    return tiny_training[0]


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
def may_say() -> Callable[[str], bool]:
    """Whether a page may write a line to its console; none, unless a module replaces this."""
    return lambda line: False


@pytest.fixture
def open_page(
    browser: Any, may_load: Callable[[str], bool], may_say: Callable[[str], bool]
) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end, it has asked for nothing but itself, and its console is empty."""
    contexts, said, asked = [], list[str](), set[str]()

    def opened(address: Path | str, width: int = 1100, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        context.set_default_timeout(120_000)  # milliseconds; a busy machine is not a failure
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
    assert [line for line in said if not may_say(line)] == []
    assert {url for url in asked if not may_load(url)} == set()
