"""The loss mask of token shards: what is trained on, by role, read from the tokens and not from the rule."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gemmule.data.corpus import Corpus
from gemmule.data.report import LossMaskReport
from gemmule.data.shards import Shard, Tokens
from gemmule.errors import DatasetError
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import turn_header, turn_tokens

# The role of a token is an index of this: <start_of_turn>, names of roles, bos and line ends are of the template.
ROLES = ("template", "user", "model")


class Segment(NamedTuple):
    """Consecutive tokens of a document that have one role and are all trained on, or are all not."""

    role: str
    trained: bool
    ids: list[int]


def token_roles(ids: Tokens, tokenizer: Tokenizer) -> npt.NDArray[np.int8]:
    """Return the role of each token as an index of ROLES; <end_of_turn> belongs to the turn that it ends."""
    start_id, end_id = turn_tokens(tokenizer)
    starts, changes = np.flatnonzero(ids == start_id), np.zeros(len(ids) + 1, np.int8)
    # A turn ends after <end_of_turn>, or before the next one or the next document where it has none.
    opening = np.flatnonzero((ids == start_id) | (ids == tokenizer.bos_id))
    ends = np.sort(np.concatenate([np.flatnonzero(ids == end_id) + 1, opening, [len(ids)]]))
    for role in (1, 2):
        header = np.array(turn_header(tokenizer, ROLES[role]))
        places = starts[starts + len(header) <= len(ids)]
        own = places[(ids[places[:, None] + np.arange(len(header))] == header).all(axis=1)] + len(header)
        np.add.at(changes, own, role)
        np.subtract.at(changes, ends[np.searchsorted(ends, own)], role)
    roles: npt.NDArray[np.int8] = np.cumsum(changes[:-1], dtype=np.int8)
    return roles


def count_loss_mask(shard: Shard, tokenizer: Tokenizer, special_spellings: int = 0) -> LossMaskReport:
    """Count what is trained on in a shard with a loss mask. Memory: about 30 bytes per token."""
    ids, mask = shard.tokens, shard.read_mask(0, shard.header.tokens)
    roles = token_roles(ids, tokenizer)
    tokens, trained = (np.bincount(each, minlength=len(ROLES)).tolist() for each in (roles, roles[mask]))
    last = shard.reply_ends()
    return LossMaskReport(
        tokens=dict(zip(ROLES, tokens, strict=True)),
        trained=dict(zip(ROLES, trained, strict=True)),
        replies=len(last),
        ended=int((ids[last] == tokenizer.end_of_turn_id).sum()),
        special_spellings=special_spellings,
    )


def check_loss_mask(corpus: Corpus, tokenizer: Tokenizer, split: str) -> None:
    """Raise DatasetError for a document without a trained token, a reply without an end, or bos in a document's midst.

    So that nothing of it is noticed only after training.
    """
    _, end = turn_tokens(tokenizer)
    number = 0
    for shard in corpus.shards:
        if shard.mask is None:
            raise DatasetError(f"shard {shard.path}: has no loss mask, so it is text; set data.kind to text")
        ids, mask = shard.tokens, shard.read_mask(0, shard.header.tokens)
        untrained = np.flatnonzero(np.add.reduceat(mask.astype(np.int32), shard.starts) == 0)
        last = shard.reply_ends()
        cut = last[ids[last] != end]
        inside = np.setdiff1d(np.flatnonzero(ids == tokenizer.bos_id), shard.starts)
        problems = {
            "has no token to train on": untrained,
            "has a reply that does not end with <end_of_turn>, so the model would not learn to stop": _owners(
                shard, cut
            ),
            "has bos in its midst": _owners(shard, inside),
        }
        for problem, documents in problems.items():
            if len(documents):
                raise DatasetError(
                    f"{split} document {number + int(documents[0])} {problem} ({len(documents):,} of {split} in "
                    f"{shard.path.name}); prepare the data again"
                )
        number += shard.header.documents


def _owners(shard: Shard, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the documents that tokens at some places belong to."""
    return np.unique(np.searchsorted(shard.ends, places, side="right"))


def segments(corpus: Corpus, document: int, tokenizer: Tokenizer) -> Iterator[Segment]:
    """Yield the segments of a document in order; one of text is one segment."""
    length = int(corpus.lengths[document])
    ids, mask = corpus.read(document, 0, length), corpus.read_mask(document, 0, length)
    if all(shard.mask is None for shard in corpus.shards):
        yield Segment("text", True, ids.tolist())
        return
    roles = token_roles(ids, tokenizer)
    begins = np.flatnonzero(np.append(True, (roles[1:] != roles[:-1]) | (mask[1:] != mask[:-1])))
    for begin, stop in zip(begins, np.append(begins[1:], length), strict=True):
        yield Segment(ROLES[roles[begin]], bool(mask[begin]), ids[begin:stop].tolist())
