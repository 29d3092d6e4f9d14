"""The file of texts and chats that `gemmule chat` and the server's page share (docs/sheets.md).

A file holds sheets. A sheet is a tree of nodes, whose texts are written in them or are tokens of a generation.
"""

import heapq
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import RecipeError, SourceError
from gemmule.fields import LARGEST_REQUEST_SEED
from gemmule.files import atomic_write
from gemmule.inference.conversation import Author, Conversation, Piece, ReplySettings, Usage
from gemmule.settings import check_recipe

FORMAT, VERSION = "gemmule-sheets", 1
_MODES = {"sheet": False, "chat": True}
_AUTHORS: dict[str, Author] = {"you": "user", "model": "model"}
_TITLE_LENGTH = 40  # characters


class Saved(NamedTuple):
    """A sheet of a file as a conversation, and the settings of its next reply."""

    conversation: Conversation
    settings: ReplySettings


class SavedReply(NamedTuple):
    """A generation of a file: the title of its sheet, its number there, from 1, and what repeats it."""

    title: str
    number: int
    piece: Piece


def read_sheets(path: Path) -> list[dict[str, Any]]:
    """Return the sheets of a file, checked; SourceError says what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is no JSON file: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SourceError(f"{path}: is not of the format {FORMAT}, which `gemmule chat` saves and the page exports")
    if document.get("version") != VERSION:
        raise SourceError(f"{path}: has version {document.get('version')!r:.20}; this Gemmule reads {VERSION}")
    sheets = document.get("sheets")
    if not isinstance(sheets, list):
        raise SourceError(f"{path}: has no list of sheets")
    for number, sheet in enumerate(sheets, 1):
        try:
            _check(sheet)
        except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise SourceError(f"{path}: sheet {number} is damaged: {reason:.200}") from None
    return sheets


def is_chat(sheet: Mapping[str, Any]) -> bool:
    """Whether a sheet is a chat in turns."""
    return _MODES[sheet["mode"]]


def read_sheet(sheet: dict[str, Any]) -> Saved:
    """Return a checked sheet as a conversation."""
    pieces: list[Piece] = []
    numbers: dict[str, int | None] = {sheet["root"]: None}
    for node in _in_order(sheet):
        piece = _piece(sheet, node)
        piece.parent = numbers[node["parent"]]
        numbers[node["id"]] = len(pieces)
        pieces.append(piece)
    conversation = Conversation(is_chat(sheet), str(sheet["model"]), pieces, numbers[sheet["current"]], sheet)
    return Saved(conversation, _read_settings(sheet["settings"]))


def read_replies(path: Path) -> list[SavedReply]:
    """Return the generations of all sheets of a file that can be repeated; errors as in `read_sheets`."""
    return [
        SavedReply(sheet["title"], number, piece)
        for sheet in read_sheets(path)
        for number, generation in enumerate(sheet["generations"].values(), 1)
        if (piece := _reply(generation)).generated
    ]


def write_conversation(path: Path, conversation: Conversation, settings: ReplySettings) -> None:
    """Write a conversation as a sheet; other sheets of the file are kept.

    SourceError rather than over a file of another kind.
    """
    sheets = []
    if path.exists():
        try:
            sheets = read_sheets(path)
        except SourceError:
            raise SourceError(f"{path}: is there, and is no file of {FORMAT}; name another one") from None
    own = _sheet(conversation, settings)
    place = next((number for number, sheet in enumerate(sheets) if sheet["id"] == own["id"]), len(sheets))
    sheets[place : place + 1] = [own]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "exported": datetime.now(UTC).isoformat(),
        "sheets": sheets,
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(sheet: Any) -> None:
    """Raise for a sheet whose tree or generations are not whole."""
    nodes, generations, root = sheet["nodes"], sheet["generations"], sheet["root"]
    _require(sheet["mode"] in _MODES, f"its mode is {sheet['mode']!r:.40}")
    _require(isinstance(sheet["title"], str) and isinstance(sheet["id"], str), "its id and title must be texts")
    _require(nodes[root]["parent"] is None and not nodes[root].get("text"), "its root has a parent or a text")
    _require(sheet["current"] in nodes, "its current node is missing")
    sheet.setdefault("model", "")
    _read_settings(sheet["settings"])
    for name, generation in generations.items():
        try:
            _reply(generation)
        except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
            raise ValueError(f"generation {name}: {error}") from None
    for name, node in nodes.items():
        _require(node["id"] == name and node["by"] in _AUTHORS, f"node {name} has another id or author")
        _require(all(nodes[child]["parent"] == name for child in node["children"]), f"children of node {name} differ")
        if node.get("generation") is None:
            _require(isinstance(node["text"], str), f"node {name} has no text")
        else:
            count = len(generations[node["generation"]]["tokens"])
            _require(0 <= node["from"] <= node["to"] <= count, f"node {name} leaves its generation")
    _require(sum(1 for _ in _in_order(sheet)) == len(nodes) - 1, "its nodes are no tree")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _in_order(sheet: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the nodes below the root in the order of the file, but each after its parent."""
    nodes, places = sheet["nodes"], {name: place for place, name in enumerate(sheet["nodes"])}
    seen = {sheet["root"]}
    queue = [(places[child], child) for child in nodes[sheet["root"]]["children"]]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if name in seen:
            raise ValueError(f"node {name} is a child twice")
        seen.add(name)
        yield nodes[name]
        for child in nodes[name]["children"]:
            heapq.heappush(queue, (places[child], child))


def _piece(sheet: dict[str, Any], node: dict[str, Any]) -> Piece:
    name = node.get("generation")
    if name is None:
        return Piece(_AUTHORS[node["by"]], node["text"], node=node["id"])
    whole, begin, end = _reply(sheet["generations"][name]), node["from"], node["to"]
    assert whole.tokens is not None
    piece = Piece("model", "".join(whole.texts[begin:end]), whole.tokens[begin:end], node=node["id"])
    piece.fingerprint, piece.settings, piece.texts = whole.fingerprint, whole.settings, whole.texts[begin:end]
    if begin == 0:
        piece.seed, piece.prompt = whole.seed, whole.prompt
    above = sheet["nodes"][node["parent"]]
    piece.continues = above.get("generation") == name and above["to"] == begin
    if end == len(whole.tokens):
        piece.finish, piece.usage = whole.finish, whole.usage
    return piece


def _reply(generation: dict[str, Any]) -> Piece:
    """Return a whole generation as a piece; one without a seed where the user chose its token."""
    tokens, prompt = [token["id"] for token in generation["tokens"]], generation["prompt_ids"]
    texts = [token["text"] for token in generation["tokens"]]
    _require(isinstance(prompt, list) and all(map(_is_count, [*tokens, *prompt])), "token ids must be from 0")
    seed = None if generation.get("chosen") else generation.get("seed")
    _require(seed is None or (_is_count(seed) and seed <= LARGEST_REQUEST_SEED), f"seed = {seed!r:.60}: out of range")
    request = {name: value for name, value in (generation.get("request") or {}).items() if value is not None}
    known = {name: value for name, value in request.items() if name in ReplySettings.model_fields and name != "seed"}
    return Piece(
        author="model",
        text="".join(texts),
        tokens=tokens,
        settings=check_recipe(known, ReplySettings, "of a generation"),
        seed=seed,
        fingerprint=generation.get("fingerprint"),
        finish=generation.get("finish"),
        usage=_read_usage(generation.get("usage")),
        texts=texts,
        prompt=prompt or None,
    )


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


def _read_usage(given: Any) -> Usage | None:
    if given is None:
        return None
    cached = (given.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(int(given["prompt_tokens"]), int(cached), int(given["completion_tokens"]), 0.0)


def _written_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _read_settings(given: Mapping[str, Any]) -> ReplySettings:
    """Read settings as they stand in the fields of the page, empty where unset; unknown ones are left out."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in ReplySettings.model_fields or value in ("", None):
            continue
        if name == "stop":
            found[name] = [line.replace("\\n", "\n") for line in value.split("\n") if line]
        else:
            found[name] = value if name in ("system", "logit_bias") else _number(str(value))
    return check_recipe(found, ReplySettings, "of the sheet")


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        return int(number) if number.is_integer() else number


def _written_settings(settings: ReplySettings) -> dict[str, Any]:
    found = settings.written() | ({} if settings.seed is None else {"seed": settings.seed})
    kept = {name: found.pop(name) for name in ("system", "logit_bias") if name in found}
    stop = {"stop": "\n".join(text.replace("\n", "\\n") for text in found.pop("stop"))} if "stop" in found else {}
    return {name: str(value) for name, value in found.items()} | kept | stop


def _sheet(conversation: Conversation, settings: ReplySettings) -> dict[str, Any]:
    """Return the sheet of a conversation: as it was read, with the pieces that came since."""
    sheet, pieces, now = conversation.sheet, conversation.pieces, int(1000 * time.time())
    if sheet is None:
        root = _new_id()
        title = " ".join(pieces[0].text.split())[:_TITLE_LENGTH] if pieces else ""
        sheet = conversation.sheet = {
            "id": _new_id(),
            "title": title or "Untitled",
            "mode": "chat" if conversation.chat else "sheet",
            "created": now,
            "nodes": {root: {"id": root, "parent": None, "children": [], "by": "you", "text": ""}},
            "root": root,
            "generations": {},
        }
    for piece in pieces:
        if piece.node is None:
            parent = sheet["root"] if piece.parent is None else pieces[piece.parent].node
            assert parent is not None
            piece.node = _add(sheet, parent, piece, conversation.model)
    current = sheet["root"] if conversation.current is None else pieces[conversation.current].node
    sheet |= {"changed": now, "model": conversation.model, "settings": _written_settings(settings), "current": current}
    return sheet


def _add(sheet: dict[str, Any], parent: str, piece: Piece, model: str) -> str:
    """Add a piece to a sheet as a node; return its id."""
    node: dict[str, Any] = {
        "id": _new_id(),
        "parent": parent,
        "children": [],
        "by": "you" if piece.author == "user" else "model",
    }
    if piece.generated:
        generation = _generation(piece, model)
        sheet["generations"][generation["id"]] = generation
        node |= {"generation": generation["id"], "from": 0, "to": len(generation["tokens"])}
    else:
        node["text"] = piece.text
    sheet["nodes"][node["id"]] = node
    sheet["nodes"][parent]["children"].append(node["id"])
    return str(node["id"])


def _generation(piece: Piece, model: str) -> dict[str, Any]:
    request, tokens = (piece.settings or ReplySettings()).written(), piece.tokens or []
    request.pop("system", None)  # it is in the prompt
    return {
        "id": _new_id(),
        "model": model,
        "fingerprint": piece.fingerprint,
        "seed": piece.seed,
        "request": {"model": model} | request,
        "prompt_ids": piece.prompt,
        "tokens": [
            {"id": token, "text": text, "logprob": None, "top": []}
            for token, text in zip(tokens, piece.texts, strict=True)
        ],
        "finish": piece.finish,
        "usage": None if piece.usage is None else _written_usage(piece.usage),
        "timings": None,
        "created": datetime.now(UTC).isoformat(),
    }


def _new_id() -> str:
    return secrets.token_hex(5)
