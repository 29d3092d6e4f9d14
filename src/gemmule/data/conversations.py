"""Rows of conversations, preferences and prompts: every common form becomes one canonical JSON, or an error."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from gemmule.data.documents import Document
from gemmule.data.settings import DataSettings
from gemmule.errors import SourceError
from gemmule.tokenizer.chat import read_turns

Messages = list[dict[str, str]]

# The names that other programs give to roles.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
# Columns with a whole conversation, as a list of messages.
_LISTS = ("messages", "conversations", "conversation")
_INSTRUCTION = ("instruction", "input", "output")
# Columns that are read, by the kind of the data; None: all of them.
COLUMNS: dict[str, frozenset[str] | None] = {
    "conversations": frozenset({*_LISTS, "prompt", "completion", *_INSTRUCTION, "system"}),
    "preferences": frozenset({"prompt", "chosen", "rejected", "instruction", "input", "system"}),
    "prompts": None,
}
_FORMS = {
    "conversations": "messages, conversations (from, value), prompt and completion, or instruction, input and output",
    "preferences": "prompt, chosen and rejected",
    "prompts": "messages, or prompt",
}


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row as the canonical JSON that is its document."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=str)


def row_document(row: Mapping[str, Any], settings: DataSettings, where: Callable[[], str]) -> Document:
    """Return the document of a row of `settings.kind`: canonical JSON with "messages" of "role" and "content".

    Preferences have the replies "chosen" and "rejected" besides, prompts the rest of the row as "task"; the messages of
    both end with the user's. Raises SourceError, with what `where` calls the row, where it cannot be learned from.
    """
    try:
        return Document(row_text(READERS[settings.kind](row, settings.column)))
    except SourceError as error:
        raise SourceError(f"{where()}: {error}") from None


def check_columns(names: Collection[str], settings: DataSettings, where: str) -> None:
    """Raise SourceError where no column of a table is one that its kind is read from."""
    known = {*(COLUMNS[settings.kind] or _LISTS), "prompt", *_named(settings.column)} - {"system"}
    if known.isdisjoint(names):
        raise SourceError(f"{where}: {_no_columns(names, settings.kind)}")


def contents_of(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text of a canonical row: messages, then replies."""
    yield from (message["content"] for message in row["messages"])
    yield from (row[name] for name in ("chosen", "rejected") if name in row)


def with_contents(row: Mapping[str, Any], contents: Sequence[str]) -> dict[str, Any]:
    """Return a canonical row with other texts, in the order of `contents_of`."""
    given = iter(contents)
    messages = [{**message, "content": next(given)} for message in row["messages"]]
    replies = {name: next(given) for name in ("chosen", "rejected") if name in row}
    return {**row, "messages": messages, **replies}


def _conversation(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    messages = _with_system(row, _whole_conversation(row, column))
    read_turns(messages)
    if all(message["role"] != "assistant" for message in messages):
        raise SourceError("has no reply to learn from; add a message of the assistant, or remove the row")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not message["content"].strip():
            raise SourceError(f"message {number}: the reply is empty; write one, or remove the row")
    return {"messages": messages}


def _whole_conversation(row: Mapping[str, Any], column: str) -> Messages:
    for name in (*_named(column), *_LISTS):
        if row.get(name) is not None:
            return _read_messages(row[name], name)
    if row.get("prompt") is not None and "completion" in row:
        return [*_spoken(row["prompt"], "user", "prompt"), *_spoken(row["completion"], "assistant", "completion")]
    if "instruction" in row and "output" in row:
        return [*_instruction(row), {"role": "assistant", "content": _text(row["output"], "output")}]
    raise SourceError(_no_columns(row, "conversations"))


def _preference(row: Mapping[str, Any], _column: str) -> dict[str, Any]:
    if "chosen" not in row or "rejected" not in row:
        raise SourceError(_no_columns(row, "preferences"))
    chosen, rejected = (_spoken(row[name], "assistant", name) for name in ("chosen", "rejected"))
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise SourceError(f"{name} does not end with a message of the assistant")
        if not messages[-1]["content"].strip():
            raise SourceError(f"{name} is empty; write a reply, or remove the row")
    if chosen[:-1] != rejected[:-1]:
        raise SourceError("chosen and rejected answer different prompts; all messages before the reply must be equal")
    prompt, context = _given_prompt(row), chosen[:-1]
    if prompt is None and not context:
        raise SourceError("has no prompt: add a column prompt, or let chosen and rejected begin with the user's words")
    if prompt and context and prompt != context and prompt[-1] not in context:
        raise SourceError("prompt is not what chosen and rejected answer; make them agree, or leave prompt out")
    messages = _with_system(row, context or prompt or [])
    read_turns([*messages, chosen[-1]])
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise SourceError("chosen is equal to rejected, so there is nothing to prefer; remove the row")
    return {"messages": messages, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _prompt(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    name = next((name for name in (*_named(column), *_LISTS, "prompt") if row.get(name) is not None), None)
    if name is None:
        raise SourceError(_no_columns(row, "prompts"))
    messages = _with_system(row, _spoken(row[name], "user", name))
    if read_turns(messages)[-1].role == "model":
        raise SourceError(f"{name} ends with a reply; a prompt ends with the user's message")
    task = row.get("task")
    rest = {key: value for key, value in row.items() if key not in (name, "system")}
    return {"messages": messages, "task": dict(task) if isinstance(task, Mapping) else rest}


# By data.kind: (row, data.column) -> the row in its canonical form.
READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "conversations": _conversation,
    "preferences": _preference,
    "prompts": _prompt,
}


def _given_prompt(row: Mapping[str, Any]) -> Messages | None:
    if row.get("prompt") is not None:
        return _spoken(row["prompt"], "user", "prompt")
    return _instruction(row) if row.get("instruction") is not None else None


def _instruction(row: Mapping[str, Any]) -> Messages:
    parts = [_text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")]
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]


def _spoken(value: Any, role: str, name: str) -> Messages:
    """Return the messages of a column: a list of them, or the text of one."""
    if isinstance(value, str) and not _is_json_list(value):
        return [{"role": role, "content": value}]
    return _read_messages(value, name)


def _read_messages(value: Any, name: str) -> Messages:
    """Return a list of messages, given as role and content or as from and value, or as JSON in a column of text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise SourceError(f"{name} is text, not a list of messages with role and content") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise SourceError(f"{name} is {_described(value)}, not a list of messages with role and content")
    messages: Messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise SourceError(f"{name}, message {number}: is {_described(message)}, not an object of role and content")
        role = str(message.get("role") or message.get("from"))
        content = message.get("content") if message.get("content") is not None else message.get("value")
        messages.append({"role": _ROLES.get(role, role), "content": _text(content, f"{name}, message {number}")})
    return messages


def _text(content: Any, name: str) -> str:
    """Return a content: text, or the text of a list of parts that are all text."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type", "text")) for part in content} - {"text"}
        if kinds:
            raise SourceError(f"{name}: its content has parts of type {', '.join(sorted(kinds))}; only text is learned")
        return "".join(_text(part.get("text"), name) for part in content)
    if not isinstance(content, str):
        raise SourceError(f"{name}: its content is {_described(content)}, not text")
    return content


def _with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """Prepend the text of a column `system`, where there is one and the messages bring none."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _is_json_list(text: str) -> bool:
    """Whether a text is a list of messages as JSON, as tables without lists hold them."""
    if not text.startswith("[") or not text.rstrip().endswith("]"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)


def _named(column: str) -> set[str]:
    """Return the column that data.column names; its default is one of text."""
    return set() if column == "text" else {column}


def _no_columns(names: Collection[str], kind: str) -> str:
    shown = ", ".join(map(repr, list(names)[:20])) or "none"
    return f'data.kind = "{kind}" needs the columns {_FORMS[kind]}; there are {shown}'


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    return "an empty list" if value == [] else type(value).__name__
