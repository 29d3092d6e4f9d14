"""A conversation with a model, or a text written with it: its pieces, their branches, and the file that keeps it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

from pydantic import BeforeValidator, Field

from gemmule.errors import RecipeError, SourceError
from gemmule.fields import LARGEST_REQUEST_SEED, Count, CountFrom0, Noun
from gemmule.files import atomic_write
from gemmule.inference.sampling import STORYTELLING, SamplingSettings
from gemmule.settings import check_recipe
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import render_chat

FORMAT, VERSION = "gemmule-conversation", 1
SHEETS_FORMAT = "gemmule-sheets"  # of the server's page
Author = Literal["user", "model"]


def _as_texts(given: object) -> object:
    """Turn one text, or a list, into the tuple that is kept."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, list) else given


class ReplySettings(SamplingSettings):
    """How one reply is made, under the names of the HTTP API; the defaults are its defaults."""

    max_tokens: Count | None = Field(None, description="tokens of a reply at most; by default what the context leaves")
    min_tokens: CountFrom0 = Field(0, description="before so many tokens no stop token is drawn")
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_texts), Noun("a text, or a list of texts")
    ] = Field((), description="texts before which a reply ends")
    system: str = Field("", description="what a chat begins with, before the first turn")
    seed: Annotated[int, Field(ge=0, le=LARGEST_REQUEST_SEED)] | None = Field(
        None, description="seed of the next reply, those after it have the seeds that follow; by default drawn"
    )

    @property
    def sampling(self) -> SamplingSettings:
        """The settings of sampling alone."""
        return SamplingSettings(**{name: getattr(self, name) for name in SamplingSettings.model_fields})

    def written(self) -> dict[str, Any]:
        """Return what is written beside a piece: temperature, and all that is not the default, without the seed."""
        given = self.model_dump(mode="json", exclude_defaults=True, exclude={"seed"})
        return {"temperature": self.temperature} | given


# What `gemmule chat` begins with: the sampling of the commands, and replies of a length that one reads.
INITIAL = ReplySettings(temperature=STORYTELLING.temperature, min_p=STORYTELLING.min_p, max_tokens=256)


class Usage(NamedTuple):
    """What a reply took: tokens of the prompt, how many of them were cached, tokens generated, seconds for those."""

    prompt: int
    cached: int
    generated: int
    seconds: float


class Chunk(NamedTuple):
    """What comes next of a reply; `finish` is "stop", "length" or "stopped" (by the user), in the last one alone."""

    text: str
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


@dataclass
class Piece:
    """A turn of a chat, or a piece of a text: the user's, or the model's with all that repeats it.

    `tokens` of the model's are those that were generated, the stop token included; of the user's, without bos. A piece
    of the model without a seed was not generated, but edited. `parent` is the number of the piece before it.
    """

    author: Author
    text: str
    tokens: list[int] | None = None
    settings: ReplySettings | None = None
    seed: int | None = None
    fingerprint: str | None = None
    finish: str | None = None
    prompt_tokens: list[int] | None = None  # where the writer of the file tells what the model read
    parent: int | None = None
    usage: Usage | None = None  # not kept in files

    @property
    def generated(self) -> bool:
        """Whether it can be repeated."""
        return self.author == "model" and self.seed is not None and self.tokens is not None


class ChatModel(Protocol):
    """Who replies: a model in this process, or a server."""

    chats: bool
    context: int | None
    fingerprint: str | None

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of a user's text, special tokens as ordinary text, without bos; None where unknown."""

    def reply(self, pieces: Sequence[Piece], settings: ReplySettings, seed: int) -> Iterator[Chunk]:
        """Yield a reply to the pieces so far; UserError where the model cannot give one."""

    def stop(self) -> None:
        """End the reply that is being made, from a signal handler, too."""


@dataclass
class Conversation:
    """A tree of pieces, and the one after which it continues; each piece's parent has a smaller number."""

    chat: bool
    model: str = ""
    pieces: list[Piece] = field(default_factory=list)
    current: int | None = None

    def add(self, piece: Piece) -> Piece:
        """Append a piece after the current one, which is the current one then."""
        piece.parent, self.current = self.current, len(self.pieces)
        self.pieces.append(piece)
        return piece

    def path(self, end: int | None = None) -> list[int]:
        """Return the numbers of the pieces from the first to `end`, by default the current one."""
        number = self.current if end is None else end
        found: list[int] = []
        while number is not None:
            found.append(number)
            number = self.pieces[number].parent
        return found[::-1]

    def shown(self) -> list[Piece]:
        """Return the pieces from the first to the current one."""
        return [self.pieces[number] for number in self.path()]

    def branches(self) -> list[int]:
        """Return the numbers of the pieces that no other follows: where each branch ends."""
        parents = {piece.parent for piece in self.pieces}
        return [number for number in range(len(self.pieces)) if number not in parents]


def messages_of(pieces: Sequence[Piece], system: str) -> list[dict[str, str]]:
    """Return a chat as messages with roles."""
    roles = {"user": "user", "model": "assistant"}
    messages = [{"role": roles[piece.author], "content": piece.text} for piece in pieces]
    return [{"role": "system", "content": system}, *messages] if system else messages


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text within another one: special tokens as ordinary text, without bos."""
    ids = tokenizer.encode(text)
    return ids[1:] if tokenizer.adds_bos else ids


def text_ids(pieces: Sequence[Piece], start: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """Return the tokens of a text written together: what a text begins with (bos), then those of each piece.

    Of a reply that a stop token ended, without that one; where its text may have been cut at a stop string, and where
    its tokens are unknown, those that its text is encoded to.
    """
    ids: list[int] = []
    for piece in pieces:
        ended = piece.author == "model" and piece.finish == "stop"
        if piece.tokens is None or (ended and piece.settings is not None and piece.settings.stop):
            ids += encode(piece.text)
        else:
            ids += piece.tokens[:-1] if ended else piece.tokens
    return ids if start and ids[: len(start)] == [*start] else [*start, *ids]


def prompt_ids(tokenizer: Tokenizer, pieces: Sequence[Piece], chat: bool, system: str = "") -> list[int]:
    """Return what the model reads before it replies to the pieces; SourceError where a chat is not the user's last."""
    if chat:
        return render_chat(tokenizer, messages_of(pieces, system), reply=True).ids
    return text_ids(pieces, tokenizer.encode(""), lambda text: encode_piece(tokenizer, text))


def write_conversation(path: Path, conversation: Conversation, settings: ReplySettings) -> None:
    """Write a conversation with all of its branches; SourceError rather than over a file of another kind."""
    if path.exists():
        try:
            read_conversation(path)
        except SourceError:
            raise SourceError(f"{path}: is there, and no conversation; name another file") from None
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "chat": conversation.chat,
        "settings": settings.written() | ({} if settings.seed is None else {"seed": settings.seed}),
        "current": conversation.current,
    }
    head = json.dumps(document, ensure_ascii=False).removesuffix("}")
    pieces = ",\n".join(json.dumps(_written(piece), ensure_ascii=False) for piece in conversation.pieces)
    with atomic_write(path) as temporary:
        temporary.write_text(f'{head}, "pieces": [\n{pieces}\n]}}\n', encoding="utf-8")


def _written(piece: Piece) -> dict[str, Any]:
    names = ("author", "text", "tokens", "settings", "seed", "fingerprint", "finish", "prompt_tokens", "parent")
    found = {name: getattr(piece, name) for name in names}
    if piece.settings is not None:
        found["settings"] = piece.settings.written()
    return {name: value for name, value in found.items() if value is not None or name == "parent"}


class Saved(NamedTuple):
    """What a file keeps: the conversation, and the settings of its next reply."""

    conversation: Conversation
    settings: ReplySettings


def read_conversation(path: Path) -> Saved:
    """Read a conversation: ours, or another list of pieces in the same form; SourceError names what is wrong with it.

    Where pieces have no `parent`, each follows the one before. Settings that have no meaning here are left out.
    """
    document = _read_json(path)
    given = next(
        (document[name] for name in ("pieces", "turns") if isinstance(document, dict) and name in document), None
    )
    if not isinstance(document, dict) or not isinstance(given, list):
        raise SourceError(f"{path}: no conversation; it has no list of pieces or turns")
    if document.get("version", VERSION) != VERSION:
        raise SourceError(f"{path}: a conversation of version {document['version']}; this Gemmule reads {VERSION}")
    try:
        pieces = [_read_piece(number, piece) for number, piece in enumerate(given)]
        settings = read_settings(document.get("settings", {}))
        current = document.get("current", len(pieces) - 1 if pieces else None)
        if current is not None and not (_is_count(current) and current < len(pieces)):
            raise SourceError(f"current = {current!r}: must be the number of a piece, counted from 0")
    except (SourceError, RecipeError) as error:
        raise SourceError(f"{path}: {error}") from None
    chat = bool(document.get("chat", "turns" in document))
    return Saved(Conversation(chat, str(document.get("model", "")), pieces, current), settings)


def read_replies(path: Path) -> Conversation:
    """Read a conversation, or what the server's page exports, as pieces of the model with what it read before them.

    Errors as in `read_conversation`. Tokens that the user chose on the page have no seed.
    """
    document = _read_json(path)
    if not isinstance(document, dict) or document.get("format") != SHEETS_FORMAT:
        return read_conversation(path).conversation
    try:
        generations = [each for sheet in document["sheets"] for each in sheet["generations"].values()]
        pieces = [
            {
                "author": "model",
                "text": "".join(token["text"] for token in each["tokens"]),
                "tokens": [token["id"] for token in each["tokens"]],
                "settings": each.get("request") or {},
                "seed": None if each.get("chosen") else each.get("seed"),
                "fingerprint": each.get("fingerprint"),
                "prompt_tokens": each["prompt_ids"],
                "parent": None,
            }
            for each in generations
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: a damaged file of {SHEETS_FORMAT}: {error!r:.80}") from None
    try:
        return Conversation(False, "", [_read_piece(number, piece) for number, piece in enumerate(pieces)])
    except (SourceError, RecipeError) as error:
        raise SourceError(f"{path}: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is no JSON file: {error}") from None


def read_settings(given: object) -> ReplySettings:
    """Read settings, those alone that there are; RecipeError where one is out of range, SourceError for no table."""
    if not isinstance(given, Mapping):
        raise SourceError(f"settings = {given!r:.60}: must be an object")
    known = {name: value for name, value in given.items() if name in ReplySettings.model_fields and value is not None}
    return check_recipe(known, ReplySettings, "of the conversation")


def _read_piece(number: int, given: object) -> Piece:
    place = f"piece {number + 1}"
    if not isinstance(given, dict):
        raise SourceError(f"{place}: must be an object with author and text")
    author, text = given.get("author"), given.get("text")
    if author not in ("user", "model"):
        raise SourceError(f'{place}: author = {author!r:.60}: must be "user" or "model"')
    if not isinstance(text, str):
        raise SourceError(f"{place}: text = {text!r:.60}: must be text")
    for name in ("tokens", "prompt_tokens"):
        ids = given.get(name)
        if ids is not None and not (isinstance(ids, list) and all(map(_is_count, ids))):
            raise SourceError(f"{place}: {name}: must be a list of token ids")
    seed, parent = given.get("seed"), given.get("parent", number - 1 if number else None)
    if seed is not None and not (_is_count(seed) and seed <= LARGEST_REQUEST_SEED):
        raise SourceError(f"{place}: seed = {seed!r:.60}: must be from 0 to {LARGEST_REQUEST_SEED}")
    if parent is not None and not (_is_count(parent) and parent < number):
        raise SourceError(f"{place}: parent = {parent!r:.60}: must be the number of an earlier piece, counted from 0")
    return Piece(
        author=cast(Author, author),
        text=text,
        tokens=given.get("tokens"),
        settings=read_settings(given["settings"]) if given.get("settings") is not None else None,
        seed=seed,
        fingerprint=given.get("fingerprint"),
        finish=given.get("finish"),
        prompt_tokens=given.get("prompt_tokens"),
        parent=parent,
    )


def _is_count(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0
