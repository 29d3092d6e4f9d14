"""Two models on one text, span by span, also where their tokenizers cut it differently."""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

from gemmule.evaluate.explain.explanation import Explanation, Token, displayed


class CommonSpan(NamedTuple):
    """A piece of the text that both models read in whole tokens: first and last + 1 of each, and the bits it cost.

    Bits are None where one of the models begins with it, and so does not predict it.
    """

    text: str
    one: tuple[int, int]
    other: tuple[int, int]
    one_bits: float | None
    other_bits: float | None


class Comparison(NamedTuple):
    """The spans of a text, and what those that both models predict cost each in total, in bits.

    Where a tokenizer changes the text its tokens cannot be found in it: then there are no spans, and the bits are those
    of all tokens that each predicts.
    """

    same_tokenizer: bool
    spans: list[CommonSpan]
    one_bits: float
    other_bits: float


def compare(one: Explanation, other: Explanation) -> Comparison:
    """Compare two models on the same text: token by token, or by the smallest common spans of other tokenizers."""
    same = one.tokenizer == other.tokenizer
    if not same and None in (one.bits_per_byte, other.bits_per_byte):
        return Comparison(False, [], one.bits, other.bits)
    spans = list(_token_spans(one, other) if same else _common_spans(one, other))
    pairs = [(a, b) for _, _, _, a, b in spans if a is not None and b is not None]
    return Comparison(same, spans, math.fsum(bits for bits, _ in pairs), math.fsum(bits for _, bits in pairs))


def _token_spans(one: Explanation, other: Explanation) -> Iterator[CommonSpan]:
    for place, pair in enumerate(zip(one.tokens, other.tokens, strict=True)):
        yield CommonSpan(pair[0].text, (place, place + 1), (place, place + 1), pair[0].bits, pair[1].bits)


def _common_spans(one: Explanation, other: Explanation) -> Iterator[CommonSpan]:
    ours, theirs = _tokens_before(one.tokens), _tokens_before(other.tokens)
    for start, stop in pairwise(sorted(ours.keys() & theirs.keys())):
        text = displayed(one.text.encode()[start:stop])
        a, b = (ours[start], ours[stop]), (theirs[start], theirs[stop])
        yield CommonSpan(text, a, b, _bits(one.tokens[slice(*a)]), _bits(other.tokens[slice(*b)]))


def _tokens_before(tokens: list[Token]) -> dict[int, int]:
    """Return for each number of bytes that ends a token how many tokens stand for them; bos belongs to the first."""
    ends = accumulate(token.bytes for token in tokens)
    return {0: 0} | {end: count for count, end in enumerate(ends, start=1) if end}


def _bits(tokens: list[Token]) -> float | None:
    """Return what the tokens cost, without bos; None where the first token of the text is among them."""
    predicted = [token for token in tokens if token.bytes or token.bits is not None]
    bits = [token.bits for token in predicted]
    return None if not bits or None in bits else sum(bit for bit in bits if bit is not None)
