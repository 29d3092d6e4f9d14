"""What is wrong with this model? Checks that find a fault by what it does, without another model to compare with.

`anatomy` and `rotary` measure the parts, `behaviour` the whole, `words` the tokenizer. What no check can see: weights
that are consistently wrong (a permutation, a norm stored as 1 + w, another config than the one it was trained with).
Those only show in the loss of a text.
"""

from collections.abc import Callable

import torch

from gemmule.evaluate.doctor.anatomy import attention, embedding, head, mlp, norms, qk_norm, window, wiring
from gemmule.evaluate.doctor.behaviour import (
    activations,
    batch_independence,
    cache,
    causality,
    gradients,
    loss,
    padding,
    weights,
)
from gemmule.evaluate.doctor.patient import Answer, CannotTell, Finding, Patient
from gemmule.evaluate.doctor.rotary import rotary
from gemmule.evaluate.doctor.words import chat, read_declared, special_tokens, vocabulary

__all__ = ["CHECKS", "Finding", "Patient", "examine", "read_declared"]

CHECKS: dict[str, Callable[[Patient], Answer]] = {
    "weights": weights,
    "vocabulary": vocabulary,
    "special_tokens": special_tokens,
    "chat": chat,
    "causality": causality,
    "batch_independence": batch_independence,
    "cache": cache,
    "window": window,
    "rotary": rotary,
    "embedding": embedding,
    "norms": norms,
    "qk_norm": qk_norm,
    "attention": attention,
    "mlp": mlp,
    "wiring": wiring,
    "head": head,
    "gradients": gradients,
    "padding": padding,
    "activations": activations,
    "loss": loss,
}


def examine(patient: Patient, progress: Callable[[str, int, int | None], None] = lambda *_: None) -> list[Finding]:
    """Return what each check finds: well, ill, or unknown where the model is built too differently to be looked into.

    The model must be in fp32; in bf16, rounding hides what the checks look at.
    """
    if patient.model.embedding.weight.dtype != torch.float32:
        raise ValueError("the doctor measures differences that bf16 rounds away; give it model.float()")
    was_training = patient.model.training
    patient.model.eval()
    findings = []
    try:
        for number, (name, check) in enumerate(CHECKS.items()):
            progress("examining", number, len(CHECKS))
            findings.append(Finding(name, *_ask(check, patient)))
    finally:
        patient.model.train(was_training)
    return findings


def _ask(check: Callable[[Patient], Answer], patient: Patient) -> Answer:
    try:
        return check(patient)
    except CannotTell as reason:
        return "unknown", str(reason)
    except torch.OutOfMemoryError:
        raise  # of the machine, not of the model
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        first, *_ = str(error).splitlines() or [""]
        return "ill", f"the model breaks down: {type(error).__name__}: {first}"
