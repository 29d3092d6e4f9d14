"""What is served as the page: its files, their headers, and that nothing in them refers elsewhere."""

import re
from pathlib import Path

import pytest
from serving import Served, serving

from gemmule.serve.page_files import page_files, page_paths


def test_the_page_and_its_files_are_served_with_their_policy(server: Served) -> None:
    assert {"/", "/page/index.html", "/page/page.js", "/page/page.css", "/page/base.css"} <= page_paths()
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    for path in page_paths():
        answer = server.ask(path)
        assert answer.status == 200
        assert answer.body == page_files()[path.rpartition("/")[2] or "index.html"]
        kind = kinds[path.rpartition(".")[2] if path != "/" else "html"]
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert {"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
        assert "unsafe" not in policy


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/__init__.py"]
)
def test_nothing_else_is_served(server: Served, path: str) -> None:
    assert server.ask(path).status == 404


def test_the_page_needs_no_key_and_what_it_asks_for_does(model_folder: Path) -> None:
    with serving(model_folder, api_keys=(b"sk-gemmule-1234",)) as locked:
        assert locked.ask("/").status == 200
        assert locked.ask("/page/page.js").status == 200
        assert locked.ask("/page/none.js").status == 401
        assert locked.ask("/v1/models").status == 401


@pytest.mark.parametrize("name", sorted(page_files()))
def test_no_file_refers_elsewhere_or_makes_text_into_html(name: str) -> None:
    text = page_files()[name].decode()
    assert re.findall(r"\w+://|[\"'(]//\w|url\(|@import", text) == []
    html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\son\w+="
    assert re.findall(html, text) == []
    for target in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert target in page_paths() | {"data:,", "#main"}
    for target in re.findall(r'from "([^"]*)"', text):
        assert target.removeprefix("./") in page_files()


def test_the_ids_of_alternatives_stand_beside_them_where_ids_are_asked_for(server: Served) -> None:
    body = {"prompt": "Mia", "max_tokens": 3, "logprobs": 4, "seed": 1, "temperature": 0}
    found = server.complete(**body, return_token_ids=True).json["choices"][0]
    for known, scores, token in zip(
        found["logprobs"]["top_token_ids"], found["logprobs"]["top_logprobs"], found["token_ids"], strict=False
    ):
        assert known.keys() == scores.keys()
        assert known[max(scores, key=scores.__getitem__)] == token, "greedy"
    assert "top_token_ids" not in server.complete(**body).json["choices"][0]["logprobs"]
