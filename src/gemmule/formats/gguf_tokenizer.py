"""Convert a GGUF vocabulary (llama.cpp's SentencePiece tables) to tokenizer.json and back.

llama.cpp merges any adjacent tokens whose concatenation is a token, the best score first. A BPE tokenizer whose merges
are all pairs that concatenate to a token, ordered by that token's score, encodes identically.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemmule.errors import TokenizerError
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.pieces import BYTE_TOKEN, WORD_MARK, merge_pairs

# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Limits against small files that expand to huge merge lists; Gemma's pieces have up to 31 characters and 12 per piece
# in merges.
LONGEST_PIECE = 256
MOST_CHARACTERS, MOST_CHARACTERS_PER_PIECE = 1 << 22, 64


def read_vocabulary(metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer of a GGUF file; TokenizerError where it is unsupported or damaged."""
    kind = metadata.get(_PREFIX + "model")
    if kind != "llama":
        raise TokenizerError(f"{_PREFIX}model is {kind!r:.80}; Gemma 3 has 'llama' (SentencePiece)")
    tokens, scores, types = (
        _table(metadata, name, element) for name, element in (("tokens", str), ("scores", float), ("token_type", int))
    )
    if not len(tokens) == len(scores) == len(types):
        raise TokenizerError(
            f"{len(tokens)} tokens, {len(scores)} scores and {len(types)} token types differ in length"
        )
    if len(set(tokens)) < len(tokens):
        raise TokenizerError(f"{_PREFIX}tokens has a duplicate token")
    specials = {
        name: tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (number := _special(metadata, f"{key}_token_id", len(tokens))) is not None
    }
    pieces = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    if pieces and len(longest := max(pieces, key=len)) > LONGEST_PIECE:
        message = f"{reprlib.repr(longest)} has {len(longest)} characters, more than the limit of {LONGEST_PIECE}"
        raise TokenizerError(f"{_PREFIX}tokens: the token {message}")
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
        "post_processor": _post_processor(metadata, specials, tokens),
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
        **_read_chat_template(metadata),
    }
    return Tokenizer(json.dumps(description, ensure_ascii=False), config)


def write_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer as GGUF metadata; TokenizerError where llama.cpp would encode differently."""
    description = tokenizer.description
    model, normalizer = description["model"], description.get("normalizer")
    marked = normalizer == _normalizer(prefix=False)
    if model["type"] != "BPE" or not model.get("byte_fallback") or not (marked or normalizer is None):
        raise TokenizerError(
            "this tokenizer cannot be written as GGUF: llama.cpp supports BPE vocabularies with byte fallback, such "
            "as Gemma's and Gemmule's"
        )
    count = tokenizer.vocab_size
    tokens = [f"[UNUSED{number}]" for number in range(count)]
    types, scores = [UNUSED] * count, [0.0] * count
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merge_pairs(model["merges"])):
        rank.setdefault(left + right, index)
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
        **_write_chat_template(tokenizer.chat_templates),
    }


def _read_chat_template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return chat_template as in tokenizer_config.json: one template, or a list of named ones."""
    default = metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): text for key, text in metadata.items() if key.startswith(f"{_TEMPLATE}.")
    }
    templates = {name: text for name, text in ({"default": default} | named).items() if text is not None}
    if not all(isinstance(text, str) for text in templates.values()):
        raise TokenizerError(f"{_TEMPLATE} is not a string")
    if templates.keys() <= {"default"}:
        return {"chat_template": default} if templates else {}
    return {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]}


def _write_chat_template(templates: Mapping[str, str]) -> dict[str, Any]:
    others = {name: text for name, text in templates.items() if name != "default"}
    keys: dict[str, Any] = {f"{_TEMPLATE}.{name}": text for name, text in others.items()}
    if others:
        keys["tokenizer.chat_templates"] = list(others)
    if "default" in templates:
        keys[_TEMPLATE] = templates["default"]
    return keys


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
    """Yield every pair of pieces that concatenates to a piece, in the order of the pieces.

    There are more merges than pieces; TokenizerError where there are too many.
    """
    known = {piece: piece for piece in pieces}  # so that merges share the strings
    room = MOST_CHARACTERS + MOST_CHARACTERS_PER_PIECE * len(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            if (left := known.get(piece[:cut])) is not None and (right := known.get(piece[cut:])) is not None:
                room -= len(piece)
                if room < 0:
                    raise TokenizerError(f"{_PREFIX}tokens: too many merges between {len(pieces)} pieces")
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


def _post_processor(
    metadata: Mapping[str, Any], specials: Mapping[str, str], tokens: Sequence[str]
) -> dict[str, Any] | None:
    """Return the post-processor that adds bos and eos, where the file asks for them."""
    first = [specials["bos"]] if metadata.get(_PREFIX + "add_bos_token", True) and "bos" in specials else []
    last = [specials["eos"]] if metadata.get(_PREFIX + "add_eos_token", False) and "eos" in specials else []
    if not first and not last:
        return None

    def text(name: str, number: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": token, "type_id": number}} for token in some] for some in (first, last)]
        return [*special[0], {"Sequence": {"id": name, "type_id": number}}, *special[1]]

    known = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in first + last}
    single, second = text("A", 0), text("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": known}
