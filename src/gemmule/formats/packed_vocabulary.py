"""The vocabulary of a packed file: a byte-pair tokenizer as plain arrays, for programs without a tokenizer library.

Encoding by these arrays: the text is cut at the added tokens (the leftmost match, of several there the longest; a
special token that is matched stays text), each character becomes its id in `characters`, or the ids of its UTF-8 bytes
in `byte_tokens`, and adjacent ids are merged, the pair with the lowest rank first, the leftmost of equal ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import pre_tokenizers

from gemmule.errors import TokenizerError
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import END, START
from gemmule.tokenizer.pieces import WORD_MARK, merge_pairs
from gemmule.tokenizer.settings import BYTES
from gemmule.tokenizer.training import BOUNDARIES

Numbers = npt.NDArray[np.uint32]

_MARKED = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK}  # Gemma's normalizer
_ALTERATIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_CONDITIONS = ("single_word", "lstrip", "rstrip")
_NO_TOKEN = -1


class PackedVocabulary(NamedTuple):
    """The arrays of a vocabulary of V ids; ids that a tokenizer lacks are -1."""

    token_starts: Numbers  # (V + 1,): where in `token_texts` the text of each id begins, and where the last one ends
    token_texts: bytes  # what ids decode to, UTF-8 or parts of it; special tokens have no text
    characters: Numbers  # (n, 2): code point and id, by ascending code point
    byte_tokens: Numbers  # (256,): the ids of single bytes
    merges: Numbers  # (n, 3): left id, right id and merged id, by rank
    added_tokens: Numbers  # (n, 2): id, and 1 for a special token
    added_starts: Numbers  # (n + 1,): as `token_starts`, in `added_texts`
    added_texts: bytes  # what added tokens look like in a text, UTF-8
    bos: int  # the id that begins every text; -1: none does
    stops: tuple[int, ...]  # ids that end a reply
    start_of_turn: int
    end_of_turn: int
    chat: str  # "gemma" for a chat template with Gemma's turns, else empty


def pack_vocabulary(tokenizer: Tokenizer, rows: int) -> PackedVocabulary:
    """Return the arrays of a tokenizer for a model of `rows` ids.

    TokenizerError where the arrays could not say how it encodes.
    """
    _check(tokenizer)
    description = tokenizer.description
    vocabulary: Mapping[str, int] = description["model"]["vocab"]
    texts = [tokenizer.piece(token) for token in range(rows)]
    # Of a pair that is listed twice, the library uses the last rank.
    ranked = {pair: rank for rank, pair in enumerate(merge_pairs(description["model"]["merges"]))}
    pairs = sorted(ranked, key=ranked.__getitem__)
    merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    added = [token for token in description.get("added_tokens") or [] if token["content"]]
    added_texts = [token["content"].encode() for token in added]
    ends = (tokenizer.eos_id, tokenizer.end_of_turn_id)
    packed = PackedVocabulary(
        token_starts=_starts(texts),
        token_texts=b"".join(texts),
        characters=_array(_characters(vocabulary, marked=description.get("normalizer") is not None), 2),
        byte_tokens=np.array([vocabulary[name] for name in BYTES], dtype=np.uint32),
        merges=_array(merges, 3),
        added_tokens=_array([(token["id"], int(token["special"])) for token in added], 2),
        added_starts=_starts(added_texts),
        added_texts=b"".join(added_texts),
        bos=_id(tokenizer.bos_id, rows) if tokenizer.adds_bos else _NO_TOKEN,
        stops=tuple(sorted({token for token in ends if token is not None and token < rows})),
        start_of_turn=_id(tokenizer.start_of_turn_id, rows),
        end_of_turn=_id(tokenizer.end_of_turn_id, rows),
        chat="gemma" if _has_gemma_turns(tokenizer.chat_template) else "",
    )
    if problem := vocabulary_problem(packed, rows):
        raise TokenizerError(f"the model's tokenizer does not fit its {rows} vocabulary entries: {problem}")
    return packed


def vocabulary_problem(vocabulary: PackedVocabulary, rows: int) -> str | None:
    """Return what is wrong with the arrays of a vocabulary of `rows` ids as a clause, or None."""
    text = [token for token, special in vocabulary.added_tokens.tolist() if not special]
    groups = {
        "characters": vocabulary.characters[:, 1].tolist(),
        "byte_tokens": vocabulary.byte_tokens.tolist(),
        "merges": vocabulary.merges.ravel().tolist(),
        "added_tokens": text,
        "stops": vocabulary.stops,
        "bos": () if vocabulary.bos == _NO_TOKEN else (vocabulary.bos,),
    }
    for name, ids in groups.items():
        if wrong := [token for token in ids if not 0 <= token < rows]:
            return f"{name} has the id {wrong[0]}"
    for name, starts, texts in (
        ("token_starts", vocabulary.token_starts, vocabulary.token_texts),
        ("added_starts", vocabulary.added_starts, vocabulary.added_texts),
    ):
        if starts[0] or starts[-1] != len(texts) or (starts[1:] < starts[:-1]).any():
            return f"{name} is not ascending from 0 to {len(texts)}"
    points = vocabulary.characters[:, 0]
    if (points[1:] <= points[:-1]).any() or (points > 0x10FFFF).any():
        return "characters is not ascending"
    if vocabulary.added_tokens[:, 1].max(initial=0) > 1:
        return "added_tokens has a mark that is neither 0 nor 1"
    pairs = vocabulary.merges[:, :2]
    if len(np.unique(pairs, axis=0)) != len(pairs):
        return "merges has a pair twice"
    return None


def _check(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError where the arrays could not say how a tokenizer encodes and decodes."""
    description = tokenizer.description
    model = description["model"]
    if problem := _model_problem(model) or _text_problem(description) or _added_problem(tokenizer):
        advice = "only byte-pair encoding with byte fallback can be packed, such as Gemma's and Gemmule's"
        raise TokenizerError(f"the model's tokenizer {problem}; {advice}")
    if tokenizer.encode("") not in ([], [tokenizer.bos_id]):
        raise TokenizerError("the model's tokenizer adds more to a text than bos, which a packed file cannot say")
    if not tokenizer.concatenates or tokenizer.decode(tokenizer.encode(" a")) != " a":
        raise TokenizerError("the model's tokenizer decodes tokens by their neighbors, which a packed file cannot say")


def _model_problem(model: Mapping[str, Any]) -> str | None:
    if model.get("type") != "BPE":
        return f"is {model.get('type')}"
    if not model.get("byte_fallback") or not model["vocab"].keys() >= set(BYTES):
        return "is byte-pair encoding without byte fallback"
    altered = [name for name in _ALTERATIONS if model.get(name)]
    return f"has {', '.join(altered)}" if altered else None


def _text_problem(description: Mapping[str, Any]) -> str | None:
    """Return which change of the text the arrays could not say, or None."""
    normalizer, split = description.get("normalizer"), description.get("pre_tokenizer")
    if normalizer not in (None, _MARKED):
        return f"has the normalizer {normalizer['type']}"
    if normalizer is not None and WORD_MARK not in description["model"]["vocab"]:
        return f"has no piece {WORD_MARK} for a space"
    if split is None:
        return None
    pattern = split.get("pattern")
    if split["type"] == "Split" and pattern == {"String": " "} and normalizer is not None:
        return None  # Google's: there is no space left to split at
    if split["type"] == "Split" and pattern == {"Regex": BOUNDARIES} and normalizer is None:
        # Ours: a boundary depends on the two adjacent characters, and no piece contains one.
        cut = pre_tokenizers.Split(tokenizers.Regex(BOUNDARIES), behavior="isolated")
        for left, right in merge_pairs(description["model"]["merges"]):
            if len(cut.pre_tokenize_str(left + right)) != 1:
                return f"has the piece {left + right!r}, which its pre-tokenizer would split"
        return None
    return f"has the pre-tokenizer {split['type']}"


def _added_problem(tokenizer: Tokenizer) -> str | None:
    """Return which condition of an added token the arrays could not say, or None; special ones stay text anyway."""
    description = tokenizer.description
    tokens = description.get("added_tokens") or []
    if all(token["special"] for token in tokens):
        return None
    for token in tokens:
        if not token["special"] and (conditions := [name for name in _CONDITIONS if token[name]]):
            return f"has the added token {token['content']!r} with {', '.join(conditions)}"
        if not token["special"] and tokenizer.encode(token["content"])[-1:] != [token["id"]]:
            return f"has the added token {token['content']!r} under another id, too"
    normalized = {bool(token["normalized"]) for token in tokens}
    if normalized == {False} or (normalized == {True} and description.get("normalizer") is None):
        return None
    return "has added tokens that are looked for after normalization"


def _characters(vocabulary: Mapping[str, int], *, marked: bool) -> list[tuple[int, int]]:
    single = {ord(piece): token for piece, token in vocabulary.items() if len(piece) == 1}
    if marked:  # the normalizer makes a space and the mark the same
        single[ord(" ")] = single[ord(WORD_MARK)]
    return sorted(single.items())


def _starts(texts: Sequence[bytes]) -> Numbers:
    return np.cumsum([0, *map(len, texts)], dtype=np.uint32)


def _array(rows: Iterable[Sequence[int]], columns: int) -> Numbers:
    return np.array([*rows], dtype=np.uint32).reshape(-1, columns)


def _id(token: int | None, rows: int) -> int:
    return _NO_TOKEN if token is None or token >= rows else token


def _has_gemma_turns(template: str | None) -> bool:
    return template is not None and START in template and END in template
