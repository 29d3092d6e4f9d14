"""Trim a vocabulary to the ids that a corpus needs, so that the corpus is encoded as before.

Byte-pair encoding splits a text into characters and applies, step by step, the applicable merge of least rank. Merges
within a final token never cross its ends, so they are those of encoding the token's own string: what a corpus needs are
its tokens and the pieces met when each of them is encoded alone (the closure over merges). With these kept, merges are
only removed, and never one that was applied to the corpus: at each step the merge that was chosen is still there and
still of least rank, so the tokens are the same. That holds for any text whose tokens are all kept.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

from gemmule.errors import TokenizerError
from gemmule.tokenizer.chat import END, START
from gemmule.tokenizer.pieces import WORD_MARK, merge_pairs
from gemmule.tokenizer.settings import BYTES
from gemmule.tokenizer.tokenizer import Tokenizer

# Google's tokens that no text of a text model is encoded to; they are kept only where the corpus has them.
_UNUSED = re.compile(r"<unused\d+>")
_IMAGE = ("[multimodal]", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
_BATCH = 64  # documents, of up to 1 MiB each, that are encoded together


class EncodingComparison(NamedTuple):
    """How a trimmed tokenizer encodes documents, beside the original."""

    documents: int = 0
    changed: int = 0  # documents that are encoded differently
    wrong: int = 0  # of them, those whose tokens are all kept: a fault of ours
    tokens: int = 0  # by the original
    trimmed_tokens: int = 0
    beginning: tuple[int, ...] = ()  # the first ids, trimmed, of all documents together


def check_trimmable(tokenizer: Tokenizer) -> None:
    """Raise TokenizerError where a tokenizer is not deterministic byte-pair encoding with byte fallback."""
    model = tokenizer.description["model"]
    kind = model.get("type")
    altered = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if kind != "BPE" or not model.get("byte_fallback") or not model["vocab"].keys() >= set(BYTES):
        found = f"is {kind}" if kind != "BPE" else "is byte-pair encoding without byte fallback"
    elif altered:
        found = f"has {', '.join(altered)}"
    else:
        return
    advice = "only byte-pair encoding with byte fallback can be trimmed, such as Gemma's and Gemmule's"
    raise TokenizerError(f"the model's tokenizer {found}; {advice}")


def count_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Count the ids of encoded documents, bos and eos included."""
    counts: Counter[int] = Counter()
    for batch in _batches(texts):
        for ids in tokenizer.encode_documents(batch):
            counts.update(ids)
    return counts


def choose_ids(
    tokenizer: Tokenizer, counts: Mapping[int, int], size: int | None = None, min_count: int = 1
) -> list[int]:
    """Return the ids to keep in ascending order: those that occur `min_count` times, and what goes with them.

    With them go their closure over merges, all bytes, bos, eos, pad, unk and mask, what the post-processor adds, the
    mark of a space, the turn markers with the pieces around them, and special tokens of the chat template. `size` adds
    the first of the others until there are so many; TokenizerError names the range of sizes where it is outside.
    """
    vocabulary = _Vocabulary(tokenizer)
    used = {token for token, count in counts.items() if count >= min_count}
    if None not in (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id):
        used.update(tokenizer.encode(f"{START}user\n{END}\n{START}model\n", specials=True))
    kept = vocabulary.closure(used) | vocabulary.required()
    if size is None:
        return sorted(kept)
    if size < len(kept):
        advice = f"use {len(kept)} or more, or drop rare ones by --min-count"
        raise TokenizerError(f"--size {size}: the corpus needs {len(kept)} ids; {advice}")
    # Larger closures are passed over where there is no room; their parts follow, so that the size is met exactly.
    for token in vocabulary.others():
        if len(kept) == size:
            break
        needed = vocabulary.closure({token}) - kept
        if len(kept) + len(needed) <= size:
            kept |= needed
    if len(kept) < size:
        total = f"{tokenizer.vocab_size} ids, of which {len(kept)} stand for text or are needed"
        raise TokenizerError(f"--size {size}: the vocabulary has {total}; use {len(kept)} or less")
    return sorted(kept)


def trim_tokenizer(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
    """Return the tokenizer with the kept ids, renumbered in their order; merges stay where their pieces do."""
    new_ids = {old: new for new, old in enumerate(kept)}
    description = dict(tokenizer.description)
    model = description["model"]
    vocabulary = {piece: new_ids[token] for piece, token in model["vocab"].items() if token in new_ids}
    merges = [
        merge
        for merge, (left, right) in zip(model["merges"], merge_pairs(model["merges"]), strict=True)
        if left in vocabulary and right in vocabulary and left + right in vocabulary
    ]
    added = description.get("added_tokens") or []
    description |= {
        "truncation": None,
        "padding": None,
        "added_tokens": [token | {"id": new_ids[token["id"]]} for token in added if token["id"] in new_ids],
        "post_processor": _renumber(description.get("post_processor"), new_ids.__getitem__),
        "model": model | {"vocab": vocabulary, "merges": merges},
    }
    contents = model["vocab"] | {token["content"]: token["id"] for token in added}
    removed = {content for content, token in contents.items() if token not in new_ids}
    config = _trim_config(tokenizer.config, removed, new_ids)
    return Tokenizer(json.dumps(description, ensure_ascii=False), config)


def compare_encodings(
    tokenizer: Tokenizer, trimmed: Tokenizer, kept: Sequence[int], texts: Iterable[str], positions: int = 0
) -> EncodingComparison:
    """Encode documents with both tokenizers and compare the ids; keep the first `positions` of them."""
    known, result = set(kept), EncodingComparison()
    beginning: list[int] = []
    for batch in _batches(texts):
        rows = zip(tokenizer.encode_documents(batch), trimmed.encode_documents(batch), strict=True)
        for before, after in rows:
            changed = before != [kept[token] for token in after]
            result = EncodingComparison(
                result.documents + 1,
                result.changed + changed,
                result.wrong + (changed and known.issuperset(before)),
                result.tokens + len(before),
                result.trimmed_tokens + len(after),
            )
            beginning += after[: positions - len(beginning)]
    return result._replace(beginning=tuple(beginning))


class _Vocabulary:
    """The pieces and merges of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._description = tokenizer.description
        self._ids: dict[str, int] = self._description["model"]["vocab"]
        self._pieces = {token: piece for piece, token in self._ids.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(merge_pairs(self._description["model"]["merges"]))}
        self._added = {token["id"]: token for token in self._description.get("added_tokens") or []}
        self._bytes = {self._ids[byte] for byte in BYTES}

    def closure(self, tokens: Iterable[int]) -> set[int]:
        """Return ids with those of the pieces met when each is encoded alone."""
        closed: set[int] = set()
        for token in tokens:
            closed.add(token)
            if token in self._pieces and token not in self._bytes and not self._is_special(token):
                closed.update(self._ids[piece] for piece in self._pieces_met(self._pieces[token]) if piece in self._ids)
        return closed

    def required(self) -> set[int]:
        """Return the ids that are kept for any corpus."""
        own, model = self._tokenizer, self._description["model"]
        named = [own.bos_id, own.eos_id, own.pad_id, own.unk_id, own.start_of_turn_id, own.end_of_turn_id]
        mask = own.config.get("mask_token")
        contents = [model.get("unk_token"), mask.get("content") if isinstance(mask, dict) else mask or "<mask>"]
        contents.append(WORD_MARK)  # in bytes, a space would be decoded as U+2581
        added_ids = {token["content"]: number for number, token in self._added.items()}
        named += [self._ids.get(content, added_ids.get(content)) for content in contents]
        templates = "\n".join(own.chat_templates.values())
        markers = (number for number in self._added if self._is_special(number))
        named += [number for number in markers if self._content(number) in templates and not self._is_idle(number)]

        def note(token: int) -> int:
            named.append(token)
            return token

        _renumber(self._description.get("post_processor"), note)
        return self._bytes | {token for token in named if token is not None}

    def others(self) -> Iterator[int]:
        """Yield in ascending order the ids that stand for text, and neither for images nor for nothing yet."""
        for token in sorted({*self._pieces, *self._added}):
            if not self._is_special(token) and not self._is_idle(token):
                yield token

    def _is_special(self, token: int) -> bool:
        return token in self._added and bool(self._added[token]["special"])

    def _is_idle(self, token: int) -> bool:
        content = self._content(token)
        return content in _IMAGE or _UNUSED.fullmatch(content) is not None

    def _content(self, token: int) -> str:
        content: str = self._added[token]["content"] if token in self._added else self._pieces[token]
        return content

    def _pieces_met(self, text: str) -> set[str]:
        """Encode a text as byte-pair encoding does; return all pieces on the way, single characters first."""
        symbols = list(text)
        met = set(symbols)
        while True:
            pairs = enumerate(pairwise(symbols))
            ranked = [(self._ranks[pair], place) for place, pair in pairs if pair in self._ranks]
            if not ranked:
                return met
            _, place = min(ranked)
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            met.add(symbols[place])


def _renumber(processor: Mapping[str, Any] | None, new_id: Callable[[int], int]) -> dict[str, Any] | None:
    """Return a post-processor with other ids."""
    if processor is None:
        return None
    changes: dict[str, Any] = {}
    if processor["type"] == "Sequence":
        changes["processors"] = [_renumber(each, new_id) for each in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"].items()
        changes["special_tokens"] = {name: token | {"ids": list(map(new_id, token["ids"]))} for name, token in tokens}
    else:  # of BERT and RoBERTa
        changes = {key: [processor[key][0], new_id(processor[key][1])] for key in ("sep", "cls") if key in processor}
    return {**processor, **changes}


def _trim_config(config: Mapping[str, Any], removed: set[str], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return a tokenizer_config.json without the tokens that are gone, which transformers would add again."""

    def is_kept(token: Any) -> bool:
        content = token.get("content") if isinstance(token, dict) else token
        return not (isinstance(content, str) and content in removed)

    trimmed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "added_tokens_decoder":
            kept = ((int(old), token) for old, token in value.items() if old.isdecimal() and int(old) in new_ids)
            trimmed[key] = {str(new_ids[old]): token for old, token in kept}
        elif key.endswith("special_tokens") and isinstance(value, list):
            trimmed[key] = [token for token in value if is_kept(token)]
        elif key.endswith("special_tokens") and isinstance(value, dict):
            trimmed[key] = {name: token for name, token in value.items() if is_kept(token)}
        elif not key.endswith("_token") or is_kept(value):
            trimmed[key] = value
    trimmed.pop("processor_class", None)  # of images
    if "tokenizer_class" in trimmed:
        trimmed["tokenizer_class"] = "PreTrainedTokenizerFast"  # Google's class would not read tokenizer.json as it is
    return trimmed


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield batch
