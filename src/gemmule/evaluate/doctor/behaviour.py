"""Checks of the whole: does the model behave as a causal language model must, whatever is inside?"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from gemmule.data.batches import WholeDocuments
from gemmule.data.corpus import CorpusWriter, open_corpus
from gemmule.evaluate.doctor.patient import Answer, Patient, differ
from gemmule.evaluate.text import score_text
from gemmule.model.cache import Cache
from gemmule.model.gemma3 import RMSNorm
from gemmule.train.loss import summed_loss
from gemmule.train.validation import score

SAME = 1e-5  # of the greatest value: the same sums in another company; a leak of a millionth is not looked for
CLOSE = 1e-3  # the same sums in another order
FP16_LARGEST = 65_504
_DOCUMENTS = 200  # of a text that are predicted
_NEAR = 0.3  # nats between the loss of first weights and what their size lets one expect


def causality(patient: Patient) -> Answer:
    """Editing a token changes what is predicted from there on, and nothing before, within the window and beyond."""
    window = patient.config.sliding_window
    length = 2 * window + 3
    tokens = patient.tokens(1, length)
    before = patient.hidden(tokens)[0]
    edits = sorted({1, max(1, window // 2), window, window + 1, length - 1})
    for place in edits:
        edited = tokens.clone()
        edited[0, place] = (edited[0, place] + 1) % patient.config.vocab_size
        change = (patient.hidden(edited)[0] - before).abs().amax(dim=-1)
        leaked = ~(change[:place] <= SAME * before.abs().max())
        if leaked.any():
            return "ill", f"editing token {place} changes the predictions at {int(leaked.sum())} earlier positions"
        if not change[place] > 0:
            return "ill", f"editing token {place} does not change the prediction after it"
    return "well", f"edits at {len(edits)} of {length} positions change nothing before them"


def batch_independence(patient: Patient) -> Answer:
    """A row's predictions do not depend on the rows beside it."""
    tokens = patient.tokens(3, 2 * patient.config.sliding_window + 3)
    together, alone = patient.hidden(tokens), patient.hidden(tokens[:1])
    if differ(together[:1], alone, CLOSE):
        return "ill", "a row is predicted differently when other rows stand beside it"
    return "well", "a row is predicted alike alone and beside others"


def cache(patient: Patient) -> Answer:
    """Reading a text in chunks, across the window's edge, predicts what reading it whole does."""
    window = patient.config.sliding_window
    tokens = patient.tokens(1, 2 * window + 3)
    memory, whole = Cache(patient.config), patient.hidden(tokens)
    place = 0
    for chunk in torch.split(tokens, [size for size in (window - 1, 1, 1, 2, window) if size], dim=1):
        if differ(patient.hidden(chunk, cache=memory), whole[:, place : place + chunk.shape[1]], CLOSE):
            return "ill", f"read in chunks, the text is predicted differently from position {place} on"
        place += chunk.shape[1]
    return "well", "a text read in chunks is predicted as when read whole"


def gradients(patient: Patient) -> Answer:
    """The loss has a gradient, neither zero nor infinite, in every parameter."""
    tokens = patient.tokens(2, 33)
    named = [(name, each) for name, each in patient.model.named_parameters() if each.requires_grad]
    if not named:
        return "unknown", "every parameter is frozen"
    with torch.enable_grad():
        loss = patient.model(tokens[:, :-1], readout=summed_loss(tokens[:, 1:].contiguous()))
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
            more = f", as have {len(names) - 1} others in {len(layers)} layers" if len(names) > 1 else ""
            return "ill", f"{names[0]} has {what}{more}"
    return "well", f"the loss depends on all {len(named)} tensors"


def loss(patient: Patient) -> Answer:
    """Text is predicted better than by guessing; without a text, noise is not, and first weights nearly guess."""
    guess = math.log(patient.config.vocab_size)
    if patient.data is not None:
        figures = score_text(patient.model, patient.tokenizer, patient.data, documents=_DOCUMENTS)
        sentence = f"{figures['loss']:.3f} nats per token, {figures['bits_per_byte']:.3f} bits per byte"
        if not figures["loss"] < guess:
            return "ill", f"{sentence}: no better than guessing, ln(vocab_size) = {guess:.3f}"
        return "well", f"{sentence}; guessing costs {guess:.3f} nats"
    tokens = patient.tokens(4, 257)
    with torch.no_grad():
        nats = patient.model(tokens[:, :-1], readout=summed_loss(tokens[:, 1:].contiguous())).item() / 1024
    sentence = f"{nats:.3f} nats per token of noise"
    if not math.isfinite(nats):
        return "ill", f"the loss of noise is {nats}"
    # Nobody can beat guessing at noise; the mean of 1,024 draws is within this.
    if nats < guess - 0.5:
        return "ill", f"{sentence}, less than ln(vocab_size) = {guess:.3f}: the model sees what it is to predict"
    if (expected := _first_loss(patient)) is None:
        return "unknown", f"{sentence}; the model has been trained, so only a text can tell (--data FILE)"
    if abs(nats - expected) > _NEAR:
        return "ill", f"{sentence}, but first weights of this size should cost {expected:.3f}"
    return "well", f"{sentence}, what first weights should cost ({expected:.3f}; guessing {guess:.3f})"


def _first_loss(patient: Patient) -> float | None:
    """Return the expected loss of a model with first weights, None for one that has been trained.

    Logits of normed states and a head of standard deviation s are N(0, s^2 D), which costs ln V + s^2 D / 2.
    """
    config, std = patient.config, patient.config.initializer_range
    for module in patient.model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            # A sample of n has this standard deviation give or take 1 / sqrt(2 n).
            room = 5 / math.sqrt(2 * module.weight.numel())
            if not math.isclose(module.weight.std().item(), std, rel_tol=max(0.01, room)):
                return None
        elif isinstance(module, RMSNorm) and bool((module.weight != module.weight[0]).any()):
            return None
    return math.log(config.vocab_size) + std**2 * config.hidden_size / 2


def padding(patient: Patient) -> Answer:
    """Documents padded in one batch cost what each costs alone: padding is neither seen nor counted."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(patient.config.vocab_size, (size,), generator=generator).tolist() for size in (21, 9, 14)]
    with TemporaryDirectory() as folder:
        with CorpusWriter(Path(folder), "padding", patient.tokenizer.fingerprint, patient.config.vocab_size) as writer:
            for row in rows:
                writer.append(row, len(row))
        corpus = open_corpus(Path(folder), writer.names, patient.tokenizer.fingerprint)
        # Longer than any document, so that every row ends in padding.
        batches = WholeDocuments(corpus, 24, 2, patient.tokenizer.pad_id)
        result = score(patient.model, batches, batches.bytes, "fp32")
    targets = sum(len(row) - 1 for row in rows)
    if result.tokens != targets:
        return "ill", f"{result.tokens} tokens are counted where {targets} are predicted: padding is in the loss"
    alone = sum(_nats(patient, row) for row in rows)
    if not math.isclose(result.nats, alone, rel_tol=CLOSE):
        return "ill", f"padded documents cost {result.nats / targets:.4f} nats per token, alone {alone / targets:.4f}"
    return "well", "padding changes no prediction and is not in the loss"


def _nats(patient: Patient, row: list[int]) -> float:
    """Predict a document alone, and add up what each token but the first costs, in the plainest way."""
    tokens = torch.tensor([row], device=patient.model.embedding.weight.device)
    with torch.no_grad():
        scores = patient.model(tokens[:, :-1]).log_softmax(dim=-1)
    return -scores.gather(-1, tokens[:, 1:, None]).sum().item()


def weights(patient: Patient) -> Answer:
    """Every weight is finite; how far norms' gains are from 1 is told, and is no illness (Google's reach 1657)."""
    wild = [name for name, tensor in patient.model.state_dict().items() if not tensor.isfinite().all()]
    if wild:
        return "ill", f"{wild[0]} holds NaN or infinity" + (f", and so do {len(wild) - 1} others" * (len(wild) > 1))
    named = [(name, module.weight) for name, module in patient.model.named_modules() if isinstance(module, RMSNorm)]
    if not named:
        return "well", "all weights are finite"
    low, lowest = min((1 + weight.min().item(), name) for name, weight in named)
    high, highest = max((1 + weight.max().item(), name) for name, weight in named)
    usual = "" if low > -1 and high < 10 else ", far from 1, as in Google's own models"
    return "well", f"all finite; norms' gains go from {low:.3g} ({lowest}) to {high:.3g} ({highest}){usual}"


def activations(patient: Patient) -> Answer:
    """The residual stream stays finite; whether it would in fp16 is told, and is no illness."""
    peaks: dict[str, float] = {}

    def note(name: str) -> object:
        def look(_module: nn.Module, _given: object, result: Tensor) -> None:
            # max() keeps what it has where the other is NaN, so ask for that first.
            peak = result.detach().abs().max().item()
            peaks[name] = peak if math.isnan(peak) else max(peaks.get(name, 0.0), peak)

        return look

    blocks = patient.blocks()
    hooks = [block.register_forward_hook(note(f"layer {layer}")) for layer, block in enumerate(blocks)]  # type: ignore[arg-type]
    try:
        if patient.data is None:
            patient.hidden(patient.tokens(1, 2 * patient.config.sliding_window + 3))
        else:
            score_text(patient.model, patient.tokenizer, patient.data, documents=8)
    finally:
        for hook in hooks:
            hook.remove()
    if bad := next((name for name, peak in peaks.items() if not math.isfinite(peak)), None):
        return "ill", f"the residual stream after {bad} holds {peaks[bad]}"
    name = max(peaks, key=peaks.__getitem__)
    text = "the text" if patient.data is not None else "noise"
    verdict = "fp16 would hold it" if peaks[name] < FP16_LARGEST / 4 else "too close to fp16's 65504, use bf16 or fp32"
    if peaks[name] >= FP16_LARGEST:
        verdict = "fp16, which ends at 65504, would overflow; use bf16 or fp32"
    return "well", f"the residual stream of {text} reaches {peaks[name]:,.1f} after {name}: {verdict}"
