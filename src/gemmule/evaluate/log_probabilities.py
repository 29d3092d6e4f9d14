"""Log-probabilities of given tokens: of whole documents in packed rows, and of continuations after a context.

Probabilities are computed in fp32 from logits of a bounded number of positions at a time, and summed in float64.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gemmule.compiler import uncompiled
from gemmule.data.batches import IGNORED, Batch
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import Gemma3, OutputHead
from gemmule.runtime import Runtime, choose_precision
from gemmule.train.loss import rows_at_once

LONGEST_ROW = 2048  # tokens that are read at once: attention takes memory with the square
_CHUNK = 512  # tokens of a longer row that are read at once, through a cache


class TargetScores(NamedTuple):
    """The scores of the targets of a batch, those of its first row first, in the order of positions."""

    log_probabilities: npt.NDArray[np.float32]  # (M,) in nats
    likeliest: npt.NDArray[np.bool_]  # (M,) whether the model finds no token likelier


class ContinuationScore(NamedTuple):
    """How a model scores a continuation after a context."""

    log_probability: float  # of all its tokens together, in nats
    is_greedy: bool  # whether greedy decoding would give it


def target_scores(targets: Tensor) -> OutputHead:
    """Return an output head that scores targets (B,T): (2,B,T) float32, 0 where they are IGNORED.

    The first are log-probabilities in nats, the second 1 where the target is the likeliest token. Only a bounded number
    of logits exists at a time.
    """

    def read(hidden: Tensor, vocabulary: Tensor) -> Tensor:
        known = (targets != IGNORED).flatten().nonzero()[:, 0]
        states, wanted = hidden.flatten(0, 1)[known], targets.flatten()[known]
        scores = torch.zeros((2, targets.numel()), dtype=torch.float32, device=hidden.device)
        rows = rows_at_once(len(vocabulary), hidden.device)
        for first in range(0, len(known), rows):
            chunk = slice(first, first + rows)
            logits = functional.linear(states[chunk], vocabulary).float()
            right, highest = logits.gather(1, wanted[chunk][:, None])[:, 0], logits.amax(dim=-1)
            # As cross_entropy and argmax, which take twice as long on a CPU.
            scores[0, known[chunk]] = right - highest - (logits - highest[:, None]).exp_().sum(dim=-1).log()
            scores[1, known[chunk]] = (right >= highest).float()
        return scores.view(2, *targets.shape)

    return read


def score_batches(model: Gemma3, batches: Iterable[Batch], runtime: Runtime | None = None) -> Iterator[TargetScores]:
    """Yield the scores of the targets of each batch; rows of more than 2,048 tokens are read in chunks.

    By default a CPU computes in fp32, a GPU in bf16 where it has it.
    """
    runtime = runtime or default_runtime(model)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.inference_mode():
                on_device = batch.to(runtime.device)
                short = batch.tokens.shape[1] <= LONGEST_ROW
                scores = (_score_at_once if short else _score_in_chunks)(model, on_device, runtime)
                log_probabilities, likeliest = scores[:, on_device.targets != IGNORED].cpu().numpy()
            yield TargetScores(log_probabilities, likeliest > 0)
    finally:
        model.train(was_training)


def default_runtime(model: Gemma3) -> Runtime:
    """Return what a model is evaluated on where nobody says otherwise: fp32 on a CPU, bf16 on GPUs that have it."""
    device = model.embedding.weight.device
    return Runtime(device, "fp32" if device.type == "cpu" else choose_precision("auto", device))


def score_continuations(
    model: Gemma3,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int = 16_384,
    runtime: Runtime | None = None,
) -> list[ContinuationScore]:
    """Score the continuation of each (context, continuation), token ids both; results are in the order of the pairs.

    Pairs of similar length are read together, as many as make `batch_tokens` with padding, at least one. Where a pair
    is longer than the model's max_position_embeddings, the first tokens of its context are left out. ValueError where
    a context is empty, or a continuation alone is longer than the model reads: its first token is to be predicted from
    something, bos for example.
    """
    longest = model.config.max_position_embeddings
    rows: list[tuple[list[int], int]] = []  # ids, and how many of the last ones are scored
    for number, (context, continuation) in enumerate(pairs):
        if not context:
            raise ValueError(f"pair {number} has an empty context: begin it with bos")
        if len(continuation) > longest:
            raise ValueError(
                f"pair {number} has a continuation of {len(continuation)} tokens; the model reads {longest}"
            )
        rows.append(([*context, *continuation][-longest - 1 :], len(continuation)))
    order = sorted((number for number in range(len(rows)) if rows[number][1]), key=lambda n: -len(rows[n][0]))
    groups = list(_groups(order, [len(ids) - 1 for ids, _ in rows], batch_tokens))
    batches = (_padded([rows[number] for number in group]) for group in groups)
    scores = [ContinuationScore(0.0, True)] * len(rows)
    for group, result in zip(groups, score_batches(model, batches, runtime), strict=True):
        ends = np.cumsum([rows[number][1] for number in group])[:-1]
        parts = zip(np.split(result.log_probabilities, ends), np.split(result.likeliest, ends), strict=True)
        for number, (log_probabilities, likeliest) in zip(group, parts, strict=True):
            scores[number] = ContinuationScore(float(log_probabilities.sum(dtype=np.float64)), bool(likeliest.all()))
    return scores


def _groups(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut rows, the longest first, into groups that have so many tokens when padded."""
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // lengths[order[first]])
        yield list(order[first : first + size])
        first += size


def _padded(rows: Sequence[tuple[list[int], int]]) -> Batch:
    """Make a batch of rows (ids, number of targets at the end), the longest first, with padding on the right."""
    shape = len(rows), len(rows[0][0]) - 1
    tokens, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED, dtype=torch.long)
    for row, (ids, count) in enumerate(rows):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.long)
        targets[row, len(ids) - 1 - count : len(ids) - 1] = torch.tensor(ids[-count:], dtype=torch.long)
    return Batch(tokens, targets, None)  # no token attends to the padding, which is after all of them


def _score_at_once(model: Gemma3, batch: Batch, runtime: Runtime) -> Tensor:
    with uncompiled(), runtime.autocast():
        return model(batch.tokens, documents=batch.documents, output_head=target_scores(batch.targets))


def _score_in_chunks(model: Gemma3, batch: Batch, runtime: Runtime) -> Tensor:
    """Score rows through a cache, which gives the same in memory that does not grow with the square of their length."""
    cache, scores = Cache(model.config), []
    for first in range(0, batch.tokens.shape[1], _CHUNK):
        chunk = slice(first, first + _CHUNK)
        targets = batch.targets[:, chunk].contiguous()
        documents = None if batch.documents is None else batch.documents[:, chunk].contiguous()
        with uncompiled(), runtime.autocast():
            tokens = batch.tokens[:, chunk].contiguous()
            scores.append(model(tokens, documents=documents, cache=cache, output_head=target_scores(targets)))
    return torch.cat(scores, dim=2)
