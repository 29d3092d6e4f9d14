"""Constrained decoding: replies that match a JSON schema, a regular expression or a grammar, by llguidance."""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemmule.errors import MissingExtra, RecipeError, TokenizerError
from gemmule.inference.constraint_check import (
    DEAD_END,
    ConstraintError,
    Job,
    Kind,
    TokenTable,
    check_grammar,
    compile_grammar,
    sentence_of,
    special_token,
    text_token,
)
from gemmule.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST = 1 << 16  # bytes of a schema, regular expression or grammar
DEEPEST = 64  # levels of objects and lists in a schema
_CACHED = 32  # compiled grammars that a compiler keeps,
_LARGEST_CACHED = 16 << 20  # of at most as many bytes
_CANONICAL = 512  # characters of a forced text whose canonical tokens are looked up; the next token is what counts
_NOT_ALLOWED = "doesn't satisfy the grammar"  # in llguidance's message
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


@dataclass(frozen=True)
class ConstraintSpec:
    """What a reply must match; hashable, and checked by its constructors for size, depth and references to URLs."""

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "ConstraintSpec":
        """Make the constraint of a JSON schema; properties come in its order. RecipeError where it is refused."""
        _check_schema(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"json_schema: not JSON ({error}); give a JSON schema") from None
        return cls("json_schema", _checked("json_schema", text))

    @classmethod
    def json_object(cls) -> "ConstraintSpec":
        """Make the constraint of any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "ConstraintSpec":
        """Make the constraint of a regular expression (Rust's syntax) that the whole reply matches."""
        return cls("regex", _checked("regex", pattern))

    @classmethod
    def grammar(cls, grammar: str) -> "ConstraintSpec":
        """Make the constraint of a grammar in llguidance's dialect of Lark."""
        return cls("grammar", _checked("grammar", grammar))


class ConstraintCompiler:
    """Compiles constraints for one tokenizer, from several threads; making it takes 1 second for 262,144 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Collection[int]) -> None:
        """Make a compiler for logits of `vocab_size` entries, of which `stop_tokens` end a complete reply.

        MissingExtra without llguidance; TokenizerError where a token's text depends on its neighbors (WordPiece).
        """
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise MissingExtra("llguidance", "constraints", "a constraint") from None
        if not tokenizer.concatenates:
            raise TokenizerError("a constraint needs a tokenizer of which each token has a text of its own, as BPE's")
        words = (vocab_size + 31) // 32
        specials = {index: name for index, name in tokenizer.special_tokens.items() if index < vocab_size}
        pieces = [text_token(tokenizer.piece(index)) for index in range(vocab_size)]
        for index, name in specials.items():
            pieces[index] = special_token(name.encode())
        # llguidance appends a stop token where there is none, and a grammar's <[*]> is any token, with text or without.
        self._within = np.packbits(np.arange(words * 32) < vocab_size, bitorder="little").view(np.int32)
        stops = sorted(stop for stop in stop_tokens if stop < vocab_size)
        self._vocab_size, self._specials = vocab_size, list(specials.values())
        table = TokenTable(pieces, stops[0] if stops else None, _CanonicalTokens(tokenizer, pieces))
        self._vocabulary = LLTokenizer(table, eos_token=stops or None)
        self._compiled: OrderedDict[ConstraintSpec, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: ConstraintSpec) -> "Constraint":
        """Return a constraint at its beginning, for one sequence.

        A new spec is first compiled in a child process (0.1 seconds), which bounds time and memory; repeated ones take
        microseconds. RecipeError says what is wrong with the spec.
        """
        with self._lock:
            matcher = self._compiled.get(spec)
            if matcher is not None:
                self._compiled.move_to_end(spec)
        return Constraint(spec.kind, matcher.deep_copy() if matcher else self._compile(spec), self._within)

    def _compile(self, spec: ConstraintSpec) -> "LLMatcher":
        job = Job(spec.kind, spec.text)
        if spec.kind == "grammar":
            names_ids = "<[" in spec.text
            job = Job(spec.kind, spec.text, self._specials, self._vocab_size if names_ids else 0)
        error, memory = check_grammar(job)
        if error is not None:
            raise RecipeError(f"{spec.kind}: {error}")
        try:
            matcher = compile_grammar(spec.kind, spec.text, self._vocabulary)
        except ConstraintError as error:
            raise RecipeError(f"{spec.kind}: {error}") from None
        if memory > _LARGEST_CACHED:
            return matcher
        with self._lock:
            self._compiled[spec] = matcher
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()


class _CanonicalTokens:
    """The tokens of a text within a reply, to which a mask is narrowed where a grammar forces that text."""

    def __init__(self, tokenizer: Tokenizer, pieces: Sequence[bytes]) -> None:
        self._tokenizer, self._count = tokenizer, len(pieces)
        self._of_byte = {piece[0]: index for index, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str) -> list[int]:
        """Return tokens that spell a text, canonical ones at its beginning, where the tokenizer leaves it as it is."""
        beginning, rest = text[:_CANONICAL], text[_CANONICAL:]
        ids = self._tokenizer.encode(beginning)[self._tokenizer.adds_bos :]
        spelt = b"".join(map(self._tokenizer.piece, ids)) == beginning.encode()
        if not spelt or max(ids, default=0) >= self._count:
            return self._in_bytes(text)
        return ids + self._in_bytes(rest)

    def _in_bytes(self, text: str) -> list[int]:
        return [self._of_byte[byte] for byte in text.encode() if byte in self._of_byte]


class Constraint:
    """The state of one constrained sequence: which tokens may come next. Not thread-safe."""

    def __init__(self, kind: Kind, matcher: "LLMatcher", within: npt.NDArray[np.int32]) -> None:
        self._kind, self._matcher, self._within = kind, matcher, within

    def allowed(self) -> npt.NDArray[np.int32]:
        """Return the bit mask of the tokens that may come next, (ceil(vocab_size / 32),).

        Token i is bit i % 32 of word i // 32, from the lowest. Where the constraint is finished these are the
        stop tokens alone, none without stop tokens. RecipeError where the grammar is too complex.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._failure()
        return np.frombuffer(mask, dtype=np.int32, count=len(self._within)) & self._within

    def accept(self, token: int) -> None:
        """Advance by a token of the sequence, a stop token included; it must be allowed.

        ValueError where it is not; RecipeError where the grammar is too complex.
        """
        if self._matcher.consume_token(token):
            return
        if _NOT_ALLOWED in self._matcher.get_error():
            raise ValueError(f"token {token} is not allowed by the constraint")
        raise self._failure()

    @property
    def complete(self) -> bool:
        """Whether the text so far satisfies the constraint, so that stop tokens are allowed."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether no text may come any more, so that the reply ends; not so before its first token."""
        return self._matcher.is_stopped()

    def _failure(self) -> RecipeError:
        problem = sentence_of(self._matcher.get_error())
        if problem == DEAD_END:
            return RecipeError(f"{self._kind}: no token of the vocabulary can continue this reply")
        return RecipeError(f"{self._kind}: it is too complex for this reply: {problem}")


def _checked(kind: Kind, text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RecipeError(f"{kind}: has a lone surrogate at character {error.start}; give valid Unicode") from None
    if size > LONGEST:
        raise RecipeError(f"{kind}: {size} bytes; at most {LONGEST} are accepted")
    return text


def _check_schema(schema: Mapping[str, Any]) -> None:
    """Raise RecipeError for a schema that is too large or nested too deeply, or refers to a URL."""
    if not isinstance(schema, Mapping):
        raise RecipeError(f"json_schema: is a {type(schema).__name__}; give a JSON object")
    level, values = [schema], 0
    for _ in range(DEEPEST):
        values += len(level)
        if values > LONGEST:
            raise RecipeError(f"json_schema: over {LONGEST} values; give a smaller schema")
        for each in level:
            if isinstance(each, Mapping):
                _check_references(each)
        level = [
            inner
            for each in level
            if isinstance(each, Mapping | list | tuple)
            for inner in (each.values() if isinstance(each, Mapping) else each)
        ]
        if not level:
            return
    raise RecipeError(f"json_schema: nested deeper than {DEEPEST} levels; use $defs and $ref")


def _check_references(schema: Mapping[str, Any]) -> None:
    for keyword in _REFERENCES:
        target = schema.get(keyword)
        if isinstance(target, str) and not target.startswith("#"):
            raise RecipeError(
                f"json_schema: {keyword} = {target:.100}: URLs are not fetched; move the schema into $defs and refer "
                "to it as #/$defs/NAME"
            )
