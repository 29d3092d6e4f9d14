"""What one model makes of one text: surprise, alternatives, logit lens, attention, ranges; as plain data."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmule.errors import GemmuleError, SourceError
from gemmule.evaluate.explain.recording import Recording, TensorRange, record, tensor_range
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

LONGEST = 1024  # tokens of a text: each is a row of the page, and their logits of one layer are in memory
ALTERNATIVES = 5  # likeliest tokens that are kept at each place
_KEYS = 8  # of a query's keys those with the largest weights are kept
_LEAST_WEIGHT = 0.01  # as far as they have such a weight
_CHUNK = 1 << 21  # logits that are normalized at once, so that they stay in the processor's cache


class Alternative(NamedTuple):
    """A token that the model expected."""

    id: int
    text: str
    probability: float


class Token(NamedTuple):
    """A token of the text, and how well it was predicted from those before it.

    The first token is predicted from nothing: its bits and rank are None, and it has no alternatives. Rank 1 is the
    likeliest token.
    """

    id: int
    text: str
    bytes: int
    bits: float | None
    rank: int | None
    alternatives: list[Alternative]


class LensLayer(NamedTuple):
    """The logit lens after one layer: for each token the likeliest next one, and the bits of that which follows."""

    layer: int
    kind: str
    ids: list[int]
    texts: list[str]
    probabilities: list[float]
    bits: list[float]


class Head(NamedTuple):
    """What one head looked at: for each query the keys with the largest weights, and means over the queries.

    The means leave out the first query, which has nothing to choose: weight on the token itself, on the one before it
    and on the first of the text, and how many tokens back the head looks.
    """

    keys: list[list[int]]
    weights: list[list[float]]
    on_itself: float
    on_previous: float
    on_first: float
    distance: float


class AttentionLayer(NamedTuple):
    """The heads of one layer; window None means global attention."""

    layer: int
    kind: str
    window: int | None
    heads: list[Head]


class Explanation(NamedTuple):
    """What a model makes of a text.

    `following` is what it expects after the text. The last entry of `lens` is the model's own prediction. Bits per
    byte are None where the tokenizer changes the text.
    """

    model: str
    text: str
    tokenizer: str  # its fingerprint
    parameters: int
    vocabulary: int
    tokens: list[Token]
    following: list[Alternative]
    bits: float
    bits_per_token: float
    bits_per_byte: float | None
    lens: list[LensLayer]
    attention: list[AttentionLayer]
    tensors: list[TensorRange]


def as_json(value: Any) -> Any:
    """Return an explanation, or a part of it, as a value of JSON: its named tuples become objects."""
    if hasattr(value, "_asdict"):
        return {key: as_json(each) for key, each in value._asdict().items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


def explain(model: Gemma3, tokenizer: Tokenizer, text: str, name: str = "the model") -> Explanation:
    """Explain what a model, in fp32, makes of a text of at most LONGEST tokens.

    SourceError where the text is empty or too long, GemmuleError where the model computes NaN.
    """
    ids = _encode(model, tokenizer, text)
    heads: list[list[Head]] = []
    recording = record(model, ids, lambda _, weights: heads.append([_head(each) for each in weights]))
    lens, final = _lens(recording, ids, tokenizer)
    tokens = _tokens(ids, text, tokenizer, final)
    bits = math.fsum(token.bits for token in tokens if token.bits is not None)
    if not math.isfinite(bits):
        raise GemmuleError(f"{name}: the loss is {bits}, not a number; gemmule doctor {name} says what is wrong")
    config = model.config
    restored = tokenizer.restores([text], [ids]) == [True] and sum(token.bytes for token in tokens) == len(
        text.encode()
    )
    predicted = sum(token.bytes for token in tokens[1:])
    return Explanation(
        model=name,
        text=text,
        tokenizer=tokenizer.fingerprint,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=config.vocab_size,
        tokens=tokens,
        following=final.likeliest[-1],
        bits=bits,
        bits_per_token=bits / (len(ids) - 1),
        bits_per_byte=bits / predicted if restored and predicted else None,
        lens=lens,
        attention=[
            AttentionLayer(layer, kind, config.window(kind), heads[layer])
            for layer, kind in enumerate(config.layer_kinds)
        ],
        tensors=recording.ranges,
    )


def _encode(model: Gemma3, tokenizer: Tokenizer, text: str) -> list[int]:
    if not text:
        raise SourceError("the text is empty; give a sentence or more")
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise SourceError(f"the text {text!r} is {len(ids)} token, of which nothing is predicted; give a longer one")
    furthest = model.config.max_position_embeddings
    if len(ids) > furthest:
        limit = f"the model reads at most {furthest:,} (max_position_embeddings)"
        raise SourceError(f"the text has {len(ids):,} tokens, but {limit}; give a shorter one")
    if len(ids) > LONGEST:
        raise SourceError(f"the text has {len(ids):,} tokens, but at most {LONGEST:,} are explained; give a part of it")
    return ids


class _Prediction(NamedTuple):
    """Of each of T places the likeliest tokens (T,k) and their probabilities; the bits of those that follow, (T-1,)."""

    top: Tensor
    probabilities: Tensor
    bits: Tensor


@torch.inference_mode()
def _predict(logits: Tensor, ids: list[int], count: int) -> _Prediction:
    tops, probabilities, bits = [], [], []
    for chunk, following in _chunks(logits, ids):
        log_probabilities = chunk.log_softmax(dim=-1)
        # Of one token the maximum, which is twice as fast.
        likeliest = log_probabilities.topk(count) if count > 1 else log_probabilities.max(dim=-1, keepdim=True)
        tops.append(likeliest.indices.cpu())
        probabilities.append(likeliest.values.exp().cpu())
        bits.append(log_probabilities.gather(1, following)[:, 0].cpu() / -math.log(2))
    return _Prediction(torch.cat(tops), torch.cat(probabilities), torch.cat(bits)[:-1])


@torch.inference_mode()
def _ranks(logits: Tensor, ids: list[int]) -> list[int]:
    """Return the ranks of the tokens that follow, from 1."""
    ranks = [(chunk > chunk.gather(1, following)).sum(dim=-1) + 1 for chunk, following in _chunks(logits, ids)]
    return torch.cat(ranks)[:-1].tolist()


def _chunks(logits: Tensor, ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows of logits, with the ids (rows, 1) that follow them; after the last any."""
    following = torch.tensor([*ids[1:], 0], dtype=torch.long, device=logits.device)[:, None]
    rows = max(1, _CHUNK // logits.shape[1])
    yield from zip(torch.split(logits, rows), torch.split(following, rows), strict=True)


class _Final(NamedTuple):
    """The model's own prediction."""

    likeliest: list[list[Alternative]]
    bits: list[float]
    ranks: list[int]


def _lens(recording: Recording, ids: list[int], tokenizer: Tokenizer) -> tuple[list[LensLayer], _Final]:
    """Return the lens of every layer, and the model's own prediction, which is that of the last."""
    kinds, layers = recording.model.config.layer_kinds, []
    for layer, kind in enumerate(kinds):
        logits, last = recording.logits(layer + 1), layer + 1 == len(kinds)
        prediction = _predict(logits, ids, min(ALTERNATIVES, logits.shape[1]) if last else 1)
        top, probabilities = prediction.top[:, 0].tolist(), prediction.probabilities[:, 0]
        texts = [token_text(tokenizer, token) for token in top]
        layers.append(LensLayer(layer, kind, top, texts, _rounded(probabilities), _rounded(prediction.bits)))
    recording.ranges.append(tensor_range("logits", logits))
    pairs = zip(prediction.top.tolist(), prediction.probabilities.tolist(), strict=True)
    likeliest = [
        [Alternative(token, token_text(tokenizer, token), chance) for token, chance in zip(*row, strict=True)]
        for row in pairs
    ]
    return layers, _Final(likeliest, prediction.bits.tolist(), _ranks(logits, ids))


def _tokens(ids: list[int], text: str, tokenizer: Tokenizer, final: _Final) -> list[Token]:
    texts, lengths = [token_text(tokenizer, token) for token in ids], _byte_lengths(ids, text, tokenizer)
    predictions: list[tuple[float | None, int | None, list[Alternative]]] = [(None, None, [])]
    predictions += zip(final.bits, final.ranks, final.likeliest[:-1], strict=True)
    read = zip(ids, texts, lengths, strict=True)
    return [Token(*one, *predicted) for one, predicted in zip(read, predictions, strict=True)]


def _byte_lengths(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Return how many bytes of the text each token stands for; a space that the tokenizer puts before it has none."""
    pieces = [tokenizer.piece(token) for token in ids]
    if b"".join(pieces) == b" " + text.encode():
        first = next(place for place, piece in enumerate(pieces) if piece)
        pieces[first] = pieces[first][1:]
    return [len(piece) for piece in pieces]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as it is shown: <eos> for eos, <0xF0> for a byte that is no character alone."""
    piece = tokenizer.piece(token)
    return displayed(piece) if piece else tokenizer.decode([token], specials=True) or f"<{token}>"


def displayed(piece: bytes) -> str:
    """Return a piece of text, in hexadecimal where it is no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in piece)


def _head(weights: Tensor) -> Head:
    """Summarize the attention weights (T,T) of one head."""
    length = len(weights)
    largest = weights.topk(min(_KEYS, length), dim=-1)
    pairs = zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
    kept = [[(key, weight) for key, weight in zip(*row, strict=True) if weight >= _LEAST_WEIGHT] for row in pairs]
    places = torch.arange(length, device=weights.device, dtype=torch.float32)
    distances = (weights * (places[:, None] - places)).sum(dim=-1)
    return Head(
        keys=[[key for key, _ in row] for row in kept],
        weights=[[round(weight, 3) for _, weight in row] for row in kept],
        on_itself=_mean(weights.diagonal()[1:]),
        on_previous=_mean(weights.diagonal(-1)),
        on_first=_mean(weights[1:, 0]),
        distance=_mean(distances[1:]),
    )


def _mean(values: Tensor) -> float:
    return round(values.mean().item(), 4)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
