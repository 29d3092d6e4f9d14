"""Groups of replies: several samples of each of many requests, by one engine."""

from collections.abc import Sequence

from gemmule.inference.engine import MAX_ROWS, Engine, step_or_raise
from gemmule.inference.requests import Request
from gemmule.inference.runners import Decoding
from gemmule.model.gemma3 import Gemma3


def reply_to_groups(
    model: Gemma3, requests: Sequence[Request], decoding: Decoding = "auto", max_rows: int = MAX_ROWS
) -> list[list[list[int]]]:
    """Return the tokens of all samples of each request, the stop token included; ModelError as in `stream_tokens`.

    `max_rows` sequences, or one whole group where that has more, are generated at once.
    """
    if not requests:
        return []
    rows = max(max(each.samples for each in requests), min(max_rows, sum(each.samples for each in requests)))
    engine = Engine(model, rows, max(each.positions for each in requests), decoding)
    submitted = [engine.submit(request) for request in requests]
    while not engine.idle:
        step_or_raise(engine)
    return [[sequence.generated for sequence in samples] for samples in submitted]
