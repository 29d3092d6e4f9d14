"""Replies of the server's page in Chromium: compared, beyond the length of training, and in one file with chat."""

import json
from pathlib import Path
from typing import Any

import pytest
from page_driver import Opened, branches, export, finish, opened, proceed, setting, text_of, write
from serving import Served, serving

from gemmule.run_folder import RunFolder
from gemmule.train.checkpoint import checkpoints
from runs import gemmule
from saved_sheets import read_sheet_of

pytestmark = pytest.mark.slow


def both(page: Any) -> list[str]:
    """Return the replies side by side."""
    page.click("#run-both")
    page.wait_for_selector("#status:has-text('Both are done')")
    return [each.evaluate("each => each.textContent") for each in page.locator("#sides .reply").all()]


def compared(open_page: Opened, served: Served) -> Any:
    page = opened(open_page, served)
    setting(page, "max_tokens", "12")
    setting(page, "min_tokens", "12")
    page.click("#editor")
    page.keyboard.type("Mia")
    page.click("#compare")
    return page


def test_side_by_side_parts_only_where_the_models_do(open_page: Opened, stage: Served) -> None:
    page = compared(open_page, stage)
    assert len(set(both(page))) == 1, "same prompt, seed and settings"
    assert page.locator(".parts").count() == 0
    page.locator(".side select").nth(1).select_option("other")
    left, right = both(page)
    assert left != right
    assert page.locator(".parts").count() == 2
    page.locator(".side > button").nth(1).click()
    assert text_of(page) == "Mia" + right
    fingerprints = {each["fingerprint"] for each in export(page)["sheets"][0]["generations"].values()}
    (other,) = (each["fingerprint"] for each in stage.ask("/v1/models").json["data"] if each["id"] == "other")
    assert fingerprints == {other}


def test_two_samples_and_two_settings_stand_side_by_side(open_page: Opened, stage: Served) -> None:
    page = compared(open_page, stage)
    page.check("#two-samples")
    left, right = both(page)
    body = {"model": "story", "prompt": "Mia", "max_tokens": 12, "min_tokens": 12, "temperature": 0.8, "top_p": 0.95}
    for seed, reply in ((5, left), (6, right)):
        assert stage.complete(**body, seed=seed).json["choices"][0]["text"] == reply
        assert f"seed {seed}" in page.inner_text("#sides")
    page.uncheck("#two-samples")
    page.locator(".side summary").nth(1).click()
    page.locator(".side [name=temperature]").nth(1).fill("0")
    greedy = stage.complete(**body | {"temperature": 0}).json["choices"][0]["text"]
    assert both(page) == [left, greedy]


def test_a_reply_is_kept_where_it_began_also_when_the_text_has_grown(open_page: Opened, stage: Served) -> None:
    page = compared(open_page, stage)
    left, _ = both(page)
    page.click("#editor")
    page.keyboard.press("Control+End")
    page.keyboard.type(" found a kite")
    page.locator(".side > button").first.click()
    assert text_of(page) == "Mia" + left
    assert branches(page) == 2
    page.keyboard.press("Alt+PageDown")
    assert text_of(page) == "Mia found a kite"
    page.click("#editor")
    page.keyboard.press("Control+Home")
    page.keyboard.type("Oh, ")
    page.locator(".side > button").nth(1).click()
    assert "Mia" + left in text_of(page), "the branch without the change still has the text"


def test_replies_to_your_last_message_stand_side_by_side_in_a_chat(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    page.click("#new-chat")
    setting(page, "max_tokens", "8")
    page.fill("#message", "Who are you?")
    page.focus("#message")
    proceed(page)
    page.click("#compare")
    page.check("#two-samples")
    left, right = both(page)
    assert left != right
    page.locator(".side > button").nth(1).click()
    assert page.locator(".turn.assistant .reply").evaluate("each => each.textContent") == right
    assert "2 of 2" in page.inner_text("#turns")


def follow(page: Any) -> None:
    page.click("#through-steps")
    page.click("#steps-begin")


def steps(page: Any) -> list[str]:
    return [str(each) for each in page.locator("#steps-list h3").all_inner_texts()]


def test_one_prompt_is_followed_through_the_steps_of_a_run(open_page: Opened, young_run: Path, tmp_path: Path) -> None:
    first, newest = checkpoints(young_run)[0], max(tmp_path.glob("step-*"))
    names = [f"step {int(each.name.removeprefix('step-'))}" for each in (first, newest)]
    with serving(young_run, follow=True, follow_seconds=0.1, max_rows=4) as server:
        page = opened(open_page, server)
        setting(page, "max_tokens", "16")
        setting(page, "min_tokens", "16")
        page.click("#editor")
        page.keyboard.type("Mia found")
        follow(page)
        page.wait_for_selector("#steps-status:has-text('Waits for the next checkpoint of young.')")
        assert steps(page) == names[:1]
        page.click("#editor")
        page.keyboard.type(" a")
        newest.rename(RunFolder(young_run).checkpoints / newest.name)
        page.wait_for_selector("#steps-list li >> nth=1")
        assert steps(page)[0] == names[0]
        assert steps(page)[1].startswith(f"{names[1]}, differs from {names[0]} at token ")
        assert page.locator("#steps-list .parts").count() == 1
        assert text_of(page) == "Mia found a", "what is typed meanwhile is left alone"
        assert page.evaluate("document.activeElement.id") == "editor"
        assert f"young, {names[1]}" in page.inner_text("#model")
        page.wait_for_timeout(500)
        page.reload()
        page.wait_for_selector("body[data-ready]")
        page.set_default_timeout(15_000)
        page.click("#through-steps")
        assert [each.partition(",")[0] for each in steps(page)] == names
        page.wait_for_selector("#steps-status:has-text('Waits for')")
        page.click("#steps-stop")
        assert page.inner_text("#steps-status") == "Does not follow the run."
        replies = page.locator("#steps-list .reply").evaluate_all("all => all.map(each => each.textContent)")
        page.locator("#steps-list button").first.click()
        assert text_of(page) == "Mia found" + replies[0]
        (sheet,) = export(page)["sheets"]
    prompt = sheet["steps"]["prompt"]
    with serving(*(RunFolder(young_run).checkpoints / each.name for each in (first, newest)), max_rows=4) as server:
        for kept, served in zip(sheet["steps"]["replies"], server.ask("/v1/models").json["data"], strict=True):
            generation = sheet["generations"][kept["generation"]]
            assert generation["fingerprint"] == served["fingerprint"]
            request = generation["request"] | {"model": served["id"], "seed": 5, "prompt": prompt}
            ids = server.complete(**request).json["choices"][0]["token_ids"]
            assert ids == [token["id"] for token in generation["tokens"]]


def test_a_run_is_followed_again_when_its_server_is_back(open_page: Opened, young_run: Path, tmp_path: Path) -> None:
    newest = max(tmp_path.glob("step-*"))
    with serving(young_run, follow=True, follow_seconds=0.1, max_rows=4) as server:
        page = opened(open_page, server)
        page.click("#editor")
        page.keyboard.type("Mia")
        follow(page)
        page.wait_for_selector("#steps-status:has-text('Waits for')")
        port = server.port
    page.wait_for_selector("#problem:has-text('cannot be reached')")
    newest.rename(RunFolder(young_run).checkpoints / newest.name)
    with serving(young_run, follow=True, follow_seconds=0.1, max_rows=4, port=port):
        page.wait_for_selector("#steps-list li >> nth=1")
        page.wait_for_selector("#steps-status:has-text('Waits for')")
        assert not page.locator("#problem").is_visible()


def test_checkpoints_that_are_served_beside_the_run_reply_in_the_order_of_their_steps(
    open_page: Opened, tiny_run: Path
) -> None:
    older = checkpoints(tiny_run)[1:]
    names = [f"step {int(each.name.removeprefix('step-'))}" for each in checkpoints(tiny_run)[::-1]]
    with serving(tiny_run, *older, max_rows=4) as server:
        page = opened(open_page, server)
        page.click("#editor")
        page.keyboard.type("Mia")
        follow(page)
        page.wait_for_selector("#steps-status:has-text('These are all checkpoints of tiny that the server has.')")
        assert [each.partition(",")[0] for each in steps(page)] == names


def test_a_text_beyond_the_length_of_training_is_warned_of(open_page: Opened, tiny_run: Path, stage: Served) -> None:
    with serving(tiny_run, max_rows=4) as server:
        page = opened(open_page, server)
        setting(page, "min_tokens", "25")
        write(page, "Mia", tokens=25)
        assert not page.locator("#beyond").is_visible()
        proceed(page)
        assert "longer than the 32 tokens of a sequence in training" in page.inner_text("#beyond")
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#beyond").is_visible()
        page.click("#new-sheet")
        assert not page.locator("#beyond").is_visible()
    page = opened(open_page, stage)
    write(page, "Mia", tokens=60)
    assert not page.locator("#beyond").is_visible(), "it is not known of a folder that is no run's"


def test_what_chat_saved_is_imported_and_what_is_exported_chat_loads(
    open_page: Opened, stage: Served, story: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    lines = "/set max_tokens 8\n/set min_tokens 8\n/set seed 3\nMia found\n/retry\n/set seed 18446744073709551615\n\n"
    assert gemmule("chat", story, "--story", given=f"{lines}/save {file}\n".encode()).code == 0
    saved = read_sheet_of(file)
    page = opened(open_page, stage)
    page.set_input_files("#file", file)
    page.wait_for_selector("#editor .t", state="attached")
    last = list(saved["generations"].values())[-2:]
    said = "".join(token["text"] for each in last for token in each["tokens"])
    assert text_of(page) == "Mia found" + said
    assert branches(page) == 2
    first = page.locator("#editor .t").first
    for half in (0.2, 0.8):
        page.click("#editor", position={"x": 5, "y": 5})
        box = first.bounding_box()
        page.mouse.click(box["x"] + half * box["width"], box["y"] + box["height"] / 2)
        assert "came without its probability" in page.inner_text("#token"), "also where the cursor stands before it"
    setting(page, "seed", "5")
    proceed(page)
    assert text_of(page).startswith("Mia found" + said)
    file.write_text(json.dumps(export(page)), encoding="utf-8")
    (_, sheet) = json.loads(file.read_text(encoding="utf-8"))["sheets"]
    drawn = list(sheet["generations"].values())[-1]
    assert drawn["prompt_ids"] == [*last[1]["prompt_ids"], *(token["id"] for token in last[1]["tokens"])]
    assert list(sheet["generations"].values())[-2]["seed"] is None, "JavaScript has no such number"
    replayed = gemmule("generate", story, "--replay", file)
    assert (replayed.code, replayed.out.splitlines()[-1]) == (0, "all 3 replies are the same, token for token")
    ended = gemmule("chat", story, "--story", given=f"/load {file} 2\n\n/save {file}\n".encode())
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(text_of(page))
    assert gemmule("generate", story, "--replay", file).out.splitlines()[-1].startswith("all 4 replies")


def test_a_chat_goes_from_chat_to_the_page_and_back(
    open_page: Opened, stage: Served, story: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    lines = (
        "/set max_tokens 8\n/set min_tokens 8\n/set system Be brief\nWho are you?\n/edit 2 I am the model\nAnd then?\n"
    )
    assert gemmule("chat", story, "--turns", given=f"{lines}/save {file}\n".encode()).code == 0
    page = opened(open_page, stage)
    page.set_input_files("#file", file)
    page.wait_for_selector(".turn >> nth=3")
    roles = page.locator(".turn h2").all_inner_texts()
    assert roles == ["You", "Model", "You", "Model"]
    assert "I am the model" in page.locator(".turn").nth(1).inner_text()
    assert page.input_value("#settings [name=system]") == "Be brief"
    expected = list(read_sheet_of(file)["generations"].values())[-1]["prompt_ids"]
    page.get_by_role("button", name="Regenerate").nth(1).click()
    finish(page)
    content = export(page)
    again = list(content["sheets"][-1]["generations"].values())[-1]
    assert again["prompt_ids"] == expected, "the template, with the system message, over edited turns"
    file.write_text(json.dumps(content), encoding="utf-8")
    ended = gemmule("chat", story, "--turns", given=f"/load {file} 2\nBye\n/save {file}\n".encode())
    assert (ended.code, ended.err) == (0, "")


def test_a_reply_of_a_chat_is_edited_and_continued(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    page.click("#new-chat")
    setting(page, "max_tokens", "8")
    page.fill("#message", "Who are you?")
    page.focus("#message")
    proceed(page)
    page.get_by_role("button", name="Edit").nth(1).click()
    page.keyboard.press("Escape")
    assert page.locator(".turn textarea").count() == 0
    page.get_by_role("button", name="Edit").nth(1).click()
    page.fill(".turn textarea", "I am Mia")
    page.get_by_role("button", name="Keep as a branch").first.click()
    assert "2 of 2" in page.inner_text("#turns")
    page.get_by_role("button", name="Continue", exact=True).click()
    finish(page)
    reply = page.locator(".turn.assistant .reply")
    assert reply.count() == 1
    assert reply.inner_text().startswith("I am Mia")
    last = list(export(page)["sheets"][-1]["generations"].values())[-1]
    asked = {"model": "story", "messages": [{"role": "user", "content": "Who are you?"}]}
    begun = stage.ask("/tokenize", asked).json["tokens"]
    begun += stage.ask("/tokenize", {"model": "story", "prompt": "I am Mia", "add_special_tokens": False}).json[
        "tokens"
    ]
    assert last["prompt_ids"] == begun


def test_a_message_that_got_no_reply_is_answered_later(open_page: Opened, story: Path) -> None:
    with serving(story, chat=True) as served:
        page = opened(open_page, served)
        page.click("#new-chat")
        setting(page, "max_tokens", "8")
        port = served.port
    page.fill("#message", "Who are you?")
    page.focus("#message")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#problem:has-text('cannot be reached')")
    assert page.locator(".turn").count() == 1
    with serving(story, chat=True, port=port):
        page.wait_for_selector("#problem", state="hidden")
        page.get_by_role("button", name="Answer").click()
        finish(page)
        assert page.locator(".turn.assistant").count() == 1
        assert page.evaluate("document.activeElement.closest('.turn') !== null"), "the keyboard stays where it was"


def test_another_model_reads_the_text_and_not_the_ids_of_the_first(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    write(page, "Mia")
    said = text_of(page)
    page.select_option("#model", "other")
    page.focus("#editor")
    proceed(page)
    last = list(export(page)["sheets"][0]["generations"].values())[-1]
    assert last["model"] == "other"
    assert last["prompt_ids"] == stage.ask("/tokenize", {"model": "other", "prompt": said}).json["tokens"]


def test_what_a_stop_text_cut_off_is_not_read_again(open_page: Opened, stage: Served) -> None:
    page = opened(open_page, stage)
    setting(page, "stop", "e\na")
    write(page, "Mia", tokens=200)
    said = text_of(page)
    assert "the model ended it" in page.inner_text("#status")
    setting(page, "stop", "")
    proceed(page)
    last = list(export(page)["sheets"][0]["generations"].values())[-1]
    assert last["prompt_ids"] == stage.ask("/tokenize", {"model": "story", "prompt": said}).json["tokens"]
