"""The vocabulary of a GGUF file, both ways: llama.cpp's SentencePiece tables <-> tokenizer.json.

llama.cpp merges any neighbours whose union is a token, the union of the best score first. A byte-pair tokenizer that
lists every pair that makes a token, by that token's score, does the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemmule.errors import TokenizerError
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.pieces import BYTE_TOKEN, WORD_MARK

# llama.cpp's kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PREFIX = "tokenizer.ggml."


def read_vocabulary(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes; TokenizerError where it is of another kind or damaged."""
    kind = metadata.get(_PREFIX + "model")
    if kind != "llama":
        raise TokenizerError(f"{_PREFIX}model is {kind!r}; Gemma 3 has 'llama', a SentencePiece vocabulary")
    tokens, scores, types = (
        _table(metadata, name, element) for name, element in (("tokens", str), ("scores", float), ("token_type", int))
    )
    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError(f"{len(tokens)} tokens, {len(scores)} scores and {len(types)} types do not fit")
    if len(set(tokens)) < len(tokens):
        raise TokenizerError(f"{_PREFIX}tokens names a token twice")
    specials = {
        name: tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (number := _special(metadata, f"{key}_token_id", len(tokens))) is not None
    }
    pieces = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    score_of = dict(zip(tokens, scores, strict=True))
    prefix = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, token, special=kind in (CONTROL, UNKNOWN))
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": _normalizer(prefix),
        "pre_tokenizer": None,
        "post_processor": _template(specials, tokens) if metadata.get(_PREFIX + "add_bos_token", True) else None,
        "decoder": _decoder(prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": specials.get("unk"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": list(_merges(sorted(pieces, key=lambda piece: -score_of[piece]))),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        **{f"{name}_token": token for name, token in specials.items()},
    }
    return Tokenizer(json.dumps(description, ensure_ascii=False), config)


def write_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the keys that describe a tokenizer in a GGUF file; TokenizerError where llama.cpp cannot follow it."""
    description = tokenizer.description
    model, normalizer = description["model"], description.get("normalizer")
    marked = normalizer == _normalizer(prefix=False)
    if model["type"] != "BPE" or not model.get("byte_fallback") or not (marked or normalizer is None):
        raise TokenizerError(
            "this tokenizer cannot be written as GGUF: only byte-pair vocabularies with byte fallback, Gemma's and "
            "Gemmule's, mean the same there"
        )
    count = tokenizer.vocab_size
    tokens = [f"[UNUSED{number}]" for number in range(count)]
    types, scores = [UNUSED] * count, [0.0] * count
    rank: dict[str, int] = {}
    for place, (left, right) in enumerate(_pairs(model["merges"])):
        rank.setdefault(left + right, place)
    for token, number in model["vocab"].items():
        tokens[number] = token if marked or BYTE_TOKEN.fullmatch(token) else token.replace(" ", WORD_MARK)
        types[number] = BYTE if BYTE_TOKEN.fullmatch(token) else NORMAL
        scores[number] = -float(rank.get(token, len(rank)))
    for added in description.get("added_tokens", ()):
        number = added["id"]
        tokens[number], scores[number] = added["content"], -1000.0
        types[number] = CONTROL if added["special"] else USER_DEFINED
    ids = {
        "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id, "unknown": tokenizer.unk_id,
        "eot": tokenizer.end_of_turn_id,
    }  # fmt: skip
    return {
        _PREFIX + "model": "llama",
        _PREFIX + "pre": "default",
        _PREFIX + "tokens": tokens,
        _PREFIX + "scores": scores,
        _PREFIX + "token_type": types,
        **{f"{_PREFIX}{name}_token_id": number for name, number in ids.items() if number is not None},
        _PREFIX + "add_bos_token": tokenizer.adds_bos,
        _PREFIX + "add_eos_token": False,
        _PREFIX + "add_space_prefix": False,
    }


def _table(metadata: Mapping[str, Any], name: str, element: type) -> list[Any]:
    table = metadata.get(_PREFIX + name)
    if not isinstance(table, list) or not all(type(entry) is element for entry in table):
        raise TokenizerError(f"{_PREFIX}{name} is missing or damaged")
    return table


def _special(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    number = metadata.get(_PREFIX + name)
    if number is not None and not (isinstance(number, int) and 0 <= number < count):
        raise TokenizerError(f"{_PREFIX}{name} is {number!r}; there are {count} tokens")
    return number


def _merges(pieces: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every pair of pieces that makes a piece, in the order in which the pieces are given."""
    known = set(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            if (left := piece[:cut]) in known and (right := piece[cut:]) in known:
                yield left, right


def _pairs(merges: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Read merges as pairs; older files write them with a space between."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **flags, "special": special}


def _normalizer(prefix: bool) -> dict[str, Any]:
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": WORD_MARK}, mark]} if prefix else mark


def _decoder(prefix: bool) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": WORD_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {"type": "Sequence", "decoders": parts + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix}


def _template(specials: Mapping[str, str], tokens: Sequence[str]) -> dict[str, Any] | None:
    if "bos" not in specials:
        return None
    bos = specials["bos"]
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": known}
