"""The page in Chromium, driven by playwright, from file:// and without a network: slow, since it starts a browser."""

import functools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import gemmule
from gemmule.formats import page
from gemmule.formats.page import save_page, save_site
from gemmule.inference.quantize import quantize
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE, render_chat
from tiny import lively_model, tiny_config

pytestmark = pytest.mark.slow
Opened = Callable[..., Any]

# Large enough for a reply that is still being written when it is stopped.
CONFIG = tiny_config(vocab_size=400, hidden_size=64, intermediate_size=256, max_position_embeddings=4096)


@pytest.fixture
def may_load() -> Callable[[str], bool]:
    """The Worker, and the parts of a folder."""
    return lambda url: url.startswith(("blob:", "data:")) or url.endswith(".bin")


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(tiny_tokenizer._document, {"chat_template": CHAT_TEMPLATE})


@pytest.fixture(scope="module")
def folder(chat_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of several parts, the same as a folder, and a page without a chat."""
    folder = tmp_path_factory.mktemp("page")
    model = lively_model(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "EMBEDDED_PART", 300_000)
        patch.setattr(page, "FETCHED_PART", 300_000)
        save_page(model, chat_tokenizer, folder / "story.html", "int8", "A <b>story</b>", None)
        save_site(model, chat_tokenizer, folder / "site", "int8", "story", None)
    return folder


@pytest.fixture
def site(folder: Path) -> Iterator[str]:
    """The address of a web server that hands out the folder."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None: ...  # noqa: A002

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder / "site"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


def until(opened: Any, condition: Callable[[], bool]) -> None:
    """Wait; the page's policy forbids playwright's own way."""
    for _ in range(600):
        if condition():
            return
        opened.wait_for_timeout(50)
    raise AssertionError(opened.inner_text("body"))


def ready(opened: Any) -> Any:
    until(opened, lambda: opened.is_enabled("#go"))
    return opened


def generated(opened: Any, **settings: object) -> str:
    """Set controls, generate, and return the text with its prompt."""
    for name, value in settings.items():
        opened.fill(f"#{name}", str(value))
    opened.click("#go")
    until(opened, lambda: opened.is_enabled("#go"))
    return str(opened.evaluate("document.getElementById('reply').textContent"))


def expected(tokenizer: Tokenizer, prompt: str, **settings: Any) -> str:
    """What `gemmule generate --int8` prints."""
    events = gemmule.generate(quantize(lively_model(CONFIG)), tokenizer, prompt, **settings)
    return prompt + "".join(event.text for event in events)


def problem_of(opened: Any) -> str:
    until(opened, lambda: opened.is_visible("#problem"))
    return str(opened.inner_text("#problem"))


def test_it_tells_what_the_engine_tells(open_page: Opened, folder: Path, chat_tokenizer: Tokenizer) -> None:
    opened = ready(open_page(folder / "story.html", offline=True))
    assert opened.inner_text("h1") == "A <b>story</b>"
    prompt = "The cat 🦄 <end_of_turn>"
    greedy = generated(opened, prompt=prompt, temperature=0, max_tokens=60)
    assert greedy == expected(chat_tokenizer, prompt, temperature=0, max_new_tokens=60)
    drawn = generated(opened, temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=7)
    rules = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 7}
    assert drawn == expected(chat_tokenizer, prompt, max_new_tokens=60, **rules)
    assert generated(opened) == drawn, "the same seed"
    assert generated(opened, seed=8) != drawn
    assert "tokens per second, seed 8" in opened.inner_text("#status")
    stop = drawn[len(prompt) + 5 : len(prompt) + 7]
    assert not {"\n", "\r"} & {*stop}
    opened.fill("#stop-texts", stop)
    assert generated(opened, seed=7) == expected(chat_tokenizer, prompt, max_new_tokens=60, stop=[stop], **rules)


def test_stop_ends_a_reply(open_page: Opened, folder: Path) -> None:
    """How many tokens come after it depends on the machine; test_html_page.py counts those of the runtime."""
    opened = ready(open_page(folder / "story.html"))
    opened.fill("#max_tokens", "4000")
    opened.fill("#seed", "3")
    # By the page itself, when the first token is shown: playwright may come when the reply has ended by itself.
    press = """() => {
        const shown = answers.token;
        answers.token = (message) => { answers.token = shown; shown(message); byId("stop").click(); };
        document.getElementById("go").click();
    }"""
    opened.evaluate(press)
    until(opened, lambda: opened.is_enabled("#go"))
    assert opened.inner_text("#status").startswith("stopped: ")
    assert generated(opened, max_tokens=5).startswith("Once upon a time"), "and it goes on"


def test_it_works_from_the_keyboard_alone(open_page: Opened, folder: Path) -> None:
    opened = ready(open_page(folder / "story.html"))
    opened.focus("#prompt")
    opened.keyboard.press("Control+A")
    opened.keyboard.type("The dog")
    opened.keyboard.press("Control+Enter")
    until(opened, lambda: opened.is_enabled("#go"))
    assert opened.inner_text("#reply").startswith("The dog")
    opened.fill("#max_tokens", "4000")
    opened.focus("#prompt")
    opened.keyboard.press("Control+Enter")
    opened.keyboard.press("Escape")
    until(opened, lambda: opened.is_enabled("#go"))
    assert opened.inner_text("#status").startswith("stopped")


def test_it_chats(open_page: Opened, folder: Path, chat_tokenizer: Tokenizer) -> None:
    opened = ready(open_page(folder / "story.html"))
    opened.click("#chat-mode")
    for name, value in {"temperature": 0, "max_tokens": 12}.items():
        opened.fill(f"#{name}", str(value))
    said: list[dict[str, str]] = []
    for message in ("Hi", " Tell me <start_of_turn> more "):
        opened.fill("#message", message)
        opened.keyboard.press("Control+Enter")
        until(opened, lambda: opened.is_enabled("#go"))
        replies = opened.locator(".turn.model .reply")
        reply = replies.nth(replies.count() - 1).evaluate("each => each.textContent")
        said.append({"role": "user", "content": message})
        assert reply == chat_reply(chat_tokenizer, said, 12)
        said.append({"role": "assistant", "content": reply})
    opened.click("#new-chat")
    assert opened.locator(".turn").count() == 0


def chat_reply(tokenizer: Tokenizer, messages: list[dict[str, str]], tokens: int) -> str:
    from gemmule.inference.engine import reply_to_all, stop_tokens
    from gemmule.inference.requests import Request
    from gemmule.inference.sampling import SamplingSettings

    prompt, stops = render_chat(tokenizer, messages, reply=True).ids, stop_tokens(tokenizer)
    request = Request(tuple(prompt), tokens, SamplingSettings(temperature=0), 0, stops=stops)
    return tokenizer.decode(reply_to_all(quantize(lively_model(CONFIG)), [request])[0])


def test_it_computes_where_workers_are_refused(open_page: Opened, folder: Path, tmp_path: Path) -> None:
    text = (folder / "story.html").read_text(encoding="utf-8")
    refused = tmp_path / "story.html"
    refused.write_text(text.replace("worker-src blob:", "worker-src &#39;none&#39;"), encoding="utf-8")
    one = generated(ready(open_page(folder / "story.html")), seed=5, max_tokens=50)
    opened = open_page(refused)
    assert generated(ready(opened), seed=5, max_tokens=50) == one


@pytest.fixture
def may_say(request: pytest.FixtureRequest) -> Callable[[str], bool]:
    """What a browser itself says of a policy that refuses Workers, and of a file that is missing."""
    allowed = {
        "test_it_computes_where_workers_are_refused": "Content Security Policy",
        "test_a_folder_is_fetched_and_checked": "404",
    }
    return lambda line: allowed.get(request.node.name, "\0") in line


def test_a_folder_is_fetched_and_checked(open_page: Opened, folder: Path, site: str) -> None:
    told = generated(ready(open_page(folder / "story.html")), seed=5, max_tokens=50)
    assert generated(ready(open_page(site)), seed=5, max_tokens=50) == told
    parts = sorted((folder / "site").glob("model-*.bin"))
    assert len(parts) > 1
    whole = parts[1].read_bytes()
    try:
        parts[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        problem = problem_of(open_page(site))
        assert problem.startswith(f"Part 2 of {len(parts)} of the model ({parts[1].name}) is damaged;")
        parts[1].unlink()
        problem = problem_of(open_page(site))
        assert problem == f"Part 2 of {len(parts)} of the model ({parts[1].name}) is missing: the server answers 404."
    finally:
        parts[1].write_bytes(whole)


def test_a_folder_without_a_server_says_what_it_needs(open_page: Opened, folder: Path) -> None:
    assert "python3 -m http.server" in problem_of(open_page(folder / "site" / "index.html"))


def damaged(folder: Path, change: Callable[[str], str]) -> Path:
    file = folder / "damaged.html"
    file.write_text(change((folder / "story.html").read_text(encoding="utf-8")), encoding="utf-8")
    return file


def flip(text: str, marker: str) -> str:
    """Change a letter of base64."""
    at = text.index(marker) + len(marker) + 1000
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


def test_every_damage_is_a_sentence(open_page: Opened, folder: Path) -> None:
    count = (folder / "story.html").read_text(encoding="utf-8").count('id="part-')
    part, again = f"Part 2 of {count} of the model", "copy the page again, or export it again."
    damages: dict[str, Callable[[str], str]] = {
        f"{part} is damaged; {again}": lambda text: flip(text, 'id="part-1">'),
        f"{part} is missing; {again}": lambda text: text[: text.index('<script type="text/plain" id="part-1"')],
        f"The end of this page is missing; {again}": lambda text: text[
            : text.index('<script type="text/plain" id="wasm"')
        ],
        f"This page is damaged; {again}": lambda text: flip(text, 'id="wasm">'),
    }
    for sentence, change in damages.items():
        opened = open_page(damaged(folder, change))
        assert problem_of(opened) == sentence
        assert opened.is_disabled("#go")


def test_every_bad_input_is_a_sentence(open_page: Opened, folder: Path) -> None:
    opened = ready(open_page(folder / "story.html"))
    opened.fill("#prompt", "  ")
    opened.click("#go")
    assert problem_of(opened) == "The prompt is empty: write how the text begins."
    opened.fill("#prompt", "cat " * 5000)
    opened.click("#go")
    until(opened, lambda: "this model reads fewer than 4096: shorten it." in opened.inner_text("#problem"))
    opened.fill("#prompt", "cat")
    opened.fill("#top_p", "2")
    opened.click("#go")
    assert problem_of(opened).startswith("Top p: ")
    opened.fill("#top_p", "1")
    assert generated(opened, max_tokens=3).startswith("cat")
    assert not opened.is_visible("#problem")


def test_no_simd_is_a_sentence(browser: Any, folder: Path) -> None:
    context = browser.new_context()
    context.add_init_script("WebAssembly.validate = () => false;")
    opened = context.new_page()
    opened.goto((folder / "story.html").as_uri())
    assert problem_of(opened).startswith("This browser cannot compute with vectors in WebAssembly")
    context.close()


@pytest.mark.parametrize("width", [320, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_and_breaks_no_rule_of_accessibility(
    open_page: Opened, folder: Path, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra browser is not installed")
    opened = ready(open_page(folder / "story.html", width, color_scheme=scheme))
    generated(opened, max_tokens=100)
    for mode in ("#text-mode", "#chat-mode"):
        opened.click(mode)
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        results = axe.Axe().run(opened)
        assert results.violations_count == 0, results.generate_report()
