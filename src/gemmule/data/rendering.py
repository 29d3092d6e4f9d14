"""Rows of conversations, preferences and prompts as tokens, with the mask of what is trained on."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gemmule.data.conversations import contents_of
from gemmule.data.corpus import Corpus
from gemmule.data.intermediate import StoredText
from gemmule.errors import DatasetError, RecipeError
from gemmule.settings import Problem
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import Rendered, read_turns, render_chat, turn_tokens

# Documents per row, where there are several: the chosen reply, then the rejected one.
DOCUMENTS_PER_ROW = {"preferences": 2}
ROWS_SUFFIX = ".jsonl"  # of the file beside a shard of prompts with their rows


class EncodedDocument(NamedTuple):
    """A tokenized document with its loss mask."""

    ids: list[int]
    size: int  # bytes of UTF-8 of its texts
    predicted_bytes: int  # of the trained tokens
    restored: bool  # whether decoding gives the same text
    trained: list[bool]
    special_spellings: int  # messages that spell a special token


def check_tokenizer(tokenizer: Tokenizer | None, kind: str) -> None:
    """Raise RecipeError where there is no tokenizer yet, TokenizerError where it has no turns."""
    if tokenizer is None:
        advice = "needs a tokenizer that exists: set train.start to a model, or tokenizer.path (--tokenizer)"
        raise RecipeError(str(Problem("data.kind", kind, advice)))
    turn_tokens(tokenizer)


def encode_rows(rows: Iterable[StoredText], tokenizer: Tokenizer, kind: str) -> Iterator[EncodedDocument]:
    """Yield the documents of rows in canonical JSON: one each, and of preferences two, chosen and rejected."""
    token_bytes, spellings = tokenizer.token_bytes(), list(tokenizer.special_tokens.values())
    for stored in rows:
        row = json.loads(stored.text)
        spelled = sum(any(name in content for name in spellings) for content in contents_of(row))
        for messages, rendered in _render(row, tokenizer, kind):
            turns = [turn._asdict() for turn in read_turns(messages)]
            written = "".join(f"{turn['role']}\n{turn['text']}\n" for turn in turns)
            written += "model\n" if kind == "prompts" else ""
            yield EncodedDocument(
                rendered.ids,
                sum(len(turn["text"].encode()) for turn in turns),
                sum(token_bytes[token] for token, own in zip(*rendered, strict=True) if own),
                tokenizer.restores([written], [rendered.ids])[0],
                rendered.trained,
                spelled,
            )
            spelled = 0  # of a pair, counted once


def _render(row: Mapping[str, Any], tokenizer: Tokenizer, kind: str) -> Iterator[tuple[list[dict[str, str]], Rendered]]:
    """Yield the messages of each document of a row, and their tokens; of a pair the last reply alone is trained."""
    messages = row["messages"]
    if kind == "conversations":
        yield messages, render_chat(tokenizer, messages)
        return
    prompt = render_chat(tokenizer, messages, reply=True)
    untrained = [False] * len(prompt.ids)
    if kind == "prompts":
        yield messages, Rendered(prompt.ids, untrained)
        return
    for name in ("chosen", "rejected"):
        whole = [*messages, {"role": "assistant", "content": row[name]}]
        rendered = render_chat(tokenizer, whole)
        yield whole, Rendered(rendered.ids, untrained + rendered.trained[len(untrained) :])


def read_prompts(corpus: Corpus) -> list[dict[str, Any]]:
    """Return the row of each prompt of a corpus, in order: its "messages", and its "task"."""
    rows: list[dict[str, Any]] = []
    for shard in corpus.shards:
        file = shard.path.with_suffix(ROWS_SUFFIX)
        try:
            own = [json.loads(line) for line in file.read_bytes().splitlines()]  # of text, at U+2028, too
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file}: cannot be read ({error}); prepare the data again") from None
        if len(own) != shard.header.documents:
            raise DatasetError(f"{file}: has {len(own)} rows for {shard.header.documents} prompts; prepare again")
        rows += own
    return rows
