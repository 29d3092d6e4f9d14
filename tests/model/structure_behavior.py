"""Checks of the whole model: causality, independence of rows, KV cache, gradients, padding."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from structure_instruments import Answer, ModelUnderTest, differ

from gemmule.data.corpus import CorpusWriter, open_corpus
from gemmule.data.packing import WholeDocuments
from gemmule.model.cache import Cache
from gemmule.runtime import Runtime
from gemmule.train.loss import summed_loss
from gemmule.train.validation import score

SAME = 1e-5  # of the greatest value: the same sums in another company; a leak of a millionth is not looked for
CLOSE = 1e-3  # the same sums in another order


def causality(test: ModelUnderTest) -> Answer:
    """Editing a token changes what is predicted from there on, and nothing before, within the window and beyond."""
    window = test.window
    length = 2 * window + 3
    tokens = test.tokens(1, length)
    before = test.hidden(tokens)[0]
    edits = sorted({1, max(1, window // 2), window, window + 1, length - 1})
    for place in edits:
        edited = tokens.clone()
        edited[0, place] = (edited[0, place] + 1) % test.config.vocab_size
        change = (test.hidden(edited)[0] - before).abs().amax(dim=-1)
        leaked = ~(change[:place] <= SAME * before.abs().max())
        if leaked.any():
            return "failed", f"editing token {place} changes the predictions at {int(leaked.sum())} earlier positions"
        if not change[place] > 0:
            return "failed", f"editing token {place} does not change the prediction after it"
    return "passed", f"edits at {len(edits)} of {length} positions change nothing before them"


def batch_independence(test: ModelUnderTest) -> Answer:
    """A row's predictions do not depend on the rows beside it."""
    tokens = test.tokens(3, 2 * test.window + 3)
    together, alone = test.hidden(tokens), test.hidden(tokens[:1])
    if differ(together[:1], alone, CLOSE):
        return "failed", "a row is predicted differently when other rows stand beside it"
    return "passed", "a row is predicted alike alone and beside others"


def cache(test: ModelUnderTest) -> Answer:
    """Reading a text in chunks, across the window's edge, predicts what reading it whole does."""
    window = test.window
    tokens = test.tokens(1, 2 * window + 3)
    memory, whole = Cache(test.config), test.hidden(tokens)
    place = 0
    for chunk in torch.split(tokens, [size for size in (window - 1, 1, 1, 2, window) if size], dim=1):
        if differ(test.hidden(chunk, cache=memory), whole[:, place : place + chunk.shape[1]], CLOSE):
            return "failed", f"read in chunks, the text is predicted differently from position {place} on"
        place += chunk.shape[1]
    return "passed", "a text read in chunks is predicted as when read whole"


def gradients(test: ModelUnderTest) -> Answer:
    """The loss has a gradient, neither zero nor infinite, in every parameter."""
    tokens = test.tokens(2, 33)
    named = [(name, each) for name, each in test.model.named_parameters() if each.requires_grad]
    if not named:
        return "skipped", "every parameter is frozen"
    with torch.enable_grad():
        loss = test.model(tokens[:, :-1], output_head=summed_loss(tokens[:, 1:].contiguous()))
        found = torch.autograd.grad(loss, [each for _, each in named], allow_unused=True)
    dead = [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None or not gradient.any()]
    wild = [
        name
        for (name, _), gradient in zip(named, found, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    for names, what in ((wild, "a gradient that is not finite"), (dead, "no gradient: the loss does not depend on it")):
        if names:
            layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
            more = f" (and {len(names) - 1} more like it, in {len(layers)} of the layers)" if len(names) > 1 else ""
            return "failed", f"{names[0]} has {what}{more}"
    return "passed", f"the loss depends on all {len(named)} tensors"


def padding(test: ModelUnderTest) -> Answer:
    """Documents padded in one batch cost what each costs alone: padding is neither seen nor counted."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(test.config.vocab_size, (size,), generator=generator).tolist() for size in (21, 9, 14)]
    with TemporaryDirectory() as folder:
        with CorpusWriter(Path(folder), "padding", test.tokenizer.fingerprint, test.config.vocab_size) as writer:
            for row in rows:
                writer.append(row, len(row))
        corpus = open_corpus(Path(folder), writer.names, test.tokenizer.fingerprint)
        # Longer than any document, so that every row ends in padding.
        batches = WholeDocuments(corpus, 24, 2, test.tokenizer.pad_id)
        result = score(test.model, batches, batches.bytes, Runtime(torch.device("cpu")))
    targets = sum(len(row) - 1 for row in rows)
    if result.tokens != targets:
        return "failed", f"{result.tokens} tokens are counted where {targets} are predicted: padding is in the loss"
    alone = sum(_nats(test, row) for row in rows)
    if not math.isclose(result.nats, alone, rel_tol=CLOSE):
        return (
            "failed",
            f"padded documents cost {result.nats / targets:.4f} nats per token, alone {alone / targets:.4f}",
        )
    return "passed", "padding changes no prediction and is not in the loss"


def _nats(test: ModelUnderTest, row: list[int]) -> float:
    """Predict a document alone, and add up what each token but the first costs, in the plainest way."""
    tokens = torch.tensor([row], dtype=torch.long, device=test.model.embedding.weight.device)
    with torch.no_grad():
        scores = test.model(tokens[:, :-1]).log_softmax(dim=-1)
    return -scores.gather(-1, tokens[:, 1:, None]).sum().item()
