"""Grammars of llguidance, compiled within limits: first in a child process, which may crash or run out of time.

`python -m gemmule.inference.constraint_check` is that child; it loads neither torch nor numpy.
"""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from gemmule.errors import GemmuleError, MissingExtra
from gemmule.processes import peak_memory, python_module_command

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_schema", "regex", "grammar"]

DEAD_END = "NoExtensionBias"  # llguidance: no token can come next, and the grammar is not complete
# JSON's own rule allows whitespace without end, in which a small model stays. This is enough to indent.
_WHITESPACE = r" |\n\n?[ \t]{0,20}"
# Of the child. Its stack is an eighth of the one that threads of the parent have, where the same grammar is used later.
_CPU_SECONDS, _WALL_SECONDS = 3, 60
_MEMORY, _STACK = 512 << 20, 1 << 20  # bytes
_STEPS = 64  # tokens that the child lets the grammar accept
_MARK = b"\xff"  # llguidance: what follows is the name of a special token


class ConstraintError(ValueError):
    """What llguidance says about a grammar."""


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary as llguidance reads it; its attributes are those of llguidance's `TokenizerWrapper`."""

    tokens: Sequence[bytes]
    eos_token_id: int | None
    tokenize: Callable[[str], list[int]]
    bos_token_id: int | None = None
    special_token_ids: Sequence[int] = ()
    is_tokenizer_wrapper: bool = True

    def __call__(self, text: str) -> list[int]:
        """Return the canonical tokens of a text, to which the mask is narrowed where a grammar forces that text."""
        return self.tokenize(text)


@dataclass(frozen=True)
class Job:
    """What the child compiles."""

    kind: Kind
    text: str
    special_tokens: Sequence[str] = ()  # that a grammar may name
    vocab_size: int = 0  # at least, for grammars that name tokens by their ids


class Verdict(NamedTuple):
    """What the child found: the error, None for a good grammar, and the memory that it takes, in bytes."""

    error: str | None
    memory: int


def special_token(name: bytes) -> bytes:
    """Return a special token as llguidance writes it."""
    return _MARK + name


def text_token(piece: bytes) -> bytes:
    """Return a token of text as llguidance writes it; one that UTF-8 never contains is left out."""
    return b"" if piece.startswith(_MARK) else piece


def compile_grammar(kind: Kind, text: str, vocabulary: "LLTokenizer") -> "LLMatcher":
    """Compile a grammar for a vocabulary, its first mask included; ConstraintError says what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        if kind == "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        else:
            grammar = LLMatcher.grammar_from_lark(text)
    except ValueError as error:
        raise ConstraintError(sentence_of(str(error))) from None
    limits = LLParserLimits(max_lexer_states=20_000, max_grammar_size=50_000, verbose_errors=False)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    problem = sentence_of(matcher.get_error())
    if problem and problem != DEAD_END:
        raise ConstraintError(problem)
    if problem or not mask & ~sum(1 << stop for stop in vocabulary.eos_tokens):
        raise ConstraintError("no text satisfies it, or only the empty one")
    return matcher


def sentence_of(message: str) -> str:
    """Return a message of llguidance in one line, without its traces, of at most 300 characters."""
    for trace in ("<non-verbose/>", "<backtrace>", "<state>"):
        message = message.split(trace)[0]
    sentence = " ".join(message.split())
    return sentence if len(sentence) <= 300 else f"{sentence[:200]} ... {sentence[-95:]}"


def check_grammar(job: Job) -> Verdict:
    """Compile a grammar in a child process of limited time, memory and stack; return what became of it."""
    child = subprocess.Popen(
        python_module_command("gemmule.inference.constraint_check"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "RUST_BACKTRACE": "0"},
    )
    with child:
        try:
            output, errors = child.communicate(json.dumps(asdict(job)).encode(), _WALL_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
        except BaseException:
            child.kill()
            raise
    started, _, result = output.decode().partition("\n")
    if not started:
        reason = (errors.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise GemmuleError(f"the process that checks constraints ended with {child.returncode}: {reason:.200}")
    if result:
        return Verdict(**json.loads(result))
    limits = f"{_CPU_SECONDS} seconds or {_MEMORY >> 20} MB, or goes too deep"
    return Verdict(f"it is too complex: compiling it takes over {limits}; simplify it", _MEMORY)


def _compile_and_walk(job: Job) -> Verdict:
    """Compile, and accept some tokens, so that a grammar that is slow at each of them is found."""
    from llguidance import LLTokenizer

    tokens = [text_token(bytes([byte])) for byte in range(256)]
    tokens += [special_token(name.encode()) for name in job.special_tokens]
    tokens += [b""] * (job.vocab_size - len(tokens))
    vocabulary = LLTokenizer(TokenTable(tokens, None, lambda text: list(text.encode())))
    before = peak_memory()
    try:
        matcher = compile_grammar(job.kind, job.text, vocabulary)
    except ConstraintError as error:
        return Verdict(str(error), 0)
    for step in range(_STEPS):
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if matcher.is_stopped() or not allowed or not matcher.consume_token(allowed[step * 7919 % len(allowed)]):
            break
    problem = sentence_of(matcher.get_error())
    if problem and problem != DEAD_END:
        return Verdict(f"it is too complex: {problem}", 0)
    return Verdict(None, peak_memory() - before)


def _main() -> None:
    try:
        import llguidance  # noqa: F401 - what takes time is loaded before time is counted
    except ImportError:
        raise MissingExtra("llguidance", "constraints", "a constraint") from None
    job = Job(**json.loads(sys.stdin.buffer.read()))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + _CPU_SECONDS
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS has no limit of memory
            resource.setrlimit(limit, (value, value))
    print("started", flush=True)  # noqa: T201 - the parent reads it
    threading.stack_size(_STACK)
    worker = threading.Thread(target=lambda: print(json.dumps(_compile_and_walk(job)._asdict())))  # noqa: T201
    worker.start()
    worker.join()


if __name__ == "__main__":
    _main()
