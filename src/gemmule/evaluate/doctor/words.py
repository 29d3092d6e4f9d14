"""Checks of the tokenizer, its special tokens, and what the model's folder declares about them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemmule.errors import ModelError
from gemmule.evaluate.doctor.patient import Answer, Patient
from gemmule.tokenizer.chat import END, START, render_chat

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_TEMPLATE = "chat_template.jinja"


def read_declared(folder: Path) -> dict[str, Any]:
    """Return what a model folder's JSON files and chat template say, by file name; ModelError where one is damaged.

    A file that is not there says nothing.
    """
    declared: dict[str, Any] = {}
    for file in (folder / name for name in (*_FILES, _TEMPLATE)):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            declared[file.name] = text if file.name == _TEMPLATE else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); restore it or remove it") from None
    return declared


def vocabulary(patient: Patient) -> Answer:
    """Every id that text can give has a row in the model, and what is encoded decodes to the same text."""
    rows, ids = patient.config.vocab_size, patient.tokenizer.vocab_size
    # Google's tokenizer for the 1B has an image token that its model has no row for; no text makes it.
    if any(patient.tokenizer.token_bytes()[rows:]):
        return "ill", f"the tokenizer makes ids up to {ids - 1}, and the model has {rows} rows"
    text = "Once upon a time, Tom said: \u201cdon't!\u201d\n\n  12.5 \U0001f984"
    if (again := patient.tokenizer.decode(patient.tokenizer.encode(text))) != text:
        return "ill", f"text does not survive encoding: {text!r} becomes {again!r}"
    spare = f", {rows - ids} rows to spare" if rows > ids else ""
    return "well", f"{ids:,} ids{spare}; text survives encoding"


def special_tokens(patient: Patient) -> Answer:
    """A text begins with one bos and a document ends with eos; the ids differ, and the folder's files agree."""
    complaint = next(_confusions(patient), None)
    if complaint:
        return "ill", complaint
    tokenizer = patient.tokenizer
    return "well", f"bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, pad {tokenizer.pad_id}; bos begins every text"


def _confusions(patient: Patient) -> Iterator[str]:
    tokenizer = patient.tokenizer
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    for name in ("bos", "eos"):
        if ids[name] is None:
            yield f"the tokenizer has no {name} token"
    if ids["bos"] == ids["eos"]:
        yield f"bos and eos are the same token, {ids['bos']}"
    if ids["pad"] is not None and ids["pad"] == ids["eos"]:
        yield f"pad and eos are the same token, {ids['pad']}: who leaves padding out of the loss never learns to stop"
    begins = tokenizer.encode("fox").count(ids["bos"]) if ids["bos"] is not None else 0
    if begins != 1:
        yield f"a text begins with {begins} bos tokens instead of one; Gemma 3 predicts badly without it and with two"
    for file in _FILES:
        table = patient.declared.get(file)
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


def chat(patient: Patient) -> Answer:
    """The tokenizer can render Gemma's turns, and a template in the folder writes the same ones."""
    tokenizer = patient.tokenizer
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    settings = patient.declared.get("tokenizer_config.json")
    inside = settings.get("chat_template") if isinstance(settings, dict) else None
    template = patient.declared.get(_TEMPLATE, inside)
    if start is None and end is None:
        if template is None:
            return "unknown", f"the vocabulary has no {START} and {END}, so the model cannot chat"
        return "ill", f"there is a chat template, but the vocabulary has no {START} and {END}"
    if start is None or end is None:
        return "ill", f"the vocabulary has no {START if start is None else END}, and the other half of the pair"
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": f"{END}owl"}]
    ids = render_chat(tokenizer, messages).ids
    counts = [ids.count(each) for each in (tokenizer.bos_id, start, end) if each is not None]
    if counts not in ([1, 2, 2], [2, 2]):
        return "ill", f"two turns are rendered with {counts} of bos, {START} and {END}: what is said can forge a turn"
    if isinstance(template, str):
        for mark in (START, END, "bos_token", "model"):
            if mark not in template:
                return "ill", f"the folder's chat template does not write {mark}, so it is not Gemma 3's"
    return "well", f"turns are {START} {start} and {END} {end}" + (", as in its template" * isinstance(template, str))
