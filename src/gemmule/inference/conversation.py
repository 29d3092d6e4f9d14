"""A conversation with a model, or a text written with it: pieces, their branches, and the prompt that they make."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator, Field

from gemmule.fields import LARGEST_REQUEST_SEED, Count, CountFrom0, Noun
from gemmule.inference.sampling import STORYTELLING, SamplingSettings
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import render_chat

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
    prompt: tuple[int, ...] | None = None  # what the model read, in the first one alone; None where unknown


@dataclass
class Piece:
    """A turn of a chat, or a piece of a text: the user's, or the model's with all that repeats it.

    `tokens` are those of the text, None where unknown: of the user's without bos, of the model's without the stop
    token that ended it. A piece of the model without a seed was not generated as it is. `parent` is the number of the
    piece before it.
    """

    author: Author
    text: str
    tokens: list[int] | None = None
    settings: ReplySettings | None = None
    seed: int | None = None
    fingerprint: str | None = None
    finish: str | None = None
    parent: int | None = None
    usage: Usage | None = None
    texts: list[str] = field(default_factory=list)  # of the model's tokens
    prompt: list[int] | None = None  # tokens that the model read before this reply
    continues: bool = False  # whether it is the rest of a reply that begins with its parent
    node: str | None = None  # its id in a file

    @property
    def generated(self) -> bool:
        """Whether it can be repeated."""
        return self.seed is not None and self.tokens is not None and self.prompt is not None

    def extend(self, chunk: Chunk) -> None:
        """Add what comes next of a reply; text without a token belongs to the last one."""
        self.text += chunk.text
        self.finish, self.usage = chunk.finish or self.finish, chunk.usage or self.usage
        if chunk.prompt is not None:
            self.prompt = [*chunk.prompt]
        if chunk.tokens:
            self.tokens = [*(self.tokens or ()), *chunk.tokens]
            self.texts += [chunk.text, *[""] * (len(chunk.tokens) - 1)]
        elif self.texts:
            self.texts[-1] += chunk.text

    def end(self) -> None:
        """Leave out the stop token of a reply that has ended; beside stop strings it cannot be known as such."""
        if self.finish == "stop" and self.tokens and not (self.settings and self.settings.stop):
            self.tokens.pop()
            text = self.texts.pop()
            if self.texts:
                self.texts[-1] += text


class ChatModel(Protocol):
    """Who replies: a model in this process, or a server."""

    chats: bool
    context: int | None
    trained_context: int | None  # sequence length of training, where known
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
    sheet: dict[str, Any] | None = None  # as it is in a file, which may hold more than is read here

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
    """Return a chat as messages with roles; successive pieces of the same author are one message."""
    messages = [{"role": "system", "content": system}] if system else []
    for piece in pieces:
        role, between = ("user", "\n\n") if piece.author == "user" else ("assistant", "")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += between + piece.text
        else:
            messages.append({"role": role, "content": piece.text})
    return messages


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text within another one: special tokens as ordinary text, without bos."""
    ids = tokenizer.encode(text)
    return ids[1:] if tokenizer.adds_bos else ids


def text_ids(pieces: Sequence[Piece], start: Sequence[int], encode: Callable[[str], list[int]]) -> list[int]:
    """Return the tokens of a text written together: what a text begins with (bos), then those of each piece.

    Where its tokens are unknown, and of a reply whose text may have been cut at a stop string, those that its text is
    encoded to.
    """
    ids: list[int] = []
    for piece in pieces:
        cut = piece.finish == "stop" and piece.settings is not None and piece.settings.stop
        ids += encode(piece.text) if piece.tokens is None or cut else piece.tokens
    return ids if start and ids[: len(start)] == [*start] else [*start, *ids]


def prompt_ids(tokenizer: Tokenizer, pieces: Sequence[Piece], chat: bool, system: str = "") -> list[int]:
    """Return what the model reads before it replies to the pieces; SourceError where a chat is not the user's last."""
    if chat:
        return render_chat(tokenizer, messages_of(pieces, system), reply=True).ids
    return text_ids(pieces, tokenizer.encode(""), lambda text: encode_piece(tokenizer, text))
