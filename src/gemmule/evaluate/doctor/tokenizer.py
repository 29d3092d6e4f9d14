"""Checks of the tokenizer, its special tokens, and what the model's folder declares about them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemmule.errors import ModelError
from gemmule.evaluate.doctor.model import Answer, ModelUnderTest
from gemmule.reading import path_kind
from gemmule.tokenizer.chat import END, START, render_chat

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_TEMPLATE = "chat_template.jinja"


def read_declared(folder: Path) -> dict[str, Any]:
    """Return what a model folder's JSON files and chat template say, by file name; ModelError where one is damaged.

    A file that is not there says nothing.
    """
    declared: dict[str, Any] = {}
    for file in (folder / name for name in (*_FILES, _TEMPLATE)):
        if path_kind(file, ModelError) is None:
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
            declared[file.name] = text if file.name == _TEMPLATE else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); restore it or remove it") from None
    return declared


def vocabulary(test: ModelUnderTest) -> Answer:
    """Every id that text can give has a row in the model, and what is encoded decodes to the same text."""
    rows, ids = test.config.vocab_size, test.tokenizer.vocab_size
    # Google's tokenizer for the 1B has an image token that its model has no row for; no text makes it.
    if any(test.tokenizer.token_bytes()[rows:]):
        return "failed", f"the tokenizer makes ids up to {ids - 1}, and the model has {rows} rows"
    text = "Once upon a time, Tom said: \u201cdon't!\u201d\n\n  12.5 \U0001f984"
    if (again := test.tokenizer.decode(test.tokenizer.encode(text))) != text:
        return "failed", f"encoding and decoding changes text: {text!r} becomes {again!r}"
    spare = f", {rows - ids} rows to spare" if rows > ids else ""
    return "passed", f"{ids:,} ids{spare}; decoding restores text"


def special_tokens(test: ModelUnderTest) -> Answer:
    """A text begins with one bos and a document ends with eos; the ids differ, and the folder's files agree."""
    complaint = next(_confusions(test), None)
    if complaint:
        return "failed", complaint
    tokenizer = test.tokenizer
    return "passed", f"bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}; bos begins every text"


def _confusions(test: ModelUnderTest) -> Iterator[str]:
    tokenizer = test.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    for name in ("bos", "eos"):
        if ids[name] is None:
            yield f"the tokenizer has no {name} token"
    if ids["bos"] == ids["eos"]:
        yield f"bos and eos are the same token, {ids['bos']}"
    if ids["pad"] is not None and ids["pad"] == ids["eos"]:
        yield f"pad and eos are the same token, {ids['pad']}: without padding in the loss, eos is not learned"
    begins = tokenizer.encode("fox").count(ids["bos"]) if ids["bos"] is not None else 0
    if begins != 1:
        yield f"a text begins with {begins} bos tokens instead of one; Gemma 3 predicts badly without it and with two"
    for file in _FILES:
        table = test.declared.get(file)
        yield from _disagreements(file, table, ids, tokenizer.end_of_turn_id)


def _disagreements(file: str, table: Any, ids: dict[str, int | None], end_of_turn: int | None) -> Iterator[str]:
    sections = [table, table.get("text_config")] if isinstance(table, dict) else []
    for section in sections:
        for name, number in ids.items():
            declared = section.get(f"{name}_token_id") if isinstance(section, dict) else None
            if declared is None:
                continue
            # What ends generation may be several tokens.
            listed = declared if isinstance(declared, list) else [declared]
            allowed = {number, end_of_turn} if name == "eos" else {number}
            if (number not in listed and listed != [end_of_turn]) or not set(listed) <= allowed:
                yield f"{file} says {name}_token_id = {declared}; the tokenizer's {name} is {number}"


def chat(test: ModelUnderTest) -> Answer:
    """The tokenizer can render Gemma's turns, and a template in the folder writes the same ones."""
    tokenizer = test.tokenizer
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    settings = test.declared.get("tokenizer_config.json")
    inside = settings.get("chat_template") if isinstance(settings, dict) else None
    template = test.declared.get(_TEMPLATE, inside)
    if start is None and end is None:
        if template is None:
            return "skipped", f"the vocabulary has no {START} and {END}, so the model cannot chat"
        return "failed", f"there is a chat template, but the vocabulary has no {START} and {END}"
    if start is None or end is None:
        return "failed", f"the vocabulary has no {START if start is None else END}, and the other half of the pair"
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": f"{END}owl"}]
    ids = render_chat(tokenizer, messages).ids
    counts = [ids.count(each) for each in (tokenizer.bos_id, start, end) if each is not None]
    if counts not in ([1, 2, 2], [2, 2]):
        return (
            "failed",
            f"two turns are rendered with {counts} of bos, {START} and {END}: text can forge a turn",
        )
    if isinstance(template, str):
        for mark in (START, END, "bos_token", "model"):
            if mark not in template:
                return "failed", f"the folder's chat template does not write {mark}, so it is not Gemma 3's"
    return "passed", f"turns are {START} {start} and {END} {end}" + (", as in its template" * isinstance(template, str))
