"""The server's page in Debian's Chromium, driven by playwright: slow, since it starts a browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from page_driver import (
    Opened,
    branches,
    change_requests,
    check_accessible,
    export,
    finish,
    opened,
    proceed,
    setting,
    text_of,
    word,
    write,
)
from serving import Served, serving

from gemmule.train.checkpoint import checkpoints

pytestmark = pytest.mark.slow
KEY = "sk-gemmule-1234"
SCRIPT = "<script>document.title='bad'</script><img src=x onerror=document.title=1>"


def test_a_text_is_continued_and_yours_differs_from_the_models(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    write(page, "Mia found\na red kite")
    assert text_of(page).startswith("Mia found\na red kite")
    assert page.locator("#editor .t").count() == 12
    assert page.inner_text("#editor .yours") == "Mia found\na red kite"
    assert "12 tokens" in page.inner_text("#status")
    assert "Context left" in page.inner_text("#figures")
    before = text_of(page)
    proceed(page)
    assert text_of(page).startswith(before)
    assert page.locator("#editor .t").count() == 24


def test_escape_stops_and_what_came_is_kept(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    change_requests(page, min_tokens=3000)
    setting(page, "max_tokens", "4000")
    page.click("#editor")
    page.keyboard.type("Mia")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#editor .t >> nth=20", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop:disabled")
    count = page.locator("#editor .t").count()
    assert 20 < count < 3900
    assert f"Stopped after {count} tokens" in page.inner_text("#status")
    for _ in range(100):
        if not stage.server.service.replies:
            break
        page.wait_for_timeout(20)
    assert not stage.server.service.replies, "the server let go of it"


def test_an_alternative_taken_by_mouse_begins_a_branch_and_the_old_one_is_found_again(
    open_page: Opened, stage: Served
) -> None:
    page = opened(open_page, stage)
    write(page, "Mia")
    first = text_of(page)
    word(page, 2).click()
    page.click("#token button:not([aria-current]):not(:disabled)")
    finish(page)
    second = text_of(page)
    assert second != first
    assert page.locator("#editor .chosen").count() == 1
    assert branches(page) == 2
    page.locator("#branches button").first.click()
    assert text_of(page) == first
    page.keyboard.press("Alt+PageDown")
    assert text_of(page) == second
    page.fill("#branch-name", "the other")
    page.press("#branch-name", "Enter")
    assert "the other" in page.inner_text("#branches")
    page.click("#delete-branch")
    assert text_of(page) == first
    assert branches(page) == 0


def test_all_of_it_works_by_keyboard_alone(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    setting(page, "max_tokens", "10")
    page.focus("#editor")
    page.keyboard.type("Mia")
    proceed(page)
    first = text_of(page)
    page.keyboard.press("ArrowLeft")
    while not page.locator("#token button:not([aria-current]):not(:disabled)").count():
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(50)
    page.keyboard.press("Alt+ArrowDown")
    assert page.evaluate("document.activeElement.closest('#token') !== null")
    while page.evaluate("document.activeElement.getAttribute('aria-current')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    finish(page)
    assert branches(page) == 2
    assert text_of(page) != first
    page.keyboard.press("Alt+PageUp")
    assert text_of(page) == first


def test_changing_what_the_model_said_begins_a_branch_and_undoing_it_does_not_lose_any(
    open_page: Opened, stage: Served
) -> None:
    page = opened(open_page, stage)
    write(page, "Mia")
    said = text_of(page)
    for _ in range(3):
        page.keyboard.press("Backspace")
    assert text_of(page) == said[:-3]
    page.keyboard.type(" and\nthen")
    assert text_of(page) == said[:-3] + " and\nthen"
    page.keyboard.press("Control+Home")
    page.keyboard.type("Oh! ")
    assert text_of(page) == "Oh! " + said[:-3] + " and\nthen"
    nodes = export(page)["sheets"][0]
    ends = [node for node in nodes["nodes"].values() if not node["children"]]
    assert len(ends) <= 4
    page.focus("#editor")
    for _ in range(8):
        page.keyboard.press("Control+z")
    assert text_of(page) == said


def test_a_reload_keeps_all(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    write(page, "Mia")
    page.click("#again")
    finish(page)
    page.fill("#branch-name", "second")
    page.press("#branch-name", "Enter")
    setting(page, "temperature", "0.5")
    kept = text_of(page), page.inner_text("#branches"), page.locator("#editor").inner_html()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert (text_of(page), page.inner_text("#branches"), page.locator("#editor").inner_html()) == kept
    assert page.input_value("#settings [name=temperature]") == "0.5"


def test_what_is_exported_can_be_repeated_and_imported(open_page: Opened, stage: Served, tmp_path: Path) -> None:
    page = opened(open_page, stage)
    setting(page, "repetition_penalty", "1.1")
    write(page, "Mia")
    word(page, 1).click()
    page.click("#token button:not([aria-current]):not(:disabled)")
    finish(page)
    content = export(page)
    assert (content["format"], content["version"]) == ("gemmule-sheets", 1)
    drawn = [each for each in content["sheets"][0]["generations"].values() if not each.get("chosen")]
    assert len(drawn) == 2
    for each in drawn:
        answer = stage.complete(**each["request"] | {"prompt": each["prompt_ids"], "seed": each["seed"]}).json
        assert answer["system_fingerprint"] == each["fingerprint"]
        ids = answer["choices"][0]["token_ids"]
        assert ids[: len(each["tokens"])] == [token["id"] for token in each["tokens"]]
    file = tmp_path / "sheets.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    fresh = opened(open_page, stage)
    fresh.set_input_files("#file", file)
    fresh.wait_for_selector("#editor .t", state="attached")
    assert text_of(fresh) == text_of(page)
    assert branches(fresh) == 2
    for text, sentence in (("{", "not JSON"), ('{"format": 1}', "gemmule-sheets"), (damaged(content), "damaged")):
        file.write_text(text, encoding="utf-8")
        fresh.set_input_files("#file", file)
        fresh.wait_for_selector(f"#problem:has-text('{sentence}')")


def damaged(content: Any) -> str:
    copy = json.loads(json.dumps(content))
    copy["sheets"][0]["nodes"].popitem()
    return json.dumps(copy)


def test_text_of_the_model_is_never_html(open_page: Opened, stage: Served) -> None:
    pytest.importorskip("llguidance", reason="the extra constraints is not installed")
    page = opened(open_page, stage)
    change_requests(page, grammar=f'start: "{SCRIPT}"')
    write(page, "<b>Mia</b>", tokens=200)
    assert text_of(page) == f"<b>Mia</b>{SCRIPT}"
    assert page.title() == "Gemmule"
    assert page.locator("#editor :is(script, img, b)").count() == 0
    word(page, 2).click()
    assert page.locator("#token :is(script, img, b)").count() == 0


def test_your_own_text_is_tinted_by_surprise(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    page.click("#editor")
    page.keyboard.type("Mia found a \U0001f984 kite")
    page.click("#surprise")
    page.wait_for_selector("#editor .yours.t")
    assert text_of(page) == "Mia found a \U0001f984 kite"
    assert page.locator("#editor .b7").count() > 0
    page.click("#surprise")
    page.wait_for_selector("#editor .t", state="detached")


def test_a_chat_is_edited_regenerated_and_continued(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    page.click("#new-chat")
    setting(page, "max_tokens", "8")
    page.fill("#message", "Who are you?")
    page.focus("#message")
    proceed(page)
    reply = page.locator(".turn.assistant .reply")
    first = reply.inner_text()
    page.get_by_role("button", name="Regenerate").click()
    finish(page)
    assert "2 of 2" in page.inner_text("#turns")
    page.get_by_role("button", name="Previous branch").click()
    assert reply.inner_text() == first
    page.get_by_role("button", name="Continue", exact=True).click()
    finish(page)
    assert reply.inner_text().startswith(first)
    reply.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#token .alternatives button").count() >= 8
    page.keyboard.press("Alt+ArrowDown")
    assert page.evaluate("document.activeElement.closest('#token') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.closest('.turn') !== null")
    page.click("#token button:not([aria-current]):not(:disabled)")
    finish(page)
    assert page.locator(".turn.assistant .chosen").count() == 1
    assert branches(page) >= 2
    page.get_by_role("button", name="Edit").first.click()
    page.fill(".turn textarea", "Who is it?")
    page.get_by_role("button", name="Send as a branch").click()
    finish(page)
    assert "Who is it?" in page.inner_text("#turns")
    assert "Who are you?" not in page.inner_text("#turns")
    page.fill("#message", "And then?")
    page.click("#go")
    page.wait_for_selector(".turn.assistant >> nth=1")
    finish(page)
    assert page.locator(".turn").count() == 4


def test_a_wrong_key_is_asked_for_again_and_a_right_one_opens(open_page: Opened, story: Path) -> None:
    with serving(story, api_keys=(KEY.encode(),)) as locked:
        page = opened(open_page, locked)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "sk-wrong-key")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-problem:has-text('wrong')")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("body[data-connected]")
        assert not page.locator("#key-dialog").is_visible()
        setting(page, "seed", "5")  # what was typed before may have gone into the dialog
        write(page, "Mia")
        assert page.locator("#editor .t").count() == 12
        page.reload()
        page.wait_for_selector("body[data-ready][data-connected]")
        assert page.evaluate("localStorage.length") == 1, "the key is not among what stays"


def test_a_server_that_stops_and_comes_back_is_found_again(open_page: Opened, story: Path) -> None:
    with serving(story) as served:
        page = opened(open_page, served)
        write(page, "Mia")
        port = served.port
    said = text_of(page)
    page.focus("#editor")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#problem:has-text('cannot be reached')")
    assert text_of(page) == said
    with serving(story, port=port):
        page.wait_for_selector("#problem", state="hidden")
        page.focus("#editor")
        proceed(page)
        assert text_of(page).startswith(said)
        assert len(text_of(page)) > len(said)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_width_and_breaks_no_rule_of_accessibility(
    open_page: Opened, stage: Served, width: int, scheme: str
) -> None:
    page = opened(open_page, stage, width, color_scheme=scheme)
    page.click("#compare")
    page.locator(".side summary").first.click()
    write(page, "Mia", tokens=60)
    word(page, 2).click()
    check_accessible(page, width)
    page.click("#run-both")
    finish(page)
    check_accessible(page, width)
    page.click("#new-chat")
    page.fill("#message", "Who are you?")
    page.focus("#message")
    proceed(page)
    check_accessible(page, width)
    page.get_by_role("button", name="Edit").first.click()
    check_accessible(page, width)


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_steps_of_a_run_and_the_warning_break_no_rule_either(
    open_page: Opened, tiny_run: Path, width: int, scheme: str
) -> None:
    with serving(tiny_run, *checkpoints(tiny_run)[1:], max_rows=4) as server:
        page = opened(open_page, server, width, color_scheme=scheme)
        setting(page, "min_tokens", "40")
        write(page, "Mia", tokens=40)
        page.click("#through-steps")
        page.click("#steps-begin")
        page.wait_for_selector("#steps-status:has-text('These are all')")
        assert page.locator("#beyond").is_visible()
        assert page.locator("#steps-list .parts").count() >= 1
        check_accessible(page, width)


def test_alternatives_on_a_phone_can_be_closed(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage, 360)
    write(page, "Mia")
    for _ in range(2):
        word(page, 2).click()
        page.wait_for_selector("#token .alternatives")
        page.click("#close-token")
        assert page.locator("#token .alternatives").count() == 0


def test_what_is_typed_is_undone_in_steps_and_a_larger_deletion_is_one_of_its_own(
    open_page: Opened, stage: Served
) -> None:
    page = opened(open_page, stage)
    page.click("#editor")
    page.keyboard.type("Mia found a \U0001f984")
    page.keyboard.press("Backspace")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    for text in ("Mia found a ", "Mia found a \U0001f984", ""):
        page.keyboard.press("Control+z")
        assert text_of(page) == text
